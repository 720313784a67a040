from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from tests.cpp import build_example, what_is_missing
from tests.families import make_adapter, make_base

torch.set_num_threads(1)  # tiny models: two workers with a thread each beat one with two

SMOLLM2 = Path(os.environ.get("FLORA_SMOLLM2", Path(__file__).parent.parent / "models" / "smollm2"))
ADAPTER = Path(__file__).parent.parent / "examples" / "01_train_ffba" / "adapter"
MLP_ADAPTER = ADAPTER.with_name("adapter_mlp")  # of the same example, beside MLPs alone

# The files that take longest, longest first: begun last, one of them would keep a worker while the other has nothing to do.
LONGEST = ("openvino", "examples", "families", "triton_server", "real", "tensorrt_engines", "browser", "campaign_kills", "quantized", "hf")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order in which `--no-loadscope-reorder` begins them."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A failure is named as it comes: a run that is ended from outside never gets to its summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nfailed: {report.nodeid}", file=sys.__stderr__, flush=True)


def disturb_frequencies() -> None:
    """Have eager PyTorch load models whose rotary frequencies are an ulp off, as another processor's power makes them."""
    from flora_export.reference import Reference

    load = Reference.__init__

    def load_disturbed(self: Reference, *arguments: Any) -> None:
        load(self, *arguments)
        for name, buffer in self.model.named_buffers():
            if name.endswith("inv_freq"):
                towards = torch.where(torch.arange(len(buffer)) % 2 == 0, torch.inf, 0.0)
                buffer.copy_(torch.nextafter(buffer, towards))

    Reference.__init__ = load_disturbed  # type: ignore[method-assign]


if os.environ.get("FLORA_TEST_DISTURB"):  # benchmarks/machines.py
    disturb_frequencies()


def silent(what: str, done: int, of: int) -> None:
    """A progress callback that says nothing."""


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny random base models by family, made once."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_base(family, root / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def base(bases: Callable[[str], Path]) -> Path:
    return bases("llama")


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "default")


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Those of a bank, by name."""
    from tests.banks import make_adapters

    return make_adapters(base, tmp_path_factory.mktemp("bank"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    if not (SMOLLM2 / "model.safetensors").is_file():
        pytest.skip(f"no SmolLM2 at {SMOLLM2}: make models/smollm2 makes it")
    return SMOLLM2


@pytest.fixture(scope="session")
def tiny_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's shape made small, with random weights and its own tokenizer."""
    import transformers as tf

    directory = tmp_path_factory.mktemp("tiny")
    config = tf.AutoConfig.from_pretrained(
        smollm2, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tf.AutoTokenizer.from_pretrained(smollm2).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def flora_decode() -> Path:
    """The C++ example, built."""
    if (missing := what_is_missing()) is not None:
        pytest.skip(missing)
    return build_example()
