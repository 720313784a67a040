"""forecast(): what a build would refuse, write and take, before the weights of its base model are read in full.

What is refused is known exactly: all is done that a build does, up to the fused graph, whose weights are read when they are written. Bytes,
memory and seconds are those of the same build with one layer and with three, on this machine (with more, where the adapters of a bank have
none in common), and the straight line through both: every phase of a build is a constant and a share for each layer. Other work on the
machine can make the smaller build take longer than the larger one; a layer's share is no less than what its work takes with all processors
at once.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flora_export import base_model
from flora_export.artifact import check_free
from flora_export.backends import Progress
from flora_export.base_model import BaseModel
from flora_export.errors import BackendError, CheckpointError, FloraExportError, FusionError, VerificationError
from flora_export.pipeline import BuildOptions, build, prepare
from flora_export.scratch import Scratch
from flora_export.shortened import layers_to_keep, shorten_adapter, shorten_base
from flora_export.trust.signature import signing_with

FEWER = (1, 3)  # layers of a calibration
_SPAWN = multiprocessing.get_context("spawn")
_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Cost:
    """What a build takes: seconds, and those of processors; the output's bytes; and of each of its phases the most bytes of memory that no
    file backs, 0 where the system does not tell.
    """

    seconds: float
    processors: float
    disk: int
    phases: dict[str, int]

    @property
    def memory(self) -> int:
        return max(self.phases.values(), default=0)

    def line(self, other: Cost, share: float, cores: int) -> Cost:
        """The cost at a place on the line through two: 0 is here, 1 is there. Which phase needs most is not the same everywhere on it."""

        def at(here: float, there: float) -> float:
            return here + (there - here) * share

        work = other.processors - self.processors
        seconds = self.seconds + max(other.seconds - self.seconds, work / cores) * share
        phases = {name: int(at(memory, other.phases.get(name, memory))) for name, memory in self.phases.items()}
        processors = round(self.processors + work * share, 1)
        return Cost(round(seconds, 1), processors, int(at(self.disk, other.disk)), phases)

    def to_dict(self) -> dict[str, Any]:
        seconds = {"seconds": self.seconds, "processor_seconds": self.processors}
        return {**seconds, "memory": self.memory, "disk": self.disk, "phases": self.phases}


@dataclass(frozen=True)
class Forecast:
    """A build that was not done. `causes` says why it would not be possible here."""

    cost: Cost
    layers: int
    calibration: dict[int, Cost]  # by layers
    causes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """One JSON object; sizes in bytes."""
        told = {layers: cost.to_dict() for layers, cost in self.calibration.items()}
        return {"possible": not self.causes, "cost": self.cost.to_dict(), "layers": self.layers, "calibration": told, "causes": self.causes}

    def to_text(self) -> str:
        cost = self.cost
        memory = f"{cost.memory / 2**30:.2f} GiB of memory beside the page cache, " if cost.memory else ""
        calibration = ", ".join(f"{layers}: {each.seconds:.1f} s" for layers, each in self.calibration.items())
        return "\n".join(
            [
                f"nothing is refused; a build takes about {cost.seconds:.0f} s, {memory}{cost.disk / 2**30:.2f} GiB of disk",
                f"told from the same build with fewer of its {self.layers} layers ({calibration})",
                *self.causes,
            ]
        )


def forecast(ckpt: Path, base_name: str | None, output: Path, options: BuildOptions, progress: Progress) -> Forecast:
    """What a build with these options would take here. Nothing is written but in a temporary directory.

    Raises:
        FloraExportError: the build would raise it, before it read the weights; or a build with fewer layers has failed.
    """
    output = output.absolute()
    if options.sign is not None:
        signing_with(options.sign)
    check_free(output, options.force)
    prepared = prepare(ckpt, base_name, options, progress)
    base = prepared.base
    if base.packed is not None:
        raise FloraExportError("--dry-run knows no cost of a base model that is quantized already: it is unpacked first, as a whole")
    ckpts = [path for path, _ in options.weighted] or ([ckpt] if options.bank is None else [path for _, path in options.bank.members])
    order, least = layers_to_keep(ckpts, base)
    fewer = sorted({min(layers + least - 1, base.layers) for layers in FEWER})
    calibration: dict[int, Cost] = {}
    with Scratch("flora-export-forecast-") as name:
        # The first of all finds files that are cold, which tells beside a small base: there it does not count.
        builds = fewer if base.is_large else [fewer[0], *fewer]
        for number, layers in enumerate(builds):
            progress("building with fewer layers", number, len(builds))
            calibration[layers] = _cost(Path(name) / str(number), base, order[:layers], ckpt, options)
    first, last = fewer[0], fewer[-1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cost = calibration[first].line(calibration[last], (base.layers - first) / max(1, last - first), cores)
    read_back = options.verify and prepared.plan.quantization is not None and base.is_large
    return Forecast(cost, base.layers, calibration, list(_causes(cost, output, base.fp32_bytes if read_back else 0)))


def _cost(place: Path, base: BaseModel, layers: Sequence[int], ckpt: Path, options: BuildOptions) -> Cost:
    """Build with these layers alone, in a process of its own; what was written goes again. Raises FloraExportError."""
    place.mkdir()
    short: dict[Path, Path] = {}

    def adapter(path: Path) -> Path:
        if path not in short:
            short[path] = place / f"adapter{len(short)}"
            shorten_adapter(path, base, layers, short[path])
        return short[path]

    try:
        shorten_base(base, layers, place / "base")
        options = dataclasses.replace(
            options,
            weighted=tuple((adapter(path), weight) for path, weight in options.weighted),
            bank=None if options.bank is None else options.bank.moved(adapter),
            allow_vacuous=True,
            max_quantization_loss=None,
            force=False,
            sign=None,
        )
        large = 0 if base.is_large else sys.maxsize
        seconds, processors, phases = _measured(adapter(ckpt), str(place / "base"), place / "out", options, large)
        return Cost(seconds, processors, sum(file.stat().st_size for file in (place / "out").iterdir()), phases)
    except (CheckpointError, FusionError) as error:  # by what comes with the numbers, or a pattern that names layers
        raise FloraExportError(f"what it takes is not known, for a build with fewer of its layers is refused: {error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _measured(*task: Any) -> tuple[float, float, dict[str, int]]:
    """Seconds of `_build`, from the start of its process to its end; those of processors; the most memory of each phase.

    Raises FloraExportError.
    """
    here, there = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_build, args=(there, *task))
    started, phase, phases = time.perf_counter(), "start", {"start": 0}
    process.start()
    there.close()
    try:
        while True:
            if here.poll(_SAMPLE_SECONDS):
                said = here.recv()
                if not isinstance(said, str):
                    break
                phase = said
            phases[phase] = max(phases.get(phase, 0), anonymous_bytes(process.pid))
        seconds = time.perf_counter() - started
        process.join()
    except EOFError:
        process.join()
        said = BackendError(f"a build with fewer layers died (exit code {process.exitcode})")
    finally:
        process.kill()
        process.join()
    if isinstance(said, FloraExportError):
        raise said
    return round(seconds, 2), round(said, 2), phases


def _build(connection: Connection, ckpt: Path, base: str, output: Path, options: BuildOptions, large: int) -> None:
    """A calibration's process: it says the name of each phase, and at last the seconds of processors that it took, or its error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both, and the other kills this one
    base_model.LARGE = large  # as it is for the whole model
    try:
        build(ckpt, base, output, options, lambda what, *_: connection.send(what))
    except VerificationError as error:
        connection.send(FloraExportError(f"a build with fewer layers is not verified, so its cost is not known: {error}"))
    except FloraExportError as error:
        connection.send(error)
    else:
        connection.send(time.process_time())


