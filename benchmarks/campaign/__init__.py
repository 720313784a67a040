"""The reliability campaign: each promise of docs/reliability.md, tried."""
