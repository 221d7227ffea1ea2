"""`taper report`: the figures on one HTML page that needs no network, and each as a PNG."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

import vl_convert

from taper.bench import evidence as ev
from taper.bench.charts import Figure, figures
from taper.bench.evidence import Evidence
from taper.core.types import ConfigError

_PNG_SCALE = 2.0
_SNIPPET = "window.vegaEmbed = vegaEmbed;"
_COLUMNS = (
    ("goodput_tok_s", "goodput, tok/s", 1.0, 0),
    ("raw_tok_s", "raw, tok/s", 1.0, 0),
    ("attainment", "attainment, %", 100.0, 0),
    ("attainment_serial", "serial, %", 100.0, 0),
    ("attainment_branching", "branching, %", 100.0, 0),
    ("ttft_p95_s", "TTFT p95, s", 1.0, 2),
    ("tpot_p95_s", "TPOT p95, ms", 1e3, 1),
    ("victim_tpot_p95_s", "victim TPOT p95, ms", 1e3, 1),
    ("itl_p99_s", "gap p99, ms", 1e3, 0),
    ("planner_p99_s", "planner p99, µs", 1e6, 0),
    ("predictor_mape", "MAPE, %", 100.0, 1),
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; } p { margin: .2rem 0 .8rem; color: #444; }
.figure { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: right; padding: .25rem .55rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { background: #f4f4f4; } td.word, th.word { text-align: left; } small { color: #777; }
"""


def write_report(paths: Sequence[Path], out: Path, png: Path | None) -> list[Path]:
    """Draw the evidence at `paths`; returns the files written. Raises ConfigError for evidence or places unfit."""
    evidence = ev.gather(paths)
    drawn = list(figures(evidence))
    written = [out]
    try:
        out.write_text(_page(evidence, drawn), encoding="utf-8")
        if png is not None:
            png.mkdir(parents=True, exist_ok=True)
            for figure in drawn:
                target = png / f"{figure.name}.png"
                target.write_bytes(vl_convert.vegalite_to_png(figure.chart.to_json(), scale=_PNG_SCALE))
                written.append(target)
    except OSError as error:
        raise ConfigError(f"report {out}: cannot be written: {error.strerror or error}") from error
    return written


def _page(evidence: Evidence, drawn: Sequence[Figure]) -> str:
    specs = {figure.name: json.loads(figure.chart.to_json()) for figure in drawn}
    # "</" inside a script could end it
    embedded = json.dumps(specs, separators=(",", ":")).replace("</", "<\\/")
    sections = "\n".join(
        f"<h2>{html.escape(figure.title)}</h2><p>{html.escape(figure.caption)}</p>"
        f'<div class="figure" id="{figure.name}"></div>'
        for figure in drawn
    )
    rejected = len(evidence.runs) - len(evidence.accepted)
    note = f"; {rejected} runs were rejected (the machine was busy with something else)" if rejected else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>TAPER: report</title><style>{_STYLE}</style></head><body>
<h1>TAPER: policies compared</h1>
<p>{len(evidence.accepted)} runs of {", ".join(map(html.escape, ev.policy_order(evidence.policies)))}{note}. Click a
policy in a legend to bring it out; point at a mark for its numbers.</p>
{_table(evidence)}
{sections}
<script>{vl_convert.javascript_bundle(_SNIPPET)}</script>
<script>
const specs = {embedded};
for (const [name, spec] of Object.entries(specs)) vegaEmbed("#" + name, spec, {{actions: {{source: false, editor: false,
compiled: false, export: true}}}});
</script>
</body></html>
"""


def _table(evidence: Evidence) -> str:
    """Medians with their range, a line per panel, load and policy."""
    order = ev.policy_order(evidence.policies)
    rows = sorted(ev.medians(evidence), key=lambda row: (row["panel"], row["load"], order.index(row["policy"])))
    axis = ev.abscissa(evidence.accepted)[0]
    head = "".join(
        f'<th class="word">{name}</th>' for name in ("conditions", "load" if axis == "load" else "req/s", "policy")
    )
    head += "".join(f"<th>{html.escape(title)}</th>" for _, title, _, _ in _COLUMNS)
    lines = []
    for row in rows:
        words = (row["panel"], f"{row['load']:.3g}", row["policy"])
        cells = "".join(f'<td class="word">{html.escape(word)}</td>' for word in words)
        cells += "".join(f"<td>{_cell(row, name, scale, digits)}</td>" for name, _, scale, digits in _COLUMNS)
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="figure"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _cell(row: ev.Row, name: str, scale: float, digits: int) -> str:
    if row[name] is None:
        return "-"
    text = f"{row[name] * scale:.{digits}f}"
    if row["rounds"] > 1:
        low, high = (row[name + end] * scale for end in ("_low", "_high"))
        text += f" <small>{low:.{digits}f}-{high:.{digits}f}</small>"
    return text
