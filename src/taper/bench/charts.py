"""The figures of a report as Vega-Lite charts: one chart serves the page and the PNG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from taper.bench import evidence as ev
from taper.bench.evidence import Evidence, Row

# The same colour for a policy everywhere; told apart by people with colour-blindness (Okabe and Ito's set).
_COLOURS = {
    "stock": "#E69F00", "off": "#7f7f7f", "cap:2": "#56B4E9", "cap:5": "#0072B2", "eager": "#D55E00",
    "taper-paper": "#CC79A7", "taper": "#009E73",
}  # fmt: skip
_SPARE_COLOURS = ("#000000", "#8c564b", "#bcbd22", "#9467bd", "#17becf")
_KINDS = ("protected", "extra", "deferred")
_WIDTH, _HEIGHT = 420, 260
_MOST_COLUMNS = 2
_GREY = "#444"
_LINES = "split(datum.label, ', ')"  # the parts of a panel's name, one below the other: side by side they are cut
_PANEL_WIDTH = 125  # of the longest part
_TOLERANCE = 0.1  # of simulated against measured figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """`name` is its file name; `caption` says how to read it."""

    name: str
    title: str
    caption: str
    chart: Any


def figures(evidence: Evidence) -> Iterator[Figure]:
    """Those for which the evidence has data, in the order of a reader's questions."""
    order = ev.policy_order(evidence.policies)
    rows = ev.medians(evidence)
    axis = ev.abscissa(evidence.accepted)[1]
    swept = len({row["load"] for row in rows}) > 1 and not _one_load_per_panel(rows)
    compare = _against_load if swept else _by_panel
    yield Figure(
        name="goodput",
        title="Goodput",
        caption="Tokens of requests that met their SLO, per second. Median over rounds, bars from the lowest to the"
        " highest round; the dashed line is the bound that the latency law sets to any policy.",
        chart=compare(rows, order, axis, "goodput_tok_s", "goodput, tokens/s", None),
    )
    yield Figure(
        name="attainment",
        title="SLO attainment",
        caption="Share of requests that met their SLO; the dotted line is 95 %.",
        chart=compare(rows, order, axis, "attainment", "requests within the SLO", 0.95),
    )
    yield Figure(
        name="raw",
        title="Raw throughput",
        caption="All tokens per second, whether their request met its SLO or not.",
        chart=compare(rows, order, axis, "raw_tok_s", "throughput, tokens/s", None),
    )
    yield Figure(
        name="misses",
        title="Misses by cause",
        caption="Share of the judged requests that missed, by the first cause that applies.",
        chart=_misses(ev.misses(evidence), order, axis if swept else None),
    )
    if pairs := ev.pairs(evidence):
        yield Figure(
            name="validation",
            title="Simulated against measured",
            caption="Medians over rounds, one dot per load, share and policy; on the line the simulator was right, in"
            " the band within 10 %.",
            chart=_validation(pairs, order),
        )
    where, windows = ev.busiest(evidence)
    if windows and (spread := ev.distributions(evidence, windows)):
        yield Figure(
            name="latency",
            title=f"Latency distributions ({where})",
            caption="Share of requests below a latency. Effective TPOT is (last - first token) / (tokens - 1) over all"
            " branches; TTFT counts from the planned arrival; the gap is the 99th percentile between the chunks of a"
            " request's worst branch.",
            chart=_distributions(spread, order, next(iter(windows.values())).conditions.slo_tpot_s),
        )
    steps = ev.steps_of(evidence, windows) if windows else {}
    if steps:
        yield Figure(
            name="timeline",
            title=f"Width and slack over time ({where})",
            caption="Rows per step of each kind, stacked, and the least slack of a request, in one window per policy.",
            chart=_timeline(ev.timeline(steps), [policy for policy in order if policy in steps]),
        )
    if dots := ev.predictions(steps):
        yield Figure(
            name="prediction",
            title=f"Predicted against measured step time ({where})",
            caption="One dot per step; on the line the prediction was right.",
            chart=_prediction(dots, order),
        )


