"""Start and stop a tritonserver laid out by get_server.py, and nginx in front of it, on 127.0.0.1 and free ports."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sysconfig
import time
import urllib.request
from pathlib import Path

from get_server import HOME, VENV

STACK = 256 * 2**20  # bytes of a thread: the server's JSON parser takes 64 for each bracket that a client opens, and dies of too few


class Server:
    """A running tritonserver. Its log goes to a file, or where this program's own goes."""

    def __init__(
        self,
        home: Path,
        repository: Path,
        *,
        log: Path | None = None,
        poll: int | None = 1,
        ports: tuple[int, int, int] | None = None,
        python: Path | None = None,
    ) -> None:
        """Start it; models come and go with the repository, which it looks at every `poll` seconds.

        Args:
            poll: seconds; None: models change only when the server is told to load them.
            ports: for HTTP, gRPC and metrics.
            python: directory of the python program whose packages the Python backend uses, instead of the server's own.
        """
        root = (home / HOME).absolute()
        self.http, self.grpc, self.metrics = (f"127.0.0.1:{port}" for port in ports or _free_ports(3))
        programs, libraries = (home / VENV / "bin").absolute(), sysconfig.get_config_var("LIBDIR")
        environment = os.environ | {
            "PATH": os.pathsep.join([str(python or programs), os.environ["PATH"]]),  # the Python backend takes its packages from there
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [libraries, os.environ.get("LD_LIBRARY_PATH")])),  # libpython
        }
        command = [root / "bin" / "tritonserver", f"--model-repository={repository}", f"--backend-directory={root / 'backends'}"]
        for name, address in (("http", self.http), ("grpc", self.grpc), ("metrics", self.metrics)):
            command += [f"--{name}-address=127.0.0.1", f"--{name}-port={address.split(':')[1]}"]
        if poll is None:
            command += ["--model-control-mode=explicit", "--load-model=*"]
        else:
            command += ["--model-control-mode=poll", f"--repository-poll-secs={poll}"]
        command += ["--disable-auto-complete-config"]  # what the repository says is complete
        command += ["--allow-gpu-metrics=false", "--exit-timeout-secs=30"]
        self.log = log
        output = log.open("ab") if log is not None else None
        limits = resource.getrlimit(resource.RLIMIT_STACK)
        most = STACK if limits[1] == resource.RLIM_INFINITY else min(STACK, limits[1])
        resource.setrlimit(resource.RLIMIT_STACK, (most, limits[1]))  # as `ulimit -s` before the server: it inherits this
        try:
            self.process = subprocess.Popen([str(word) for word in command], env=environment, stdout=output, stderr=output)
        finally:
            resource.setrlimit(resource.RLIMIT_STACK, limits)

    def wait(self, seconds: float = 120) -> None:
        """Wait until all models are ready. Raises RuntimeError with the log's end where that does not happen."""
        end = time.monotonic() + seconds
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                said = self.log.read_text(errors="replace")[-4000:] if self.log is not None else "see its log"
                raise RuntimeError(f"tritonserver did not become ready: {said}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self) -> int:
        """Let it finish what it does, and end it. Returns its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Proxy:
    """nginx as nginx.conf sets it up, before a server's HTTP. Its files go into `directory`."""

    def __init__(self, server: Server, directory: Path) -> None:
        """Raises FileNotFoundError where there is no nginx."""
        self.http = f"127.0.0.1:{_free_ports(1)[0]}"
        directory.mkdir(exist_ok=True)
        text = (Path(__file__).parent / "nginx.conf").read_text()
        (directory / "nginx.conf").write_text(text.replace("127.0.0.1:8000", server.http).replace("127.0.0.1:8080", self.http))
        with (directory / "nginx.log").open("wb") as log:
            self.process = subprocess.Popen(["nginx", "-p", f"{directory.absolute()}/", "-c", "nginx.conf"], stdout=log, stderr=log)
        end = time.monotonic() + 30
        host, port = self.http.split(":")
        while time.monotonic() < end and self.process.poll() is None:
            try:
                socket.create_connection((host, int(port)), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"nginx does not listen: {(directory / 'nginx.log').read_text(errors='replace')}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
