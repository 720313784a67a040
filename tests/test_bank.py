"""A bank: each row of a batch has its own adapter, bit for bit whatever stands beside it, and a wrong bank is caught."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from flora_export.artifact import MANIFEST, Artifact, open_artifact
from flora_export.backends import Limits
from flora_export.backends.onnxruntime import Decoder
from flora_export.bank import BASE, COLUMNS, LAYOUTS, STACK, slot_of
from flora_export.bench import BenchOptions, bench
from flora_export.cli import main
from flora_export.errors import BackendError, CheckpointError, FloraExportError, FusionError, VerificationError
from flora_export.methods.bank import BankOptions, named
from flora_export.pipeline import BuildOptions, VerifyOptions, build, verify
from flora_export.proof import LedgerReport
from flora_export.verify.bank import join, mixed
from flora_export.verify.golden import recorded_prompts
from flora_export.verify.numerics import Expected
from flora_export.verify.price import Price
from flora_export.verify.report import Report
from tests.banks import NAMES, PROMPTS, fill, logits, make_bank, scaled
from tests.conftest import silent
from tests.families import make_adapter, make_lora
from tests.mutate import edit_graph


@pytest.fixture(scope="session", params=LAYOUTS)
def bank(request: pytest.FixtureRequest, adapters: dict[str, Path], base: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_bank(adapters, base, tmp_path_factory.mktemp(request.param) / "out", request.param)


@pytest.fixture(scope="session")
def singles(adapters: dict[str, Path], base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Each adapter in an artifact of its own."""
    root = tmp_path_factory.mktemp("singles")
    return {name: build(path, str(base), root / name, BuildOptions(verify=False), silent)[0] for name, path in adapters.items()}


