"""The verification report for machines and for reviewers: JSON, HTML, JUnit XML for a CI system, Markdown for a pull-request comment."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from flora_export.artifact import Artifact
from flora_export.errors import ArtifactError
from flora_export.verify.report import Report, quantized_facts


def write_reports(report: Report, artifact: Artifact, page: Path | None, comment: Path | None, cases: Path | None) -> None:
    """Write what is asked for: a page as HTML, or as JSON where its name does not end in .html; a comment; test cases.

    Raises:
        ArtifactError: a file cannot be written.
    """
    from flora_export.verify.html import verify_page

    texts: dict[Path, str] = {}
    if page is not None:
        texts[page] = verify_page(report, artifact) if page.suffix == ".html" else report.to_json()
    if comment is not None:
        texts[comment] = markdown(report, artifact.path.name)
    if cases is not None:
        texts[cases] = junit(report, artifact.path.name)
    for file, text in texts.items():
        write_text(file, text)


def write_bench(result: dict[str, Any], name: str, page: Path | None) -> None:
    """Write the result of a latency measurement, as HTML, or as JSON where the name does not end in .html. Raises ArtifactError."""
    from flora_export.verify.html import bench_page

    if page is not None:
        write_text(page, bench_page(result, name) if page.suffix == ".html" else json.dumps(result, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Raises ArtifactError where the file cannot be written."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be written ({error.strerror})") from error


def junit(report: Report, name: str) -> str:
    """One test case for the ledger, one for each run; a cause without a run of its own is a case by itself."""
    suite = ET.Element("testsuite", name=f"flora-export verify {name}")
    _case(suite, "ledger", report.ledger.faults)
    if report.replay_faults is not None:
        _case(suite, "golden vectors", report.replay_faults)
    if report.numerics is not None:
        causes = list(report.numerics.causes)
        for case in report.numerics.cases:
            own = [cause for cause in causes if f" in {case.name} " in cause or f" of {case.name} " in cause]
            causes = [cause for cause in causes if cause not in own]
            _case(suite, case.name, own)
        for cause in causes:
            _case(suite, cause.split(":")[0], [cause])
    if report.kernels is not None:
        _case(suite, "as it runs", report.kernels.causes)
    if report.price is not None:
        _case(suite, "price of quantization", report.price.causes(report.max_quantization_loss))
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(sum(case.find("failure") is not None for case in suite)))
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ET.Element, name: str, causes: list[str]) -> None:
    case = ET.SubElement(suite, "testcase", classname=suite.get("name", ""), name=name)
    if causes:
        failure = ET.SubElement(case, "failure", message=_printable(causes[0]))
        failure.text = _printable("\n".join(causes))


def _printable(text: str) -> str:
    """Without the control characters that XML has no place for."""
    return "".join(character for character in text if character.isprintable() or character == "\n")


def markdown(report: Report, name: str) -> str:
    """A short comment: the verdict, its causes, and one line of figures."""
    sign = "✅" if report.verified else "❌"
    lines = [f"### {sign} flora-export: `{name}` {report.verdict.lower()}", ""]
    lines += [f"- {cause}" for cause in report.causes[:5]]
    if len(report.causes) > 5:
        lines.append(f"- and {len(report.causes) - 5} more causes")
    if report.first_divergence is not None:
        lines.append(f"- first divergence: {report.first_divergence}")
    if report.causes:
        lines.append("")
    lines += ["| check | result |", "| --- | --- |"]
    lines.append(f"| ledger | {report.ledger.checked} slices bit for bit, {report.ledger.adapter_tensors} adapter tensors |")
    if report.numerics is not None:
        cases = report.numerics.cases
        lines.append(f"| base model alone | largest logit error {max(case.base_error for case in cases):.2e} |")
        lines.append(f"| with the adapter | largest logit error {max(case.logits_error for case in cases):.2e} |")
        lines.append(f"| adapter's own effect | relative error {max(case.effect_error for case in cases):.4%} |")
        agreement = min(case.top1_agreement for case in cases)
        lines.append(f"| next-token agreement | {agreement:.2%} of positions; KL at most {max(case.kl_max for case in cases):.2e} nats |")
    lines += [f"| {heading} | {fact} |" for heading, fact in quantized_facts(report).items()]
    return "\n".join(lines) + "\n"
