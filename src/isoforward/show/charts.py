"""Marks in Vega-Lite: one colour a phase, whiskers for intervals, names beside what they name."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isoforward.base import units
from isoforward.base.vocabulary import BESIDE, WHOLES

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
PURPOSE_COLOURS = {  # of memory, after the phase that needs it
    "weights": BLUE,
    "cast weights": YELLOW,
    "activations": SKY,
    "logits and loss": PINK,
    "gradients": RED,
    "optimizer state": ORANGE,
    "KV cache": GREEN,
    "kernels": MUTED,
    "other": OTHER,
    "unexplained": LINE,
}
INK_ON = dict.fromkeys((BLUE, RED, GREEN), "#ffffff") | {LINE: INK, MUTED: PAPER}
BASELINE = {"grid": False, "domain": True, "domainColor": LINE}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
DASHES = [[1, 0], [7, 4], [2, 3], [11, 3, 2, 3], [14, 5], [4, 2]]
PLAIN = ".6~r"  # d3 rounds to one digit on a logarithmic axis unless told how many
LANE = 58  # of a bar with its heading
DECADES = [10.0**k for k in range(-15, 25)]
VEGA_LITE = "6.4"  # the version that the specifications are written in
KINDS = {"Q": "quantitative", "N": "nominal", "O": "ordinal"}

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

        made: bytes = vl_convert.vegalite_to_png(self.by_day(), vl_version=VEGA_LITE, scale=scale)
        return made

    def svg(self) -> str:
        import vl_convert

        made: str = vl_convert.vegalite_to_svg(self.by_day(), vl_version=VEGA_LITE)
        return made

    def by_day(self, width: int = 720) -> str:
        """The specification in light colours, with the title in it."""
        title = {"text": textwrap.wrap(self.title, width // 9), "anchor": "start", "offset": 14}
        text = json.dumps(self.spec | {"width": width, "background": PAPER, "padding": 16, "title": title})
        return re.sub(r"var\(--(\w+)\)", lambda found: LIGHT[found[1]], text)


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


def bars(lanes: Sequence[Bar], *, unit: str, legend: Sequence[str]) -> Record:
    """Stacked, from zero. A bar that would dwarf the rest is cut, visibly, and keeps its number."""
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
    x = field(
        "start:Q",
        scale={"domain": [0, limit], "nice": False},
        axis={"title": unit, "values": round_steps(whole), "format": PLAIN, **BASELINE},
    )
    colour = field(
        "part:N",
        scale={"domain": list(colours), "range": list(colours.values())},
        legend={"values": list(legend), "columns": 4 if len(legend) <= 4 else 3} if legend else None,
    )
    tooltip = [field("part:N", title="part"), field("said:N", title="takes")]
    fits = "datum.room * width > datum.label.length * 7 + 8 ? datum.label : datum.room * width > 34 ? datum.share : ''"
    inside = {"x": field("middle:Q"), "y": y, "text": field("fits:N"), "color": field("ink:N", scale=None)}
    at = {"x": field("at:Q"), "y": y}
    bar_of: Record = {"type": "bar", "height": 24, "yOffset": 11}
    whisker: Record = {"type": "rule", "yOffset": 11, "strokeWidth": 2, "color": INK, "clip": True}
    tick: Record = {"type": "tick", "thickness": 3, "size": 36, "yOffset": 11, "color": INK, "opacity": 1}
    beside: Record = {"align": "left", "dx": 8, "dy": 12, "color": MUTED, "limit": {"expr": "width - 40"}}
    cut_mark: Record = {"text": "//", "dy": 10, "fontSize": 32, "fontWeight": "bold", "color": PAPER}
    layers = [
        layer(drawn, bar_of, x=x, x2=field("end"), y=y, color=colour, tooltip=tooltip),
        *headings([(bar.label, bar.total) for bar in lanes], reserved=165),
        layer(drawn, {"type": "text", "dy": 11, "fontSize": 12}, **inside)
        | {"transform": [{"calculate": fits, "as": "fits"}]},
        layer(whiskers, whisker, x=field("start:Q"), x2=field("end"), y=y),
        layer(ticks, tick, **at),
        layer(small, {"type": "text", "fontSize": 12, **beside}, **at, text=field("said:N")),
        layer(cuts, {"type": "text", **cut_mark}, **at),
    ]
    return themed(layers, height=LANE * len(lanes))


def dots(marks: Sequence[Record], *, unit: str, per: str, ratios: bool = False) -> Record:
    """One a lane, `series` and `said` above it, with its whiskers, on a scale that shows the least of them.

    `ratios` have a line at 1, and a scale on which twice is as far from it as half.
    """
    marks, unit = rescaled(marks, unit)
    scale = {"type": "log", "nice": False, "padding": 12} if ratios else span(marks)
    drawn = [mark | {"lane": lane} for lane, mark in enumerate(marks)]
    ticks = {"values": ratio_ticks(marks)} if ratios else {"tickCount": 5, **decades(scale)}
    axis = {"title": f"{unit} {per}".strip(), "format": PLAIN, **BASELINE, **ticks}
    x = field("value:Q", scale=scale, axis=axis)
    shared = {"y": lane_axis(len(marks)), "color": field("colour:N", scale=None)}
    tooltip = [field("series:N", title="what"), field("told:N", title="is")]
    whisker: Record = {"type": "rule", "yOffset": 11, "strokeWidth": 2}
    point: Record = {"type": "point", "filled": True, "size": 90, "opacity": 1, "yOffset": 11}
    layers = [
        layer(drawn, whisker, x=field("low:Q", scale=scale), x2=field("high"), **shared),
        layer(drawn, point, x=x, tooltip=tooltip, **shared),
        *headings([(mark["series"], mark["said"]) for mark in marks], reserved=100, crossed=ratios),
    ]
    if ratios:
        line = {"type": "rule", "color": MUTED, "strokeDash": [4, 4]}
        layers.insert(0, layer([{"even": 1}], line, x=field("even:Q", scale=scale, axis=axis)))
    return themed(layers, height=(LANE - 12) * len(marks))


def curves(marks: Sequence[Record], *, x_title: str, unit: str, per: str) -> Record:
    """Colour by `phase`, dashes by `variant`; up to four lines carry their name at their end, more have a legend."""
    marks, unit = rescaled(marks, unit)
    scale = span(marks)
    across = sorted({mark["x"] for mark in marks})
    doubling = across[0] > 0 and across[-1] >= 8 * across[0]
    labels = {"values": across} if len(across) <= 10 else {}
    last = list({mark["series"]: mark for mark in sorted(marks, key=lambda mark: mark["x"])}.values())
    x = field(
        "x:Q",
        scale={"type": "log", "base": 2, "nice": False} if doubling else {"zero": False},
        axis={"title": x_title, "grid": False, "format": ".3~s" if across[-1] >= 1e5 else PLAIN, **labels},
    )
    axis = {"title": f"{unit} {per}", "format": PLAIN, "tickCount": 5, **decades(scale)}
    y = field("value:Q", scale=scale, axis=axis)
    phases, variants = (list(dict.fromkeys(mark[key] for mark in marks)) for key in ("phase", "variant"))
    listed = {"columns": 3, "symbolType": "stroke", "symbolStrokeWidth": 3, "labelLimit": 300}
    many = len(last) > 4
    coloured = {"domain": phases, "range": [PHASE_COLOURS[phase] for phase in phases]}
    dash = field(
        "variant:N",
        scale={"domain": variants, "range": DASHES},
        legend=listed if many and len(variants) > 1 else None,
    )
    shared = {
        "x": x,
        "color": field("phase:N", scale=coloured, legend=listed if many and len(phases) > 1 else None),
        "detail": field("series:N"),
    }
    tooltip = [field("series:N", title="what"), field("x:Q", title=x_title), field("told:N", title="is")]
    point: Record = {"type": "point", "filled": True, "size": 70, "opacity": 1}
    layers = [
        layer(marks, {"type": "line", "strokeWidth": 2.5}, y=y, strokeDash=dash, **shared),
        layer(marks, {"type": "rule", "strokeWidth": 2}, y=field("low:Q", scale=scale), y2=field("high"), **shared),
        layer(marks, point, y=y, tooltip=tooltip, **shared),
    ]
    if not many:
        style = {"align": "right", "dy": -14, "fontSize": 13, "fontWeight": "bold", "limit": 260}
        layers += haloed(last, style, x=x, y=y, text=field("series:N"))
    return themed(layers, height=300)


def headings(texts: Iterable[tuple[str, str]], *, reserved: int, crossed: bool = False) -> list[Record]:
    """Above each lane, at both its ends; the right one has `reserved` pixels, and the left one may be `crossed`."""
    rows = [{"lane": lane, "left": left, "right": right} for lane, (left, right) in enumerate(texts)]
    y = lane_axis(len(rows))
    style: Record = {"align": "left", "dy": -13, "fontSize": 13, "limit": {"expr": f"width - {reserved}"}}
    left = {"x": {"value": 0}, "y": y, "text": field("left:N")}
    bold = style | {"type": "text", "align": "right", "fontWeight": "bold", "color": INK, "limit": reserved}
    return [
        *(haloed(rows, style, **left) if crossed else [layer(rows, {"type": "text", "color": INK, **style}, **left)]),
        layer(rows, bold, x={"value": "width"}, y=y, text=field("right:N")),
    ]


def haloed(records: Sequence[Record], style: Record, **encoding: object) -> list[Record]:
    """Text that stays legible over lines."""
    halo = {"stroke": PAPER, "strokeWidth": 5, "color": PAPER}
    return [layer(records, {"type": "text", **colours, **style}, **encoding) for colours in (halo, {"color": INK})]


def lane_axis(count: int) -> Record:
    return field("lane:O", axis=None, scale={"domain": list(range(count)), "padding": 0})


def decade_axis(name: str, title: str, *, ends: Sequence[float] | None = None, **axis: object) -> Record:
    """A logarithmic one, labelled at powers of ten, from one of `ends` to the other."""
    bounds = {} if ends is None else {"domain": list(ends), "nice": False}
    return field(name, scale={"type": "log", **bounds}, axis={"title": title, "values": DECADES, **axis})


def span(marks: Sequence[Record]) -> Record:
    """From zero, unless that would hide the least behind the greatest."""
    least, greatest = min(mark["low"] for mark in marks), max(mark["high"] for mark in marks)
    return {"type": "log"} if least > 0 and greatest >= 20 * least else {"zero": True}


def decades(scale: Record) -> Record:
    return {"values": DECADES} if scale.get("type") == "log" else {}


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


# Vega-Lite's own words


def field(name: str, **more: object) -> Record:
    """A channel that a field of the data drives: `name:Q` is a quantity, `:N` a name, `:O` an order."""
    name, _, kind = name.partition(":")
    return {"field": name, **({"type": KINDS[kind]} if kind else {}), **more}


def layer(records: Iterable[Record], mark: Mapping[str, object], **encoding: object) -> Record:
    """One mark for each record."""
    return {"data": {"values": list(records)}, "mark": mark, "encoding": encoding}


def themed(layers: Sequence[Record], *, height: int) -> Record:
    """The whole specification; data that several layers draw are held once."""
    colours = {"labelColor": MUTED, "titleColor": MUTED, "gridColor": LINE, "tickColor": LINE}
    sizes = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8}
    legend = {"labelColor": INK, "labelFontSize": 12, "title": None, "orient": "top", "offset": 12}
    datasets: dict[str, list[Record]] = {}
    names: dict[str, str] = {}
    for each in layers:
        values = each["data"]["values"]
        name = names.setdefault(json.dumps(values), f"data{len(names)}")
        datasets[name] = values
        each["data"] = {"name": name}
    return {
        "$schema": f"https://vega.github.io/schema/vega-lite/v{VEGA_LITE}.json",
        "width": "container",
        "height": height,
        "background": "transparent",
        "padding": 2,
        "config": {
            "font": FONT,
            "axis": {**colours, **sizes, "domain": False, "labelOverlap": True},
            "legend": {**legend, "columnPadding": 14, "symbolType": "square", "symbolFillColor": MUTED},
            "title": {"color": INK, "fontSize": 15, "lineHeight": 20},
            "view": {"stroke": None},
        },
        "layer": layers,
        "datasets": datasets,
    }