def _one_load_per_panel(rows: Sequence[Row]) -> bool:
    """Scenarios of the simulator each have a load of their own: nothing to draw a line through."""
    panels = {row["panel"] for row in rows}
    return len(panels) > 1 and len({(row["panel"], row["load"]) for row in rows}) == len(panels)


def _data(rows: Sequence[Row]) -> Any:
    return alt.Data(values=list(rows))  # type: ignore[no-untyped-call]


def _colour(order: Sequence[str]) -> alt.Color:
    spare = iter(_SPARE_COLOURS * len(order))
    colours = [_COLOURS.get(policy) or next(spare) for policy in order]
    return alt.Color("policy:N", scale=alt.Scale(domain=list(order), range=colours), title="policy")


def _legend_choice() -> Any:
    """Click a policy in the legend to bring it out."""
    return alt.selection_point(fields=["policy"], bind="legend")


def _dimmed(chosen: Any, on: float = 1.0, off: float = 0.12) -> Any:
    return alt.condition(chosen, alt.value(on), alt.value(off))


def _rule(**where: Any) -> Any:
    return alt.Chart().mark_rule(strokeDash=[2, 3], color=_GREY).encode(**where)


def _against_load(
    rows: Sequence[Row], order: Sequence[str], axis: str, name: str, title: str, goal: float | None
) -> Any:
    chosen, format_, scale = _legend_choice(), _number(name), _scale(name)
    loads = sorted({row["load"] for row in rows})
    x = alt.X(
        "load:Q",
        title=axis,
        scale=alt.Scale(type="log", nice=False, padding=20),
        axis=alt.Axis(values=loads, format="~g"),
    )
    y = alt.Y(f"{name}:Q", title=title, scale=scale, axis=alt.Axis(format=format_))
    base = alt.Chart().encode(x=x, color=_colour(order), opacity=_dimmed(chosen))
    tip = [
        alt.Tooltip("policy:N"),
        alt.Tooltip("load:Q", format="~g"),
        alt.Tooltip("rounds:Q"),
        *(alt.Tooltip(f"{name}{end}:Q", format=format_) for end in ("", "_low", "_high")),
    ]
    layers: list[Any] = [
        base.mark_line(strokeWidth=2).encode(y=y),
        base.mark_rule(strokeWidth=1.5).encode(y=alt.Y(f"{name}_low:Q", title=title), y2=f"{name}_high:Q"),
        base.mark_point(filled=True, size=55).encode(y=y, tooltip=tip),
    ]
    if name == "goodput_tok_s" and any(row["bound_tok_s"] for row in rows):
        bound = alt.Chart().mark_line(strokeDash=[6, 4], color=_GREY, strokeWidth=1.5)
        layers.insert(0, bound.encode(x=x, y=alt.Y("max(bound_tok_s):Q", title=title)))
    if goal is not None:
        layers.insert(0, _rule(y=alt.datum(goal)))
    layered = alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT).add_params(chosen)
    columns = min(_MOST_COLUMNS, len({row["panel"] for row in rows}))
    return layered.facet(facet=_panels(), columns=columns, data=_data(rows))


def _panels() -> alt.Facet:
    return alt.Facet("panel:N", title=None, header=alt.Header(labelExpr=_LINES, labelLimit=0))


def _by_panel(rows: Sequence[Row], order: Sequence[str], axis: str, name: str, title: str, goal: float | None) -> Any:
    chosen, format_ = _legend_choice(), _number(name)
    base = alt.Chart().encode(
        x=alt.X("panel:N", title=None, axis=alt.Axis(labelAngle=0, labelExpr=_LINES, labelLimit=0)),
        xOffset=alt.XOffset("policy:N", sort=list(order)),
        opacity=_dimmed(chosen),
    )
    y = alt.Y(f"{name}:Q", title=title, axis=alt.Axis(format=format_), scale=_scale(name))
    tip = [alt.Tooltip("panel:N"), alt.Tooltip("policy:N"), alt.Tooltip(f"{name}:Q", format=format_)]
    layers: list[Any] = [
        base.mark_bar().encode(y=y, color=_colour(order), tooltip=tip),
        base.mark_rule(color="#222").encode(y=alt.Y(f"{name}_low:Q", title=title), y2=f"{name}_high:Q"),
    ]
    if goal is not None:
        layers.append(_rule(y=alt.datum(goal)))
    width = max(_WIDTH, 18 * len(rows) + 60, _PANEL_WIDTH * len({row["panel"] for row in rows}))
    layered = alt.layer(*layers, data=_data(rows)).properties(width=width, height=_HEIGHT)
    return layered.add_params(chosen)


