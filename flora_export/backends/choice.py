"""Which adapter of a bank answers each row of a batch: what runners are told, and what they tell the graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flora_export.artifact import Artifact
from flora_export.bank import BASE
from flora_export.errors import FloraExportError


class AdapterChoice:
    """One adapter for all rows, or one for each: at first the artifact's `slot`. What holds one adapter alone has none to choose."""

    def __init__(self, artifact: Artifact, *, adapter: bool = True) -> None:
        self.artifact = artifact
        self.chosen: int | tuple[int, ...] = artifact.slot if adapter else BASE

    def choose(self, slots: int | Sequence[int]) -> None:
        """From the next call on; -1 is the base model. Raises FloraExportError: there is no such slot, or no bank."""
        bank = self.artifact.manifest.bank
        if bank is None:
            raise FloraExportError(f"{self.artifact.path} holds one adapter, so there is none to choose")
        wanted = (slots,) if isinstance(slots, int) else tuple(slots)
        for slot in wanted:
            if not BASE <= slot < bank.slots:
                raise FloraExportError(f"{self.artifact.path} has {bank.slots} slots, and no slot {slot}; {BASE} is the base model")
        self.chosen = slots if isinstance(slots, int) else wanted

    def ids(self, rows: int) -> npt.NDArray[np.int64]:
        """The graph's `adapter_ids` for a batch. Raises FloraExportError: adapters were chosen for another number of rows."""
        if isinstance(self.chosen, int):
            return np.full(rows, self.chosen, np.int64)
        if len(self.chosen) != rows:
            raise FloraExportError(f"adapters were chosen for {len(self.chosen)} rows, but there are {rows}")
        return np.array(self.chosen, np.int64)
