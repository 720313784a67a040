"""Reports: one page without a network, JUnit that parses, a short comment; the causes are in each, and foreign text stays text."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from flora_export.artifact import Artifact
from flora_export.errors import ArtifactError
from flora_export.pipeline import BuildOptions, VerifyOptions, build, verify
from flora_export.verify.formats import junit, markdown, write_reports
from flora_export.verify.html import bench_page, verify_page
from flora_export.verify.numerics import TOLERANCES, Expected, Numerics, judge, measure
from flora_export.verify.report import Report
from tests.conftest import silent
from tests.families import make_adapter


@pytest.fixture(scope="module")
def verified(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Report]:
    return build(adapter, str(base), tmp_path_factory.mktemp("reports") / "out", BuildOptions(), silent)


@pytest.fixture(scope="module")
def failed(verified: tuple[Artifact, Report], base: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    other = make_adapter(base, tmp_path_factory.mktemp("reports") / "other", seed=5)
    return verify(verified[0].path, other, str(base), VerifyOptions(), silent)


def test_the_page_is_self_contained(verified: tuple[Artifact, Report], failed: Report) -> None:
    artifact, report = verified
    for each, verdict in ((report, "VERIFIED"), (failed, "FAILED")):
        page = verify_page(each, artifact)
        assert f"<h1>{verdict}</h1>" in page
        assert page.count("<svg") == 1
        assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", page)
        assert "<script" not in page
        assert "model.layers.1.mlp" in page
    assert "wrong adapter" in verify_page(failed, artifact)
    assert "near the context&#x27;s end" in verify_page(report, artifact)


def test_foreign_text_stays_text(verified: tuple[Artifact, Report]) -> None:
    artifact, report = verified
    evil = dataclasses.replace(report, first_divergence="<script>alert(1)</script>")
    assert "<script>" not in verify_page(evil, artifact)
    evil.ledger = dataclasses.replace(report.ledger, faults=["<b>\x00&"])
    ET.fromstring(junit(evil, "<out>"))  # our own text


def test_junit(verified: tuple[Artifact, Report], failed: Report) -> None:
    suite = ET.fromstring(junit(verified[1], "out"))
    assert (suite.get("tests"), suite.get("failures")) == ("11", "0")
    suite = ET.fromstring(junit(failed, "out"))
    assert int(suite.get("failures", "0")) >= 2
    messages = [failure.get("message", "") for failure in suite.iter("failure")]
    assert any("is not the checkpoint" in message for message in messages)
    assert any("wrong adapter" in message for message in messages)


def test_markdown(verified: tuple[Artifact, Report], failed: Report) -> None:
    assert markdown(verified[1], "out").startswith("### ✅ flora-export: `out` verified\n")
    text = markdown(failed, "out")
    assert text.startswith("### ❌ flora-export: `out` failed\n")
    assert "more causes" in text
    assert len(text.splitlines()) < 20


def test_files(verified: tuple[Artifact, Report], tmp_path: Path) -> None:
    artifact, report = verified
    write_reports(report, artifact, tmp_path / "r.json", tmp_path / "r.md", tmp_path / "r.xml")
    assert json.loads((tmp_path / "r.json").read_text())["verified"] is True
    write_reports(report, artifact, tmp_path / "r.html", None, None)
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_reports(report, artifact, tmp_path / "no" / "r.html", None, None)


def test_the_bench_page() -> None:
    def measurement(arm: str, ratio: float) -> dict[str, object]:
        numbers = {"median_ms": 20.0 * ratio, "p90_ms": 25.0, "min_ms": 19.0, "samples": 60, "ratio_to_base": ratio}
        return {"metric": "tpot", "tokens": 128, "batch": 1, "arm": arm, **numbers, "ratio_interval": [ratio - 0.01, ratio + 0.01]}

    result = {
        "what": "a <tiny> model",
        "measurements": [measurement("base", 1.0), measurement("fused", 1.02), measurement("lora", 1.25)],
        "bytes_ratio_to_base": {"fused": 1.02},
        "settings": {"threads": 2},
        "budget": {"verdict": "pass", "message": "fused is within the budget"},
        "environment": {"cpu": "a cpu", "versions": {"onnxruntime": "1"}},
        "command": "flora-export bench out",
    }
    page = bench_page(result, "out")
    assert "fused is within the budget" in page
    assert "a &lt;tiny&gt; model" in page
    assert page.count("<svg") == 1


def logits(seed: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((6, 50))).astype(np.float32)


def judged(got: np.ndarray, got_base: np.ndarray, floor: float | None = 1e-6, *, allow_vacuous: bool = False) -> list[str]:
    expected = Expected("case", [1, 2], [3, 4, 5, 6], logits(1), logits(2), floor, floor)
    result = Numerics("fp32", TOLERANCES["fp32"], "arrays", 4, [measure(expected, got, got_base, "case", 1)])
    return [cause.split(":")[0] for cause in judge(result, allow_vacuous=allow_vacuous)]


def test_judging_arrays() -> None:
    adapted, base = logits(1), logits(2)
    assert judged(adapted, base) == []
    assert judged(adapted + 1e-7, base) == []
    assert judged(adapted, base + 0.01) == ["wrong base"]
    assert judged(base, base)[0] == "missing adapter"
    assert judged(base + 1.01 * (adapted - base), base)[0] == "wrong adapter"
    assert judged(adapted * np.nan, base)[0] == "wrong adapter"
    assert judged(adapted, base * np.nan) == ["wrong base"]


def test_judging_greedy_tokens() -> None:
    """Another token is a failure where eager prefers its own clearly, and a tie where it does not."""
    adapted, base = logits(1), logits(2)
    best, second = adapted[3].argsort()[-1], adapted[3].argsort()[-2]
    other = adapted.copy()
    other[3, second] = other[3, best] + 1e-4
    assert any(cause.startswith("greedy decoding of case diverges") for cause in judged(other, base, None))
    tied = adapted.copy()
    tied[3, second] = tied[3, best]
    expected = Expected("case", [1, 2], [3, 4, 5, 6], tied, base, 1e-6, 1e-6)
    other = tied.copy()
    other[3, second] += 1e-7
    result = Numerics("fp32", TOLERANCES["fp32"], "arrays", 4, [measure(expected, other, base, "case", 1)])
    assert judge(result, allow_vacuous=False) == []


def test_judging_an_effect_that_the_precision_drowns() -> None:
    adapted, base = logits(1), logits(2)
    assert judged(adapted, base, 0.02)[0].startswith("vacuous in fp32")
    assert judged(adapted, base, 0.02, allow_vacuous=True) == []
