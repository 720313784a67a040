"""Self-contained HTML reports: a verdict on top, plots, tables, the ledger, the environment. No network, no script."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from flora_export.artifact import Artifact
from flora_export.errors import BackendError
from flora_export.verify.report import Report, quantized_facts

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2433; background: #fff; max-width: 80rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; } p { margin: .3rem 0; }
.verdict { border-left: .5rem solid; padding: .8rem 1.2rem; border-radius: .3rem; margin: 1rem 0; }
.good { border-color: #2f855a; background: #f0faf4; } .bad { border-color: #c53030; background: #fff5f5; }
.unsure { border-color: #b7791f; background: #fffbea; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .8rem; width: 100%; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #e4e8ef; white-space: nowrap; }
th { color: #56607a; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
details { margin: .5rem 0; } summary { cursor: pointer; color: #2b5ea8; } code { font-size: .85em; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots svg { max-width: 100%; height: auto; } .muted { color: #56607a; }
"""
COLOURS = ("#2b5ea8", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568", "#b7791f", "#2c7a7b", "#9b2c2c", "#718096")


def verify_page(report: Report, artifact: Artifact) -> str:
    """The report of a verification."""
    manifest = artifact.manifest
    kind = "good" if report.verified else "bad" if report.causes else "unsure"
    title = f"flora-export: {artifact.path.name}: {report.verdict}"
    causes = "".join(f"<p>{escaped(cause)}</p>" for cause in report.causes[:30])
    where = f"<p>First divergence: {escaped(report.first_divergence)}</p>" if report.first_divergence else ""
    about = f"{manifest.backend}, {manifest.target}, {manifest.precision}, fused: {manifest.fuse}; base {manifest.base['name']}"
    parts = [f'<p class="muted">{escaped(about)}</p><div class="verdict {kind}"><h1>{escaped(report.verdict)}</h1>{causes}{where}</div>']
    if report.numerics is not None:
        parts += _numerics(report)
    parts += [f"<p>{escaped(heading.capitalize())}: {escaped(fact)}</p>" for heading, fact in quantized_facts(report).items()]
    records = [[b.block, str(b.rank), f"{b.scale:g}", b.activation, b.fusion, b.reason] for b in manifest.blocks]
    parts.append(
        f"<h2>Ledger</h2><p>{report.ledger.checked} slices checked bit for bit, {report.ledger.adapter_tensors} adapter tensors.</p>"
    )
    parts.append(_folded("Blocks", ("block", "rank", "scale", "activation", "fusion", "reason"), records))
    changes = [[c.tensor, c.what, str(c.rank or "-"), f"{c.scale:g}", ", ".join(c.sources)] for c in manifest.changes]
    if changes:
        parts.append(_folded("Changed weights", ("tensor", "change", "rank", "scale", "by"), changes))
    rows = [[e.tensor, e.initializer, str(e.axis), f"{e.start}:{e.stop}", f"{e.scale:g}", e.sha256[:12]] for e in manifest.ledger]
    parts.append(_folded("Tensors", ("tensor", "initializer", "axis", "slice", "scale", "SHA-256"), rows))
    parts.append(_environment(report.environment | {f"built with {k}": v for k, v in manifest.versions.items()}))
    return page(title, parts)


def _numerics(report: Report) -> list[str]:
    numerics = report.numerics
    assert numerics is not None
    head = (
        "case",
        "batch",
        "past",
        "base error",
        "logit error",
        "allowed",
        "floor",
        "× floor",
        "from eager fp32",
        "mean",
        "KL max",
        "top-1",
        "effect error",
        "allowed",
        "× floor",
    )
    rows = []
    for case in numerics.cases:
        floors = [_floors(case.logits_error, case.floor_logits), _floors(case.effect_error, case.floor_effect)]
        errors = [f"{case.base_error:.2e}", f"{case.logits_error:.2e}", f"{numerics.allowed_logits(case):.2e}", _figure(case.floor_logits)]
        errors += [floors[0], _figure(case.from_eager)]
        spread = [f"{case.mean_error:.1e}", f"{case.kl_max:.1e}", f"{case.top1_agreement:.2%}"]
        effect = [f"{case.effect_error:.4%}", f"{numerics.allowed_effect(case):.4%}", floors[1]]
        rows.append([case.name, str(case.batch), f"{case.past[0]}-{case.past[1]}", *errors, *spread, *effect])
    intro = (
        f"{numerics.precision} against PyTorch in fp64; {numerics.prompts}. Allowed are {numerics.tolerance.multiple:g} noise floors, "
        f"which are what eager PyTorch in {numerics.precision} is off by."
        + (" Quick: the prompts ran as one batch, not each by itself." if numerics.quick else "")
    )
    return [f"<h2>Numbers</h2><p>{escaped(intro)}</p>", _plots(report), table(head, rows)]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"


def _floors(error: float, floor: float | None) -> str:
    return f"{error / floor:.1f}" if floor else "–"


def _plots(report: Report) -> str:
    plt = _matplotlib()
    numerics = report.numerics
    assert numerics is not None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    alone = [case for case in numerics.cases if not case.name.startswith("ragged")]
    for colour, case in zip(COLOURS, alone, strict=False):
        allowed = numerics.allowed_logits(case)
        left.plot([max(e / allowed, 1e-9) for e in case.error_per_step], color=colour, label=case.name, lw=1.3)
    left.axhline(1.0, color="#c53030", lw=1, ls="--", label="allowed")
    left.set(yscale="log", xlabel="decode step", ylabel="largest logit error / allowed", title="Error per step")
    left.legend(fontsize=7, frameon=False, ncols=2)
    for colour, kind in zip(COLOURS, ("self_attn", "mlp"), strict=False):
        blocks = [block for block in report.blocks if block.block.endswith(kind)]
        right.plot([b.layer for b in blocks], [max(b.error / b.allowed, 1e-9) for b in blocks], "o-", ms=3, lw=1, color=colour, label=kind)
    right.axhline(1.0, color="#c53030", lw=1, ls="--", label="allowed")
    right.set(yscale="log", xlabel="layer", ylabel="error of the block's output / allowed", title="Error per layer")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend(fontsize=7, frameon=False)
    return _svg(figure)


def bench_page(result: dict[str, Any], name: str) -> str:
    """The report of a latency measurement, from the result of `bench`."""
    budget = result["budget"]
    kind = {"pass": "good", "fail": "bad", "inconclusive": "unsure"}.get(budget["verdict"] if budget else "", "unsure")
    verdict, message = (budget["verdict"].upper(), budget["message"]) if budget else ("MEASURED", "No budget was set (--max-overhead).")
    box = f'<div class="verdict {kind}"><h1>{escaped(verdict)}</h1><p>{escaped(message)}</p></div>'
    parts = [f'<p class="muted">{escaped(result["what"])}</p>{box}', _bench_plot(result)]
    rows = []
    for m in result["measurements"]:
        interval = f"{m['ratio_interval'][0]:.3f} – {m['ratio_interval'][1]:.3f}" if m["ratio_interval"] else "–"
        ratio = f"{m['ratio_to_base']:.3f}" if m["ratio_to_base"] else "–"
        numbers = [f"{m['median_ms']:.2f}", f"{m['p90_ms']:.2f}", str(m["samples"]), ratio, interval]
        rows.append([f"{m['metric']} {m['tokens']}", m["arm"], str(m["batch"]), *numbers])
    parts.append(
        "<h2>Measurements</h2>"
        + table(("metric, tokens", "arm", "batch", "median ms", "p90 ms", "samples", "ratio to base", "95 % interval"), rows)
    )
    environment = {key: str(value) for key, value in result["environment"].items() if key != "versions"} | result["environment"]["versions"]
    parts.append(
        _environment({"command": result["command"], **{f"setting {k}": str(v) for k, v in result["settings"].items()}, **environment})
    )
    return page(f"{name}: latency", parts)


def _bench_plot(result: dict[str, Any]) -> str:
    plt = _matplotlib()
    shown = [m for m in result["measurements"] if m["ratio_to_base"] and m["arm"] not in ("base", "eager")]
    groups = list(dict.fromkeys((m["metric"], m["tokens"], m["batch"]) for m in shown))
    figure, axes = plt.subplots(1, max(1, len(groups)), figsize=(3.7 * max(1, len(groups)), 2.9), layout="constrained", squeeze=False)
    for axis, group in zip(axes[0], groups, strict=False):
        rows = [m for m in shown if (m["metric"], m["tokens"], m["batch"]) == group]
        for place, m in enumerate(reversed(rows)):
            low, high = m["ratio_interval"]
            axis.plot([low, high], [place, place], color=COLOURS[0], lw=2.5, alpha=0.45, solid_capstyle="butt")
            axis.plot(m["ratio_to_base"], place, "o", color=COLOURS[0], ms=5)
            axis.annotate(
                f"{m['ratio_to_base']:.2f}", (m["ratio_to_base"], place), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7
            )
        axis.axvline(1.0, color="#4a5568", lw=1)
        if "fused" in result["bytes_ratio_to_base"]:
            axis.axvline(result["bytes_ratio_to_base"]["fused"], color="#2f855a", lw=1, ls="--", label="bytes of fused")
            axis.legend(fontsize=7, frameon=False, loc="lower right")
        axis.set_yticks(range(len(rows)), [m["arm"] for m in reversed(rows)])
        axis.set(
            title=f"{group[0].upper() if group[0] != 'total' else 'total'}, {group[1]} tokens, batch {group[2]}", xlabel="ratio to base"
        )
        axis.margins(x=0.12, y=0.25)
        axis.title.set_fontsize(9)
    return _svg(figure)


def _matplotlib() -> Any:
    try:
        import matplotlib as mpl

        mpl.use("svg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise BackendError(f"HTML reports need matplotlib ({error}): pip install 'flora-export[report]'") from error
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "flora-export", "font.size": 9})
    return plt


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    _matplotlib().close(figure)
    return f'<div class="plots">{text.getvalue()[text.getvalue().index("<svg") :]}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], links: Sequence[str] = ()) -> str:
    """A table. `links`: where the first cell of each row leads, a relative path."""
    first = [f'<a href="{escaped(quote(link))}">{escaped(row[0])}</a>' for row, link in zip(rows, links, strict=True)] if links else []
    shown = [[*first[place : place + 1], *map(escaped, row[len(first) and 1 :])] for place, row in enumerate(rows)]
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in shown)
    return f'<div class="wide"><table><tr>{"".join(f"<th>{escaped(cell)}</th>" for cell in head)}</tr>{cells}</table></div>'


def _folded(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<details><summary>{escaped(title)} ({len(rows)})</summary>{table(head, rows)}</details>"


def _environment(values: dict[str, str]) -> str:
    return "<h2>Environment</h2>" + _folded("Versions and machine", ("what", "value"), [[key, value] for key, value in values.items()])


def page(title: str, parts: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escaped(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def escaped(value: str) -> str:
    return html.escape(str(value))
