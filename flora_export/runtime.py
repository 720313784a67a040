"""Session: a bank in memory, whose adapters can be replaced while it serves.

    session = Session(Path("out"))
    with session.request(["support", "legal"]) as request:     # a batch, each row with its adapter
        logits = request.start(prompts)
        logits = request.step(tokens)
    session.swap("legal", Path("legal-v2"))

The stacks are memory of ours that ONNX Runtime reads in every run (it neither packs nor copies what a Gather reads), so a swap is a copy of
the adapter's own bytes: the base model is not loaded again, and speed stays what it was.

A request keeps the adapters that its names had when it began, to its end. A swap fills a slot that no name and no request has, and then
gives the name to it. Where there is none it waits for the requests of the adapter that it replaces, and new ones wait for the swap.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort

from flora_export.artifact import Artifact, changed_files, open_artifact
from flora_export.backends.onnxruntime import Decoder
from flora_export.bank import checked_name, find_slot
from flora_export.errors import ArtifactError, BackendError, FloraExportError, VerificationError
from flora_export.stacks import fitting, layers_of, read_stacks, stacked_bank
from flora_export.verify.golden import Recorded, recorded_prompts, replay
from flora_export.weights import Array


class Session:
    """An artifact of `build --slots N`, or `--bank stack`, loaded once. All of it may be called from many threads."""

    def __init__(self, path: Path, *, threads: int = 0, check_files: bool = True) -> None:
        """Load a bank.

        Args:
            threads: of one operator; 0 leaves them to ONNX Runtime.
            check_files: compare every file with the manifest first.

        Raises:
            ArtifactError: it is no bank with slots, or it is damaged.
            BackendError: it is for another target than the CPU, or ONNX Runtime refuses it.
        """
        self.artifact = open_artifact(path)
        bank = stacked_bank(self.artifact)
        if (manifest := self.artifact.manifest).target != "cpu" or manifest.compute == "bf16":
            raise BackendError(f"{path} is in {manifest.precision} for {manifest.target}; adapters are swapped on the CPU, and not in bf16")
        if check_files and (faults := changed_files(self.artifact)):
            raise ArtifactError(f"{path}: {'; '.join(faults)}")
        self._stacks = read_stacks(self.artifact)
        self._memory = {stack.name: stack.read() for stack in self._stacks}
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self._memory.items()}
        self._decoder = Decoder(self.artifact, threads=threads, initializers=values)
        self._check_memory()
        self._slots = bank.slots
        self._names = dict(bank.taken)
        self._running: Counter[int] = Counter()  # requests by slot
        self._changed = threading.Condition()
        self._swapping = threading.Lock()  # one at a time
        self._closed_for: str | None = None  # the name whose only slot is being written

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that can be asked for; the base model is "base"."""
        with self._changed:
            return tuple(self._names)

    @contextmanager
    def request(self, adapters: Sequence[str], *, timeout: float | None = None) -> Iterator[Decoder]:
        """A decoder for one batch, whose rows have these adapters, the ones of this moment to the end.

        It waits, at most `timeout` seconds, while a swap waits for other requests of the same adapter to end. A thread that has such a
        request open must not wait here: with an empty slot in the bank no one waits.

        Raises:
            FloraExportError: there is no adapter of that name, or the swap has not ended in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed_for not in adapters, timeout):
                raise FloraExportError(f"{self._closed_for!r} is being replaced, and was not within {timeout:g} seconds")
            slots = [find_slot(self._names, name) for name in adapters]
            self._running.update(set(slots))
        try:
            decoder = self._decoder.sibling()
            decoder.choice.choose(slots)
            yield decoder
        finally:
            with self._changed:
                self._running.subtract(set(slots))
                self._changed.notify_all()

    def swap(self, name: str, ckpt: Path, *, golden: Path | None = None, timeout: float | None = None) -> None:
        """Give a name to another adapter: one that is there is replaced, a new one takes an empty slot.

        Args:
            golden: an artifact that was built with the adapter by that name: its golden vectors are replayed before anyone is served.
            timeout: seconds to wait for other swaps, and for requests that are under way where no slot is free.

        Raises:
            CheckpointError: the adapter is damaged or does not fit. Nothing has changed.
            VerificationError: it does not answer as recorded. The name has its former adapter.
            FloraExportError: there is no free slot for a new name, or requests have not ended in time. Nothing has changed.
        """
        checked_name(name)
        checkpoint = fitting(self.artifact, ckpt)
        layers = [(stack.name, layer) for stack, _, layer in layers_of(self._stacks, checkpoint)]  # all is read before one byte is written
        recorded = [] if golden is None else _recordings(golden, name, self.artifact)
        end = None if timeout is None else time.monotonic() + timeout
        if not self._swapping.acquire(timeout=-1 if timeout is None else timeout):
            raise FloraExportError(f"another swap has not ended within {timeout:g} seconds")
        former, kept = self._names.get(name), list[tuple[Array, Array]]()
        try:
            slot = self._free_slot(name, None if end is None else end - time.monotonic())
            kept += [(self._memory[stack][slot + 1], self._memory[stack][slot + 1].copy()) for stack, _ in layers]
            self._write(slot, layers)
            own = [dataclasses.replace(each, slot=slot) for each in recorded]
            if own and (faults := replay(self.artifact, self._decoder.sibling(), own)):
                raise VerificationError(f"{ckpt} does not answer as was recorded: {'; '.join(faults)}", {})
            former = slot
        except BaseException:
            for layer, values in kept:
                layer[...] = values
            raise
        finally:
            self._open(name, former)
            self._swapping.release()

    def _check_memory(self) -> None:
        """Prove that the runtime reads the stacks in every run: the base model's layer of zeros is another for a moment.

        Raises:
            BackendError: it keeps a copy, as on a CPU without fp16, where weights are cast once.
        """
        decoder = self._decoder.sibling()
        before, rng = decoder.start([[0, 1]])[0], np.random.default_rng(0)
        for array in self._memory.values():
            array[0] = rng.standard_normal(array[0].shape).astype(array.dtype)
        during = decoder.start([[0, 1]])[0]
        for array in self._memory.values():
            array[0] = 0
        if np.array_equal(before, during) or not np.array_equal(before, decoder.start([[0, 1]])[0]):
            raise BackendError(
                f"{self.artifact.path}: ONNX Runtime keeps a copy of the adapters, as it does of fp16 on a CPU, so none can be replaced "
                "while it runs. Build in fp32, int8 or int4."
            )

    def _free_slot(self, name: str, timeout: float | None) -> int:
        """A slot that no one reads. Where it is the name's own, the name is closed for new requests meanwhile."""
        with self._changed:
            former = self._names.get(name)
            free = [slot for slot in range(self._slots) if slot not in self._names.values() and not self._running[slot]]
            if free:
                return free[0]
            own = [slot for slot in range(self._slots) if slot not in self._names.values() or slot == former]
            if not own:
                raise FloraExportError(
                    f"all {self._slots} slots are taken: swap one of {', '.join(self._names)}, or build with more --slots"
                )
            self._closed_for = name
            if not self._changed.wait_for(lambda: any(not self._running[slot] for slot in own), timeout):
                raise FloraExportError(f"the requests of {name!r} have not ended in time, and no slot is free")
            return next(slot for slot in own if not self._running[slot])

    def _open(self, name: str, slot: int | None) -> None:
        """From now on the name means this slot."""
        with self._changed:
            if slot is not None:
                self._names[name] = slot
            self._closed_for = None
            self._changed.notify_all()

    def _write(self, slot: int, layers: Sequence[tuple[str, Array]]) -> None:
        """Copy an adapter into a slot, and prove that it is there."""
        for stack, layer in layers:
            self._memory[stack][slot + 1] = layer[0]
        for stack, layer in layers:
            if self._memory[stack][slot + 1].tobytes() != layer[0].tobytes():
                raise VerificationError(f"{stack}: its bytes are not in slot {slot}", {})


def _recordings(path: Path, name: str, artifact: Artifact) -> list[Recorded]:
    """What an artifact has recorded of an adapter: its only one, or a bank's by that name. Raises ArtifactError."""
    other = open_artifact(path)
    if other.manifest.base["files"] != artifact.manifest.base["files"]:
        raise ArtifactError(f"{path} was built from another base model than {artifact.path}, so its golden vectors prove nothing of it")
    bank = other.manifest.bank
    found = [each for each in recorded_prompts(other) if bank is None or each.slot == bank.taken.get(name)]
    if not found:
        raise ArtifactError(f"{path} has no golden vectors of an adapter {name!r}")
    return found
