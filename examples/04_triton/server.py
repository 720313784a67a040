"""Start and stop a tritonserver laid out by get_server.py, on 127.0.0.1 and free ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sysconfig
import time
import urllib.request
from pathlib import Path

from get_server import HOME, VENV


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
        self.process = subprocess.Popen([str(word) for word in command], env=environment, stdout=output, stderr=output)

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


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
