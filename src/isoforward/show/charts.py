"""Marks in Vega-Lite: one colour a phase, whiskers for intervals, names beside what they name."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isoforward.base import units
from isoforward.base.vocabulary import BESIDE, WHOLES

if TYPE_CHECKING:
    import altair as alt

# Okabe and Ito's colours, told apart by every kind of eye. A forward is blue in both lives.
BLUE, SKY, GREEN, ORANGE, RED, PINK, YELLOW = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
    "#F0E442",
)
PHASE_COLOURS = dict.fromkeys(BESIDE + WHOLES, "#8A9099") | {
    "forward": BLUE,
    "loss": PINK,
    "backward": RED,
    "optimizer": ORANGE,
    "prefill": SKY,
    "decode": GREEN,
    "sampling": YELLOW,
    "old policy": "#6F9FD8",  # a forward, of which nothing is kept
    "reference policy": "#A8C4E6",
}
LIGHT = {"paper": "#ffffff", "ink": "#1b1f24", "muted": "#59636e", "line": "#d5dae0", "other": "#a3abb3"}
DARK = {"paper": "#14171b", "ink": "#e9ecef", "muted": "#9da7b1", "line": "#353c44", "other": "#6f7882"}
PAPER, INK, MUTED, LINE, OTHER = (f"var(--{name})" for name in LIGHT)  # the page's, by day or by night
INK_ON = dict.fromkeys((BLUE, RED, GREEN), "#ffffff") | {LINE: INK, MUTED: PAPER}
BASELINE = {"grid": False, "domain": True, "domainColor": LINE}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
DASHES = [[1, 0], [7, 4], [2, 3], [11, 3, 2, 3], [14, 5], [4, 2]]
PLAIN = ".6~r"  # d3 rounds to one digit on a logarithmic axis unless told how many
LANE = 58  # of a bar with its heading
DECADES = [10.0**k for k in range(-15, 25)]

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """`title` says what is seen; `table` holds what is drawn, with units in the names of its columns."""

    name: str
    title: str
    spec: Record
    table: list[Record]

    def png(self, *, scale: float = 2.0) -> bytes:
        import vl_convert

        made: bytes = vl_convert.vegalite_to_png(self.by_day(), vl_version=vega_lite(), scale=scale)
        return made

    def svg(self) -> str:
        import vl_convert

        made: str = vl_convert.vegalite_to_svg(self.by_day(), vl_version=vega_lite())
        return made

    def by_day(self, width: int = 720) -> str:
        """The specification in light colours, with the title in it."""
        title = {"text": textwrap.wrap(self.title, width // 9), "anchor": "start", "offset": 14}
        text = json.dumps(self.spec | {"width": width, "background": PAPER, "padding": 16, "title": title})
        return re.sub(r"var\(--(\w+)\)", lambda found: LIGHT[found[1]], text)


def vega_lite() -> str:
    """The version that the specifications are written in."""
    import altair

    return ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    colour: str
    size: float
    said: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """`label` and `total` stand above it; `ends` are its whiskers; `tick` is another way to its size."""

    label: str
    total: str
    parts: list[Part]
    ends: tuple[float, float] | None = None
    tick: float | None = None

    @property
    def size(self) -> float:
        return sum(part.size for part in self.parts)


def bars(lanes: Sequence[Bar], *, unit: str, legend: Sequence[str]) -> dict[str, object]:
    """Stacked, from zero. A bar that would dwarf the rest is cut, visibly, and keeps its number."""
    import altair as alt

    sizes = sorted(max(bar.size, bar.tick or 0.0) for bar in lanes)
    whole = max(size for size in sizes if size <= 5 * sizes[len(sizes) // 2]) if len(sizes) > 2 else sizes[-1]
    reach = max([whole, *(bar.ends[1] for bar in lanes if bar.ends and bar.size <= whole)])
    limit = (1.3 if whole < sizes[-1] else 1.01) * min(reach, 1.5 * whole)  # marks beyond it are clipped
    drawn: list[Record] = []
    cuts: list[Record] = []
    for lane, bar in enumerate(lanes):
        cut = bar.size > whole
        start = 0.0
        for part in bar.parts:
            end = limit * (0.95 + 0.05 * bar.size / sizes[-1]) if cut else start + part.size
            share = f"{part.size / bar.size:.0%}" if len(bar.parts) > 1 else ""
            drawn.append(
                {"lane": lane, "start": start, "end": end, "middle": (start + end) / 2, "room": (end - start) / limit}
                | {"part": part.name, "said": part.said, "share": share, "label": share and f"{part.name} {share}"}
                | {"ink": INK_ON.get(part.colour, "#1b1f24")}
            )
            start = end
        if bar.ends and len(bar.parts) > 1 and not cut:  # a label makes room for the whiskers
            last = drawn[-1]
            last |= {"middle": (last["start"] + bar.ends[0]) / 2, "room": (bar.ends[0] - last["start"]) / limit}
        if cut:
            cuts.append({"lane": lane, "at": 0.85 * limit})
    whiskers = [
        {"lane": lane, "start": bar.ends[0], "end": bar.ends[1]}
        for lane, bar in enumerate(lanes)
        if bar.ends and bar.size <= whole
    ]
    small = [
        {"lane": lane, "at": max(bar.size, bar.tick or 0.0), "said": ", ".join(f"{p.name} {p.said}" for p in bar.parts)}
        for lane, bar in enumerate(lanes)
        if len(bar.parts) > 1 and bar.size < limit / 10
    ]
    ticks = [{"lane": lane, "at": bar.tick} for lane, bar in enumerate(lanes) if bar.tick is not None]
    colours = {part.name: part.colour for bar in lanes for part in bar.parts}
    y = lane_axis(len(lanes))
    x = alt.X(
        "start:Q",
        scale=alt.Scale(domain=[0, limit], nice=False),
        axis=alt.Axis(title=unit, values=round_steps(whole), format=PLAIN, **BASELINE),
    )
    colour = alt.Color(
        "part:N",
        scale=alt.Scale(domain=list(colours), range=list(colours.values())),
        legend=alt.Legend(values=list(legend), columns=4 if len(legend) <= 4 else 3) if legend else None,
    )
    tooltip = [alt.Tooltip("part:N", title="part"), alt.Tooltip("said:N", title="takes")]
    chart = alt.Chart(data(drawn))
    layers = [
        chart.mark_bar(height=24, yOffset=11).encode(x=x, x2="end:Q", y=y, color=colour, tooltip=tooltip),
        *headings([(bar.label, bar.total) for bar in lanes], reserved=165),
        chart.transform_calculate(
            fits="datum.room * width > datum.label.length * 7 + 8 ? datum.label"
            " : datum.room * width > 34 ? datum.share : ''"
        )
        .mark_text(dy=11, fontSize=12)
        .encode(x="middle:Q", y=y, text="fits:N", color=alt.Color("ink:N", scale=None)),
        alt.Chart(data(whiskers))
        .mark_rule(yOffset=11, strokeWidth=2, color=INK, clip=True)
        .encode(x="start:Q", x2="end:Q", y=y),
        alt.Chart(data(ticks)).mark_tick(thickness=3, size=36, yOffset=11, color=INK, opacity=1).encode(x="at:Q", y=y),
        alt.Chart(data(small))
        .mark_text(align="left", dx=8, dy=12, fontSize=12, color=MUTED, limit=alt.ExprRef("width - 40"))
        .encode(x="at:Q", y=y, text="said:N"),
        alt.Chart(data(cuts))
        .mark_text(text="//", dy=10, fontSize=32, fontWeight="bold", color=PAPER)
        .encode(x="at:Q", y=y),
    ]
    return themed(alt.layer(*layers), height=LANE * len(lanes))


def dots(marks: Sequence[Record], *, unit: str, per: str, ratios: bool = False) -> dict[str, object]:
    """One a lane, `series` and `said` above it, with its whiskers, on a scale that shows the least of them.

    `ratios` have a line at 1, and a scale on which twice is as far from it as half.
    """
    import altair as alt

    marks, unit = rescaled(marks, unit)
    scale = alt.Scale(type="log", nice=False, padding=12) if ratios else span(marks)
    drawn = [mark | {"lane": lane} for lane, mark in enumerate(marks)]
    ticks = {"values": ratio_ticks(marks)} if ratios else {"tickCount": 5, **decades(scale)}
    axis = alt.Axis(title=f"{unit} {per}".strip(), format=PLAIN, **BASELINE, **ticks)
    chart = alt.Chart(data(drawn)).encode(y=lane_axis(len(marks)), color=alt.Color("colour:N", scale=None))
    x = alt.X("value:Q", scale=scale, axis=axis)
    layers = [
        chart.mark_rule(yOffset=11, strokeWidth=2).encode(x=alt.X("low:Q", scale=scale), x2="high:Q"),
        chart.mark_point(filled=True, size=90, opacity=1, yOffset=11).encode(
            x=x, tooltip=[alt.Tooltip("series:N", title="what"), alt.Tooltip("told:N", title="is")]
        ),
        *headings([(mark["series"], mark["said"]) for mark in marks], reserved=100, crossed=ratios),
    ]
    if ratios:
        line = alt.Chart(data([{"even": 1}])).mark_rule(color=MUTED, strokeDash=[4, 4])
        layers.insert(0, line.encode(x=alt.X("even:Q", scale=scale, axis=axis)))
    return themed(alt.layer(*layers), height=(LANE - 12) * len(marks))


def curves(marks: Sequence[Record], *, x_title: str, unit: str, per: str) -> dict[str, object]:
    """Colour by `phase`, dashes by `variant`; up to four lines carry their name at their end, more have a legend."""
    import altair as alt

    marks, unit = rescaled(marks, unit)
    scale = span(marks)
    across = sorted({mark["x"] for mark in marks})
    doubling = across[0] > 0 and across[-1] >= 8 * across[0]
    labels = {"values": across} if len(across) <= 10 else {}
    last = list({mark["series"]: mark for mark in sorted(marks, key=lambda mark: mark["x"])}.values())
    x = alt.X(
        "x:Q",
        scale=alt.Scale(type="log", base=2, nice=False) if doubling else alt.Scale(zero=False),
        axis=alt.Axis(title=x_title, grid=False, format=".3~s" if across[-1] >= 1e5 else PLAIN, **labels),
    )
    y = alt.Y("value:Q", scale=scale, axis=alt.Axis(title=f"{unit} {per}", format=PLAIN, tickCount=5, **decades(scale)))
    phases, variants = (list(dict.fromkeys(mark[key] for mark in marks)) for key in ("phase", "variant"))
    listed = alt.Legend(columns=3, symbolType="stroke", symbolStrokeWidth=3, labelLimit=300)
    many = len(last) > 4
    colour = alt.Color(
        "phase:N",
        scale=alt.Scale(domain=phases, range=[PHASE_COLOURS[phase] for phase in phases]),
        legend=listed if many and len(phases) > 1 else None,
    )
    dash = alt.StrokeDash(
        "variant:N",
        scale=alt.Scale(domain=variants, range=DASHES),
        legend=listed if many and len(variants) > 1 else None,
    )
    chart = alt.Chart(data(marks)).encode(x=x, color=colour, detail="series:N")
    told = [
        alt.Tooltip("series:N", title="what"),
        alt.Tooltip("x:Q", title=x_title),
        alt.Tooltip("told:N", title="is"),
    ]
    layers = [
        chart.mark_line(strokeWidth=2.5).encode(y=y, strokeDash=dash),
        chart.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q", scale=scale), y2="high:Q"),
        chart.mark_point(filled=True, size=70, opacity=1).encode(y=y, tooltip=told),
    ]
    if not many:
        ends = alt.Chart(data(last)).encode(x=x, y=y, text="series:N")
        layers += haloed(ends, align="right", dy=-14, fontSize=13, fontWeight="bold", limit=260)
    return themed(alt.layer(*layers), height=300)


def headings(texts: Iterable[tuple[str, str]], *, reserved: int, crossed: bool = False) -> list[object]:
    """Above each lane, at both its ends; the right one has `reserved` pixels, and the left one may be `crossed`."""
    import altair as alt

    rows = [{"lane": lane, "left": left, "right": right} for lane, (left, right) in enumerate(texts)]
    chart = alt.Chart(data(rows)).encode(y=lane_axis(len(rows)))
    left = chart.encode(x=alt.value(0), text="left:N")
    style = {"align": "left", "dy": -13, "fontSize": 13, "limit": alt.ExprRef(f"width - {reserved}")}
    return [
        *(haloed(left, **style) if crossed else [left.mark_text(color=INK, **style)]),
        chart.mark_text(align="right", dy=-13, fontSize=13, fontWeight="bold", color=INK, limit=reserved).encode(
            x=alt.value("width"), text="right:N"
        ),
    ]


def haloed(chart: alt.Chart, **text: object) -> list[alt.Chart]:
    """Text that stays legible over lines."""
    return [chart.mark_text(stroke=PAPER, strokeWidth=5, color=PAPER, **text), chart.mark_text(color=INK, **text)]


def lane_axis(count: int) -> object:
    import altair as alt

    return alt.Y("lane:O", axis=None, scale=alt.Scale(domain=list(range(count)), padding=0))


def decade_axis(channel: Any, field: str, title: str, *, ends: Sequence[float] | None = None, **axis: Any) -> Any:
    """A logarithmic one, labelled at powers of ten, from one of `ends` to the other."""
    import altair as alt

    bounds = {} if ends is None else {"domain": list(ends), "nice": False}
    return channel(field, scale=alt.Scale(type="log", **bounds), axis=alt.Axis(title=title, values=DECADES, **axis))


def span(marks: Sequence[Record]) -> object:
    """From zero, unless that would hide the least behind the greatest."""
    import altair as alt

    least, greatest = min(mark["low"] for mark in marks), max(mark["high"] for mark in marks)
    return alt.Scale(type="log") if least > 0 and greatest >= 20 * least else alt.Scale(zero=True)


def decades(scale: alt.Scale) -> Record:
    return {"values": DECADES} if scale.to_dict().get("type") == "log" else {}


def ratio_ticks(marks: Sequence[Record]) -> list[float]:
    """Tenths where the ratios are near each other."""
    near = max(mark["high"] for mark in marks) < 4 * min(mark["low"] for mark in marks)
    return [n / 10 for n in range(1, 50)] if near else [n * 10.0**k for k in range(-3, 4) for n in (1, 2, 5)]


def rescaled(marks: Sequence[Record], unit: str) -> tuple[list[Record], str]:
    size, name = on_axis(unit, max(abs(mark["value"]) for mark in marks))
    return [mark | {key: mark[key] / size for key in ("value", "low", "high")} for mark in marks], name


def on_axis(unit: str, largest: float) -> tuple[float, str]:
    """What to divide values by, and the unit that they then have."""
    steps = {"s": units.TIME, "byte": units.SIZE}.get(unit, units.COUNT)
    size, name = next((step for step in steps if largest >= step[0]), steps[-1])
    spelt = {"s": "", "byte": "", "flop": "FLOP", "flop/s": "FLOP/s", "byte/s": "B/s"}.get(unit, f" {unit}")
    return size, f"{name}{spelt}".strip()


def round_steps(largest: float) -> list[float]:
    """Three to six steps of 1, 2 or 5 up to `largest`."""
    if largest <= 0:
        return [0.0]
    ten = 10.0 ** math.floor(math.log10(largest))
    step = next(step for step in (ten / 5, ten / 2, ten, 2 * ten) if largest / step <= 6)
    return [n * step for n in range(int(largest / step) + 1)]


def printable(text: str, longest: int = 300) -> str:
    """A stranger's text on one line, without the characters that command a terminal or turn text around."""
    return "".join(each if each.isprintable() else " " for each in text[:longest]) + "…" * (len(text) > longest)