def _number(name: str) -> str:
    return ".0%" if name.startswith("attainment") else ",.0f"


def _scale(name: str) -> alt.Scale:
    return alt.Scale(domain=[0, 1]) if name.startswith("attainment") else alt.Scale(zero=True)


def _misses(rows: Sequence[Row], order: Sequence[str], axis: str | None) -> Any:
    """A column per load, or, where every panel has one load (`axis` None), the panels side by side."""
    causes = alt.Scale(domain=["error", "ttft", "tpot"], range=["#000000", "#E69F00", "#D55E00"])
    chart = (
        alt.Chart(_data(rows))
        .mark_bar()
        .encode(
            x=alt.X("policy:N", sort=list(order), title=None, axis=alt.Axis(labelAngle=-45)),
            y=alt.Y("share:Q", title="requests that missed", axis=alt.Axis(format=".0%")),
            color=alt.Color("cause:N", title="cause", scale=causes),
            tooltip=[alt.Tooltip("policy:N"), alt.Tooltip("cause:N"), alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(width=max(90, 24 * len(order)), height=150)
    )
    if axis is None:
        return chart.facet(facet=_panels(), columns=2 * _MOST_COLUMNS)
    load = alt.Column("load:O", title=axis, header=alt.Header(format="~g"))
    beside = alt.Header(labelExpr=_LINES, labelLimit=0, labelAngle=0, labelAlign="left")
    return chart.encode(column=load, row=alt.Row("panel:N", title=None, header=beside))


def _validation(rows: Sequence[Row], order: Sequence[str]) -> Any:
    chosen = _legend_choice()

    def one(name: str, title: str) -> Any:
        measured, simulated = f"{name}_measured", f"{name}_simulated"
        most = 1.0 if name == "attainment" else 1.05 * max(max(row[measured], row[simulated]) for row in rows)
        ends = [{"at": at, "low": at * (1 - _TOLERANCE), "high": at * (1 + _TOLERANCE)} for at in (0.0, most)]
        line = alt.Chart(_data(ends)).encode(x="at:Q")
        scale, number = alt.Scale(domain=[0, most], nice=False), alt.Axis(format=_number(name))
        dots = (
            alt.Chart(_data(rows))
            .mark_point(filled=True, size=55, clip=True)
            .encode(
                x=alt.X(f"{measured}:Q", title=f"{title}, measured", scale=scale, axis=number),
                y=alt.Y(f"{simulated}:Q", title=f"{title}, simulated", scale=scale, axis=number),
                color=_colour(order),
                opacity=_dimmed(chosen),
                tooltip=[
                    *(alt.Tooltip(field, format="~g") for field in ("load:Q", "share:Q")),
                    alt.Tooltip("policy:N"),
                    *(alt.Tooltip(f"{field}:Q", format=_number(name)) for field in (measured, simulated)),
                ],
            )
        )
        band = line.mark_area(color="#ddd", clip=True).encode(y="low:Q", y2="high:Q")
        diagonal = line.mark_line(color=_GREY, strokeDash=[6, 4]).encode(y="at:Q")
        return alt.layer(band, diagonal, dots).properties(width=_WIDTH - 60, height=_WIDTH - 60)

    return alt.hconcat(one("goodput_tok_s", "goodput, tokens/s").add_params(chosen), one("attainment", "attainment"))


def _distributions(rows: Sequence[Row], order: Sequence[str], slo_s: float | None) -> Any:
    chosen = _legend_choice()

    def one(figure: str, field: str, title: str, marked: float | None) -> Any:
        tip = [
            alt.Tooltip("policy:N"),
            alt.Tooltip("share:Q", format=".0%"),
            alt.Tooltip(f"{field}:Q", format=".3~g"),
        ]
        lines = (
            alt.Chart(_data([row for row in rows if row["figure"] == figure]))
            .mark_line(strokeWidth=2, clip=True)
            .encode(
                x=alt.X(f"{field}:Q", title=title, scale=alt.Scale(zero=False)),
                y=alt.Y("share:Q", title="share of requests below", axis=alt.Axis(format=".0%")),
                color=_colour(order),
                opacity=_dimmed(chosen),
                order="share:Q",
                tooltip=tip,
            )
        )
        marks = [] if marked is None else [_rule(x=alt.datum(marked))]
        return alt.layer(lines, *marks).properties(width=300, height=_HEIGHT)

    slo_ms = None if slo_s is None else slo_s * ev.MS_PER_S
    return alt.hconcat(
        one("TPOT", "ms", "effective TPOT, ms (dotted: SLO)", slo_ms).add_params(chosen),
        one("TTFT", "seconds", "time to first token, s", None),
        one("gap", "ms", "gap between chunks, p99, ms", None),
    )


def _timeline(rows: Sequence[Row], order: Sequence[str]) -> Any:
    parts: list[Any] = []
    kinds = alt.Scale(domain=list(_KINDS), range=["#0072B2", "#009E73", "#cccccc"])
    x = alt.X("time_s:Q", title="time in the window, s")
    for policy in order:
        mine = [row for row in rows if row["policy"] == policy]
        areas = (
            alt.Chart(_data([row for row in mine if row["kind"] != "slack"]), title=policy)
            .mark_area()
            .encode(
                x=x,
                y=alt.Y("rows:Q", title="rows, mean per step"),
                color=alt.Color("kind:N", title="rows", scale=kinds),
                order=alt.Order("order:Q"),
            )
        )
        row = [areas]
        if slacks := [one for one in mine if one["kind"] == "slack"]:  # off and eager look at none
            row.append(
                alt.Chart(_data(slacks), title=f"{policy}: least slack")
                .mark_line(color="#D55E00")
                .encode(
                    x=x,
                    y=alt.Y("ms:Q", title="slack, ms"),
                    tooltip=[alt.Tooltip("time_s:Q", format=".1f"), alt.Tooltip("ms:Q", format=".1f")],
                )
            )
        parts.append(alt.hconcat(*(one.properties(width=440, height=120) for one in row)))
    return alt.vconcat(*parts)


def _prediction(rows: Sequence[Row], order: Sequence[str]) -> Any:
    chosen = _legend_choice()
    measured = sorted(row["measured_ms"] for row in rows)
    # A rare stall would press everything else into a corner; it is drawn at the edge.
    most = 1.05 * max(measured[int(0.99 * (len(measured) - 1))], *(row["predicted_ms"] for row in rows))
    scale = alt.Scale(domain=[0, most], clamp=True)
    tip = ["policy:N", "rows:Q", "prefill_tokens:Q"]
    dots = (
        alt.Chart(_data(rows))
        .mark_circle(size=18)
        .encode(
            x=alt.X("predicted_ms:Q", title="predicted step time, ms", scale=scale),
            y=alt.Y("measured_ms:Q", title="measured step time, ms", scale=scale),
            color=_colour(order),
            opacity=_dimmed(chosen, 0.55, 0.03),
            tooltip=[*tip, *(alt.Tooltip(f"{name}_ms:Q", format=".1f") for name in ("predicted", "measured"))],
        )
    )
    diagonal = alt.Chart(_data([{"at": 0}, {"at": most}])).mark_line(color=_GREY, strokeDash=[6, 4])
    layered = alt.layer(diagonal.encode(x="at:Q", y="at:Q"), dots)
    return layered.properties(width=_WIDTH, height=_WIDTH).add_params(chosen)