def anonymous_bytes(pid: int | None) -> int:
    """What a process has of memory that no file backs; 0 where the system does not tell, or it has ended."""
    try:
        return _entry(Path(f"/proc/{pid}/status"), "RssAnon:")
    except OSError:
        return 0


def _entry(table: Path, key: str) -> int:
    """An entry of a table of Linux's, in bytes."""
    return next((1024 * int(line.split()[1]) for line in table.read_text().splitlines() if line.startswith(key)), 0)


def _causes(cost: Cost, output: Path, temporary: int) -> Iterator[str]:
    """Why a build would not be possible here, which writes so many bytes to the system's temporary directory."""
    place = next(each for each in output.parents if each.exists())
    if not os.access(place, os.W_OK):
        yield f"{place} may not be written to: choose another --output"
    if (free := shutil.disk_usage(place).free) < cost.disk:
        yield f"{place} has room for {free / 2**30:.2f} GiB: make some, or choose another --output"
    home = tempfile.gettempdir()
    if (free := shutil.disk_usage(home).free) < temporary:
        yield (
            f"{home} has room for {free / 2**30:.2f} GiB, and a quantized artifact is compared with {temporary / 2**30:.2f} GiB of weights "
            "there: make some, or set TMPDIR to another disk"
        )
    memory = Path("/proc/meminfo")
    if memory.exists() and (free := _entry(memory, "MemAvailable:")) < cost.memory:
        yield f"this machine has {free / 2**30:.2f} GiB of memory to give: free some, or take a larger one"