def data(records: Iterable[Record]) -> object:
    import altair as alt

    return alt.Data(values=list(records))


def themed(chart: alt.LayerChart, *, height: int) -> Record:
    colours = {"labelColor": MUTED, "titleColor": MUTED, "gridColor": LINE, "tickColor": LINE}
    sizes = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8}
    legend = {"labelColor": INK, "labelFontSize": 12, "title": None, "orient": "top", "offset": 12}
    spec: dict[str, object] = (
        chart.properties(width="container", height=height, background="transparent", padding=2)
        .configure(
            font=FONT,
            axis={**colours, **sizes, "domain": False, "labelOverlap": True},
            legend={**legend, "columnPadding": 14, "symbolType": "square", "symbolFillColor": MUTED},
            title={"color": INK, "fontSize": 15, "lineHeight": 20},
            view={"stroke": None},
        )
        .to_dict(validate=False)
    )
    return once(spec)


def once(spec: Record) -> Record:
    """Data that several layers draw, held once."""
    names: dict[str, str] = {}
    datasets = {}
    for layer in spec["layer"]:
        if "values" in (held := layer.get("data", {})):
            name = names.setdefault(json.dumps(held["values"]), f"data{len(names)}")
            datasets[name] = held["values"]
            layer["data"] = {"name": name}
    return spec | {"datasets": datasets}
