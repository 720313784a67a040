"""Verification: what the artifact holds (ledger), and what it computes (numerics), against the sources."""