def test_every_adapter_answers_as_its_own_artifact(bank: Artifact, singles: dict[str, Artifact]) -> None:
    decoder = Decoder(bank)
    apart = {name: logits(Decoder(single), PROMPTS, None) for name, single in singles.items()}
    without = logits(Decoder(singles["first"], adapter=False), PROMPTS, None)
    slots = [0, BASE, 2, 1]
    mixed = logits(decoder, PROMPTS, slots)
    for row, slot in enumerate(slots):
        own = without if slot == BASE else apart[NAMES[slot]]
        np.testing.assert_allclose(mixed[row], own[row], atol=2e-5)
        others = [each[row] for each in (without, *apart.values()) if each is not own]
        assert min(np.abs(mixed[row] - other).max() for other in others) > 1e-2  # a row of another adapter would be noticed
    for slot, name in enumerate(NAMES):
        for row, own in zip(logits(decoder, PROMPTS, slot), apart[name], strict=True):
            np.testing.assert_allclose(row, own, atol=2e-5)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 3e38], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_is_the_same_bit_for_bit_whatever_the_others_are(
    layout: str, number: float, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The neighbours' A and G are overwritten in the file, and in a stack B as well; a finite B is what the checkpoint's check promises."""
    out = make_bank(adapters, base, tmp_path / "out", layout, verify=False)
    slots = [0, BASE, 0, BASE]
    before, alone = (logits(Decoder(out), PROMPTS, chosen) for chosen in (slots, 0))
    beside = logits(Decoder(out), PROMPTS, [0, 1, 2, BASE])
    fill(out.path, lambda entry: slot_of(entry.tensor) != 0 and (layout == STACK or ".ffba_B." not in entry.tensor), number)
    poisoned = Decoder(out)
    for row, (was, now) in enumerate(zip(before, logits(poisoned, PROMPTS, slots), strict=True)):
        assert np.array_equal(was, now), row
    for was, now in zip(alone, logits(poisoned, PROMPTS, 0), strict=True):
        assert np.array_equal(was, now)
    mixed = logits(poisoned, PROMPTS, [0, 1, 2, BASE])
    assert np.array_equal(mixed[0], beside[0]) and np.array_equal(mixed[3], beside[3])  # in one batch with those that are broken
    assert not np.array_equal(mixed[1], beside[1])


@pytest.mark.parametrize("ids", [[3], [-2], [2**40], [-(2**40)]], ids=str)
def test_the_graph_itself_refuses_ids_that_there_are_not(bank: Artifact, ids: list[int]) -> None:
    decoder = Decoder(bank)
    for rows in (1, 3):
        decoder.choice.chosen = tuple(ids * rows)  # behind the host's own check
        with pytest.raises(BackendError, match="Gather"):
            decoder.start(PROMPTS[:rows])


def test_the_graph_itself_refuses_ids_of_another_number_than_rows(bank: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(bank)
    for ids, rows in (([0], 3), ([0, 1, 2], 1), ([0, 1], 4), ([], 1)):
        monkeypatch.setattr(decoder.choice, "ids", lambda _, ids=ids: np.array(ids, np.int64))
        with pytest.raises(BackendError, match="Reshape"):
            decoder.start(PROMPTS[:rows])


def test_the_host_refuses_before_the_graph_does(bank: Artifact, singles: dict[str, Artifact]) -> None:
    decoder = Decoder(bank)
    for wrong in (3, -2, [0, 3]):
        with pytest.raises(FloraExportError, match="no slot"):
            decoder.choice.choose(wrong)
    decoder.choice.choose([0, 1])
    with pytest.raises(FloraExportError, match="chosen for 2 rows, but there are 3"):
        decoder.start(PROMPTS[:3])
    with pytest.raises(FloraExportError, match="one adapter"):
        Decoder(singles["first"]).choice.choose(0)


def test_verification_compares_every_adapter_and_mixed_batches(adapters: dict[str, Path], base: Path, bank: Artifact) -> None:
    paths = list(adapters.values())
    report = verify(bank.path, paths[0], str(base), VerifyOptions(others=tuple(paths[1:])), silent)
    assert report.verified and report.numerics is not None
    cases = [case.name for case in report.numerics.cases]
    assert [sum(case.startswith(f"{name}: ") for case in cases) for name in NAMES] == [10, 10, 10]
    assert cases[-3:] == [f"mixed batch, {name}" for name in NAMES]
    assert {each.slot for each in recorded_prompts(bank)} == {0, 1, 2}
    assert verify(bank.path, None, None, VerifyOptions(), silent).verified
    with pytest.raises(FloraExportError, match="holds 3 adapters"):
        verify(bank.path, paths[0], str(base), VerifyOptions(), silent)
    swapped = verify(bank.path, paths[1], str(base), VerifyOptions(others=(paths[0], paths[2])), silent)
    assert not swapped.verified and any("first: wrong adapter" in cause for cause in swapped.causes)


@pytest.mark.parametrize("matrix", ["A", "B", "G"])
def test_an_adapter_that_is_lost_is_caught(matrix: str, adapters: dict[str, Path], base: Path, bank: Artifact, tmp_path: Path) -> None:
    out, paths = Path(shutil.copytree(bank.path, tmp_path / "out")), list(adapters.values())
    fill(out, lambda entry: slot_of(entry.tensor) == 1 and f".0.mlp.ffba_{matrix}." in entry.tensor, 0.0)
    report = verify(out, paths[0], str(base), VerifyOptions(others=tuple(paths[1:])), silent)
    assert any(fault.startswith("1:") and "its bytes are not in" in fault for fault in report.ledger.faults)
    assert report.numerics is not None
    assert any(cause.startswith("second: wrong adapter") for cause in report.numerics.causes)
    assert not any(cause.startswith(("first:", "third:")) for cause in report.numerics.causes)


def test_a_mask_that_mixes_adapters_up_is_caught(adapters: dict[str, Path], base: Path, tmp_path: Path) -> None:
    """The masks say that the first adapter's rows are the second's: each by itself is wrong, and so are mixed batches."""
    out, paths = make_bank(adapters, base, tmp_path / "out", COLUMNS), list(adapters.values())

    def swap(graph: ir.Graph) -> None:
        for value in graph.initializers.values():
            if (value.name or "").endswith(".table") and value.const_value is not None:
                table = np.array(value.const_value.numpy())
                table[[1, 2]] = table[[2, 1]]
                value.const_value = ir.tensor(table, name=value.name)

    edit_graph(out.path, swap)
    causes = verify(out.path, paths[0], str(base), VerifyOptions(others=tuple(paths[1:])), silent).causes
    for expected in ("first: wrong adapter", "second: wrong adapter", "wrong adapter: its effect is off"):
        assert any(cause.startswith(expected) for cause in causes), causes


@pytest.mark.parametrize(
    ("family", "layout", "options"),
    [
        ("gemma3", COLUMNS, {}),
        ("qwen3", STACK, {}),
        ("phi3", COLUMNS, {"fuse": "none"}),
        ("qwen2", COLUMNS, {"fuse": "backward"}),
        ("gemma", STACK, {}),
        ("llama_tied", COLUMNS, {"precision": "fp16"}),
        ("llama_tied", STACK, {"precision": "fp16"}),
        ("llama", STACK, {"precision": "int4"}),
        ("qwen3", STACK, {"precision": "int8"}),
        ("llama", COLUMNS, {"align": 8}),
    ],
    ids=str,
)
def test_families_and_precisions_verify(
    family: str, layout: str, options: dict[str, Any], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    own = bases(family)
    adapters = {f"a{seed}": make_adapter(own, tmp_path / f"a{seed}", seed=seed, r=3 + seed) for seed in (1, 2)}
    assert make_bank(adapters, own, tmp_path / "out", layout, **options).manifest.bank is not None


@pytest.mark.parametrize(("layout", "precision"), [(None, "fp32"), (None, "int4"), (COLUMNS, "int8")])
def test_loras_stand_side_by_side(base: Path, tmp_path: Path, layout: str | None, precision: str) -> None:
    loras = {f"lora{seed}": make_lora(base, tmp_path / f"lora{seed}", seed=seed, r=seed + 1) for seed in (1, 2, 3)}
    out = make_bank(loras, base, tmp_path / "out", layout, precision=precision)
    assert out.manifest.bank is not None and out.manifest.bank.layout == COLUMNS
    rows = logits(Decoder(out), [PROMPTS[0]] * 4, [0, 1, 2, BASE])
    assert min(np.abs(rows[i] - rows[j]).max() for i in range(4) for j in range(i)) > 1e-3


def test_a_stack_holds_no_lora(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    loras = {f"lora{seed}": make_lora(base, tmp_path / f"lora{seed}", seed=seed) for seed in (1, 2)}
    with pytest.raises(CheckpointError, match="a stack has places for FFBA alone"):
        make_bank(loras, base, tmp_path / "no", STACK)
    with pytest.raises(CheckpointError, match="without --slots"):
        make_bank(loras, base, tmp_path / "no", None, slots=8)
    with pytest.raises(CheckpointError, match="not both"):
        make_bank(loras | {"ffba": adapters["second"]}, base, tmp_path / "no", None)


def test_what_no_bank_can_hold_is_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    relu = make_adapter(base, tmp_path / "relu", mlp_activation="relu")
    with pytest.raises(FusionError, match=r"the activations gated and relu"):
        make_bank({"first": adapters["first"], "relu": relu}, base, tmp_path / "out", COLUMNS)
    dora = make_lora(base, tmp_path / "dora", use_dora=True)
    with pytest.raises(CheckpointError, match="DoRA"):
        make_bank({"first": adapters["first"], "dora": dora}, base, tmp_path / "out", COLUMNS)
    with pytest.raises(FloraExportError, match="adapters stand in a stack"):
        make_bank(adapters, base, tmp_path / "out", COLUMNS, precision="int4")
    with pytest.raises(FloraExportError, match="takes one adapter"):
        make_bank(adapters, base, tmp_path / "out", None, backend="hf")
    for options in (BankOptions(tuple(adapters.items()), "columns", None),):
        with pytest.raises(FloraExportError, match="--slots"):
            dataclasses.replace(options, slots=8)
    with pytest.raises(FloraExportError, match="--slots 2: there are 3"):
        BankOptions(tuple(adapters.items()), None, 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [["a"], ["a", "a", "b"], ["base", "a", "b"], ["a", "../b", "c"], ["", "a", "b"]], ids=str)
def test_names_are_checked(names: list[str], adapters: dict[str, Path]) -> None:
    with pytest.raises(FloraExportError):
        named(list(adapters.values()), names)


def test_a_directory_whose_name_no_adapter_can_have_is_named(tmp_path: Path) -> None:
    for name, said in (("日本語", "''"), ("base", "'base'")):
        with pytest.raises(FloraExportError, match=f"{tmp_path / name}: {said} cannot be an adapter's name.*--name"):
            named([tmp_path / name], [])


def test_layouts_are_chosen_by_ranks_and_precision(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    few = make_bank(adapters, base, tmp_path / "few", None, verify=False)
    many = make_bank({f"a{i}": adapters["second"] for i in range(30)}, base, tmp_path / "many", None, verify=False)
    places = make_bank(adapters, base, tmp_path / "places", None, verify=False, slots=5)
    layouts = [each.manifest.bank.layout for each in (few, many, places) if each.manifest.bank is not None]
    assert layouts == [COLUMNS, STACK, STACK]
    assert places.manifest.bank is not None and places.manifest.bank.names == (*NAMES, "", "")


def test_on_the_command_line(adapters: dict[str, Path], base: Path, tmp_path: Path) -> None:
    arguments = [str(path) for path in adapters.values()]
    command = ["build", *arguments, "--base", str(base), "--backend", "onnxruntime", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["bank"]["names"] == list(NAMES)
    given = [word for path in arguments for word in ("--ckpt", path)]
    done = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), *given, "--base", str(base)])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["explain", str(tmp_path / "out")])
    assert done.exit_code == 0 and "first" in done.output, done.output
    for extra, expected in ((["--name", "a"], 2), (["--adapter", arguments[0]], 2), (["--slots", "2"], 2)):
        done = CliRunner().invoke(main, [*command[:-1], str(tmp_path / "no"), *extra])
        assert done.exit_code == expected, done.output
    assert not (tmp_path / "no").exists()


def test_a_manifest_that_lies_about_its_bank_is_refused(bank: Artifact, tmp_path: Path) -> None:
    for change in (
        {"names": ["", "", ""]},
        {"names": ["a", "a", "b"]},
        {"names": ["../a", "b", "c"]},
        {"layout": "heap"},
        {"digests": []},
        {"more": 1},
    ):
        out = Path(shutil.copytree(bank.path, tmp_path / "out"))
        content = json.loads((out / MANIFEST).read_text())
        content["bank"] |= change
        (out / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(FloraExportError, match="not a manifest"):
            open_artifact(out)
        shutil.rmtree(out)


def test_bytes_are_the_same_each_time(adapters: dict[str, Path], base: Path, tmp_path: Path) -> None:
    one, other = (make_bank(adapters, base, tmp_path / name, COLUMNS) for name in ("one", "other"))
    assert one.manifest.files == other.manifest.files


def test_a_vacuous_adapter_among_others_is_refused(adapters: dict[str, Path], base: Path, tmp_path: Path) -> None:
    nothing = scaled(adapters["first"], tmp_path / "nothing", 0.0)
    with pytest.raises(VerificationError, match="nothing: vacuous"):
        make_bank({"first": adapters["first"], "nothing": nothing}, base, tmp_path / "out", COLUMNS)


def test_a_bank_is_measured_beside_what_else_could_serve(bank: Artifact, base: Path) -> None:
    result = bench(
        bank.path, str(base), BenchOptions(prompt_tokens=(8,), past_tokens=(8,), new_tokens=2, rounds=1, max_overhead=0.5), silent
    )
    assert result["arms"] == ["base", "single", "bank", "lora"]
    parameters, sizes = result["adapter_parameters"], result["bytes_ratio_to_base"]
    assert parameters["bank"] == 3 * parameters["single"] and 1 < sizes["single"] < sizes["bank"]
    with pytest.raises(FloraExportError, match="whose arms are base, single, bank, lora"):
        bench(bank.path, str(base), BenchOptions(arms=("fused",)), silent)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_no_adapter_is_left_out_of_mixed_batches(rows: int, bank: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that takes few rows gets more batches, each with a row of the base model; one that takes a single row is told of."""
    batches: list[list[int]] = []
    start = Decoder.start

    def counted(self: Decoder, prompts: Sequence[list[int]]) -> list[np.ndarray]:
        batches.append([int(slot) for slot in self.choice.ids(len(prompts))])
        return start(self, prompts)

    monkeypatch.setattr(Decoder, "start", counted)
    monkeypatch.setattr(Decoder, "limits", property(lambda _: Limits(batch=rows), lambda *_: None), raising=False)
    assert bank.manifest.bank is not None
    vocabulary = int(bank.manifest.outputs[0].shape[-1])
    truth = Expected("prompt", [1, 2], [3, 4], *(np.zeros((4, vocabulary), np.float32) for _ in range(2)))
    result = mixed(bank, bank.manifest.bank, {slot: [truth] for slot in range(3)})
    seen = {slot for batch in batches for slot in batch}
    if rows == 1:
        assert not seen and result.causes[0].startswith("no mixed batch can be run: it takes 1 rows")
    else:
        assert seen == {0, 1, 2, BASE} and max(map(len, batches)) == rows
        assert all(BASE in batch for batch in batches)


def test_the_price_of_a_bank_is_that_of_its_worst_adapter() -> None:
    whole, parts = Report(LedgerReport()), []
    for name, moved, kl in (("a", 0.3, 0.01), ("b", 0.2, 0.09)):
        report = Report(LedgerReport(), price=Price(None, moved, kl, kl, 1.0, 0.0, 1.0), max_quantization_loss=0.05)
        join(whole, report, name)
        parts.append(report)
    assert whole.price is parts[1].price and whole.causes
