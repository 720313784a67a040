"""flora-export: from an FFBA checkpoint to a fused, verified inference artifact."""

import os

# ONNX Runtime reports to its makers, from 1.29 on Linux as well, unless this is set before it is imported. Set it to 0 to let it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# PyTorch asks for huge pages, which Linux gives to those who ask: a verification casts every weight anew in each pass, and the faults of
# small pages took half its time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
