"""The one truth: base model and adapter as eager PyTorch, unfused, fp32. Shares no code with the capture."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import peft
import torch
import transformers
from transformers import AutoModelForCausalLM

import flora_export.ffba  # noqa: F401  # registers FFBA with PEFT
from flora_export.base_model import BaseModel
from flora_export.errors import CheckpointError


class Reference:
    """Eager PyTorch in fp32, one prompt at a time."""

    def __init__(self, base: BaseModel, checkpoint: Path) -> None:
        """Load both.

        Raises:
            CheckpointError: transformers or PEFT cannot load them; their words are quoted.
        """
        try:
            with _quiet():
                model = AutoModelForCausalLM.from_pretrained(
                    base.path,
                    dtype=torch.float32,
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=True,
                    attn_implementation="eager",
                )
                self.model = peft.PeftModel.from_pretrained(model, str(checkpoint)).eval()
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise CheckpointError(f"eager PyTorch cannot load {checkpoint} on {base.name} ({type(error).__name__}: {error})") from error

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], *, adapter: bool = True) -> npt.NDArray[np.float32]:
        """Logits [tokens, vocabulary] of a whole sequence, with or without the adapter."""
        ids = torch.tensor([list(tokens)])
        with contextlib.nullcontext() if adapter else self.model.disable_adapter():
            output: npt.NDArray[np.float32] = self.model(input_ids=ids, use_cache=False).logits[0].float().numpy()
        return output

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], steps: int) -> list[int]:
        """The next `steps` tokens, decoded greedily with a KV cache and with the adapter. An end token does not stop it."""
        tokens: list[int] = []
        ids, cache = torch.tensor([list(prompt)]), None
        for _ in range(steps):
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ids = output.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
        return tokens


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        transformers.utils.logging.enable_progress_bar()
        transformers.logging.set_verbosity(verbosity)
