"""Serve the page, what it needs of node_modules, and one artifact, on this machine only. Ctrl-C ends it.

    python examples/08_browser/page_server.py out/demo

Any server will do that sends the same headers: without COOP and COEP a browser gives WASM no threads.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).parent
PAGE = ("index.html", "style.css", "page.js", "worker.js", "artifact.js", "decoder.js", "chat.js")
MODULES = (
    "@huggingface/jinja/dist/index.js",
    "@huggingface/tokenizers/dist/tokenizers.min.mjs",
    "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "onnxruntime-web/dist/ort.webgpu.bundle.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm",
)
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
}
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",  # these two: the page is isolated, and WASM has threads
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Nothing from anywhere else.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src 'self' data:",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",  # an artifact may be built again
}


def files(artifact: Path) -> dict[str, Path]:
    """Every path that is served, and its file: a table, so that no path leads anywhere else."""
    table = {"/": HERE / "index.html"}
    table |= {f"/{name}": HERE / name for name in PAGE}
    table |= {f"/node_modules/{name}": HERE / "node_modules" / name for name in MODULES}
    inside = (file for file in artifact.iterdir() if file.is_file() and not file.is_symlink())
    return table | {f"/artifact/{file.name}": file for file in inside}


class Handler(BaseHTTPRequestHandler):
    def __init__(self, *arguments: object, artifact: Path) -> None:
        self.artifact = artifact
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        file = files(self.artifact).get(unquote(urlsplit(self.path).path))
        host = urlsplit("//" + self.headers.get("Host", "")).hostname
        if host not in ("127.0.0.1", "localhost"):  # another site's name that leads here
            self.send_error(HTTPStatus.FORBIDDEN)
        elif file is None or not file.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self._send(file)

    def _send(self, file: Path) -> None:
        with file.open("rb") as content, contextlib.suppress(ConnectionError):  # a closed page takes no more
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", TYPES.get(file.suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(file.stat().st_size))
            self.end_headers()
            shutil.copyfileobj(content, self.wfile, 1 << 20)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *arguments: object) -> None:
        """Nothing: the page says what fails."""


def server(artifact: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of an artifact, that does not serve yet; port 0 is a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, artifact=artifact))


def url(running: ThreadingHTTPServer) -> str:
    """Where the page opens the artifact."""
    return f"http://127.0.0.1:{running.server_port}/?artifact=/artifact/"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--port", type=int, default=8008, help="0 takes a free one")
    options = parser.parse_args()
    if not (options.artifact / "manifest.json").is_file():
        sys.exit(f"{options.artifact} is no artifact: it has no manifest.json. Make one with `flora-export build`.")
    if not all((HERE / "node_modules" / name).is_file() for name in MODULES):
        sys.exit(f"onnxruntime-web is missing: run `npm ci` in {HERE}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with server(options.artifact, options.port) as running, contextlib.suppress(KeyboardInterrupt):
        print(url(running), flush=True)
        running.serve_forever()


if __name__ == "__main__":
    main()
