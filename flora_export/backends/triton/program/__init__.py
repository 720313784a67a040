"""What a version of the `generate` model runs inside the server. It imports nothing of flora-export."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before ONNX Runtime is imported, which else reports to its makers
