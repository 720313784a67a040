"""flora-export: from an FFBA checkpoint to a fused, verified inference artifact."""

__version__ = "0.1.0"
