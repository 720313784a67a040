"""ONNX Runtime GenAI decodes an artifact: the library that its `genai_config.json` is for."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from flora_export.artifact import Artifact
from flora_export.backends import Limits
from flora_export.bank import ADAPTER_IDS
from flora_export.errors import BackendError

CONFIG = "genai_config.json"


MAX_ROWS = 32  # that GenAI 0.18 takes as one batch


class GenaiTokens:
    """Greedy tokens of a batch, one of each row at a time."""

    def __init__(self, artifact: Artifact, ends: set[int], rows: Sequence[Sequence[int]], slots: Sequence[int] = ()) -> None:
        """Load the artifact for prompts `rows`; of a bank, `slots` has the adapter of each. A row is over at one of the tokens `ends`.

        Raises:
            BackendError: the package is not installed, or it cannot run this artifact.
        """
        try:
            import onnxruntime_genai as og
        except ImportError as error:
            raise BackendError(f"onnxruntime-genai cannot be imported ({error}): pip install 'flora-export[genai]'") from error
        if not (artifact.path / CONFIG).is_file():
            raise BackendError(f"ONNX Runtime GenAI runs a graph for ONNX Runtime with a {CONFIG}; {artifact.path} has none")
        self.limits = Limits(batch=MAX_ROWS)
        if len(rows) > MAX_ROWS:
            raise BackendError(f"ONNX Runtime GenAI takes {MAX_ROWS} prompts at once, not {len(rows)}. Use --runtime decoder.")
        self.og, self.path, self.rows = og, artifact.path, rows
        # GenAI reads this array at every step, and neither copies it nor keeps it: gone or changed, other adapters answer.
        self.adapter_ids = np.array(slots, np.int64)
        # Padding tokens at a prompt's end count as padding, in a single prompt as well, silently: take one that ends no prompt.
        last = {row[-1] for row in rows}
        self.padding = next(token for token in range(len(last) + 1) if token not in last)
        changes = {"pad_token_id": self.padding} | ({"eos_token_id": sorted(ends)} if ends else {})
        try:
            config = og.Config(str(artifact.path))
            config.overlay(json.dumps({"model": changes}))
            self.model = og.Model(config)
        except Exception as error:  # it raises several types, none public
            raise BackendError(f"ONNX Runtime GenAI refuses {artifact.path} ({error}). Use --runtime decoder.") from error

    def start(self, room: int) -> list[int]:
        """Prefill, for at most `room` new tokens a row. Returns the first of each.

        Rows are padded on the right: GenAI reads the logits at each row's own last token, whatever the graph's attention.
        """
        width = max(map(len, self.rows))
        padded = np.array([[*row, *[self.padding] * (width - len(row))] for row in self.rows], np.int32)
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(batch_size=len(self.rows), max_length=width + room, do_sample=False)
        try:
            self.generator = self.og.Generator(self.model, parameters)
            if len(self.adapter_ids):
                self.generator.set_model_input(ADAPTER_IDS, self.adapter_ids)  # once, before the prompt: set again, the next step fails
            self.generator.append_tokens(padded)
        except Exception as error:
            raise BackendError(f"ONNX Runtime GenAI failed on prompts {padded.shape} ({error}). Use --runtime decoder.") from error
        return self.step()

    def step(self) -> list[int]:
        """The next token of each row; one that is over goes on with padding."""
        try:
            self.generator.generate_next_token()
            return [int(token) for token in self.generator.get_next_tokens()]
        except Exception as error:
            raise BackendError(f"ONNX Runtime GenAI failed on {self.path} ({error}). Use --runtime decoder.") from error
