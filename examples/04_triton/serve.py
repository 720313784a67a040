"""Publish an artifact and serve it on this machine: HTTP on --port, gRPC and metrics on the two ports after it. Ctrl-C ends it.

python examples/04_triton/serve.py out/demo --server models/tritonserver
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from pathlib import Path

from server import Server

from flora_export.artifact import MANIFEST, open_artifact
from flora_export.backends.triton.config import Serving
from flora_export.backends.triton.repository import live
from flora_export.errors import ArtifactError
from flora_export.publish import publish

QUESTION = "Anna has 14 apples. Ben gives Anna 9 more, and then Anna loses 5. How many apples does Anna have now?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--server", type=Path, default=Path("models/tritonserver"), help="laid out by get_server.py")
    parser.add_argument("--repository", type=Path, help="where to publish; without it, beside the artifact")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    repository = options.repository or options.artifact.with_name(options.artifact.name + ".triton")
    if not _is_live(options.artifact, repository):
        print(f"publishing {options.artifact} in {repository} ...", file=sys.stderr)
        publish(open_artifact(options.artifact), repository, Serving(), lambda *_: None)
    log = repository.with_name(repository.name + ".log")
    print(f"starting tritonserver; its log is {log} ...", file=sys.stderr)
    server = Server(options.server, repository, log=log, ports=(options.port, options.port + 1, options.port + 2))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with contextlib.suppress(KeyboardInterrupt):
        server.wait()
        body = json.dumps({"text_input": QUESTION, "max_tokens": 80, "stream": True})
        print(f"\ncurl -sN http://{server.http}/v2/models/generate/generate_stream -d '{body}'\n", flush=True)
        server.process.wait()
    server.stop()


def _is_live(artifact: Path, repository: Path) -> bool:
    try:
        served = repository / "decoder" / str(live(repository)["decoder"]) / MANIFEST
        return served.read_bytes() == (artifact / MANIFEST).read_bytes()
    except (ArtifactError, OSError):
        return False


if __name__ == "__main__":
    main()
