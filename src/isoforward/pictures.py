"""What the report draws, from rows: both lives, memory, the cache, break-even, the roofline, and any other rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isoforward import units
from isoforward.charts import (
    BLUE,
    DASHES,
    DECADES,
    GREEN,
    INK,
    LINE,
    MUTED,
    ORANGE,
    OTHER,
    PHASE_COLOURS,
    PINK,
    RED,
    SKY,
    YELLOW,
    Bar,
    Chart,
    Part,
    Record,
    bars,
    curves,
    data,
    dots,
    haloed,
    on_axis,
    printable,
    themed,
)
from isoforward.compare import Comparison, Line, cache_curve, memory_ledger, only
from isoforward.economics import break_even_tokens
from isoforward.results import Results, Row

PURPOSE_COLOURS = {  # of memory, after the phase that needs it
    "parameters": BLUE,
    "weights": BLUE,
    "cast weights": SKY,
    "activations": SKY,
    "recomputed": YELLOW,
    "logits and loss": PINK,
    "gradients": RED,
    "optimizer state": ORANGE,
    "KV cache": GREEN,
    "other": OTHER,
    "unexplained": LINE,
}
MOST_DOTS = 40


def two_lives(runs: Sequence[tuple[str, Comparison]]) -> Chart:
    """Time per token: a training step by its phases, and below it each way to serve."""
    lanes: list[tuple[str, Line, list[Line], Comparison]] = []
    for which, label in enumerate(("Training step", "Frozen forward, same batch", "Prefill", "Decode with KV cache")):
        for name, run in runs:
            whole = [run.step, *run.inference][which]
            if whole.time_per_token_s:
                lanes.append((f"{name}: {label.lower()}" if len(runs) > 1 else label, whole, [whole], run))
                if which == 0:
                    lanes[-1] = (*lanes[-1][:2], [line for line in run.training if line.time_per_token_s], run)
    typical = sorted(whole.time_per_token_s or 0.0 for _, whole, _, _ in lanes)[len(lanes) // 2]
    size, unit = on_axis("s", typical)

    def part(line: Line) -> Part:
        assert line.time is not None and line.time_per_token_s is not None
        return Part(
            name=line.phase,
            colour=PHASE_COLOURS[line.phase],
            size=line.time_per_token_s / size,
            said=f"{units.seconds(line.time_per_token_s)} a token ({interval(line.time, line.tokens)})",
        )

    def total(line: Line, run: Comparison) -> str:
        assert line.time_per_token_s and run.step.time_per_token_s
        against = "1x" if line is run.step else units.times(line.time_per_token_s / run.step.time_per_token_s)
        return f"{units.seconds(line.time_per_token_s)} · {against}"

    return Chart(
        name="two_lives",
        title="Time of one token, in training and in serving",
        spec=bars(
            [
                Bar(label=label, total=total(whole, run), parts=[part(line) for line in parts], ends=ends(whole, size))
                for label, whole, parts, run in lanes
            ],
            unit=f"{unit} per token",
            legend=("forward", "loss", "backward", "optimizer"),
        ),
        table=[
            {"lane": label, "life": line.life, "phase": line.phase, "tokens": line.tokens}
            | figures(line.time, line.tokens, "s_per_token")
            for label, whole, parts, _ in lanes
            for line in (parts if whole in parts else [*parts, whole])
            if line.time is not None
        ],
    )


def ends(line: Line, size: float) -> tuple[float, float] | None:
    time = line.time
    if time is None or time.low is None or time.high is None:
        return None
    return time.low / line.tokens / size, time.high / line.tokens / size


def memory(runs: Sequence[tuple[str, Results]]) -> Chart | str:
    """What the peak is made of; the tick is the measured peak."""
    ledgers = [
        (name, life, ledger)
        for life in ("training", "inference")
        for name, run in runs
        if (ledger := memory_ledger(run, life))
    ]
    if not ledgers:
        return "these rows hold no memory ledger"
    size, unit = on_axis("byte", max(max(ledger.values()) for _, _, ledger in ledgers))
    lanes, used = [], set()
    for name, life, ledger in ledgers:
        purposes = by_purpose(ledger)
        used |= purposes.keys()
        measured = ledger.get("measured peak")
        label = "training step" if life == "training" else "inference"
        total = units.size(sum(purposes.values()) if measured is None else measured)
        lanes.append(
            Bar(
                label=f"{name}: {label}" if len(runs) > 1 else label.capitalize(),
                total=f"{total} {'counted' if measured is None else 'measured'}",
                parts=[
                    Part(name=purpose, colour=PURPOSE_COLOURS[purpose], size=kept / size, said=units.size(kept))
                    for purpose, kept in purposes.items()
                ],
                tick=None if measured is None else measured / size,
            )
        )
    return Chart(
        name="memory",
        title="Memory at its peak, by what it is kept for",
        spec=bars(lanes, unit=unit, legend=[purpose for purpose in PURPOSE_COLOURS if purpose in used]),
        table=[
            {"run": name, "life": life, "category": category, "memory_bytes": kept}
            for name, life, ledger in ledgers
            for category, kept in ledger.items()
        ],
    )


def by_purpose(ledger: dict[str, float]) -> dict[str, float]:
    """`activations.attention` and its like as activations, and what has no colour of its own as other."""
    kept = dict.fromkeys(PURPOSE_COLOURS, 0.0)
    for category, size in ledger.items():
        purpose = category.partition(".")[0]
        if category != "measured peak" and size > 0:
            kept[purpose if purpose in kept else "other"] += size
    return {purpose: size for purpose, size in kept.items() if size}


def cache(results: Results) -> Chart | str:
    """Time of one more token by the tokens before it."""
    curve = {held: [p for p in points if p[1].value is not None] for held, points in cache_curve(results).items()}
    if not all(len(points) > 1 for points in curve.values()):
        return "these rows do not time one more token at several contexts, with a KV cache and without"
    (first, with_first), (last, with_last) = curve[True][0], curve[True][-1]
    without = [row.value or 0.0 for _, row in (curve[False][0], curve[False][-1])]
    return Chart(
        name="cache",
        title=(
            f"One more token after {first} and after {last}: {units.seconds(with_first.value or 0.0)} and "
            f"{units.seconds(with_last.value or 0.0)} with a KV cache, {units.seconds(without[0])} and "
            f"{units.seconds(without[1])} without"
        ),
        spec=curves(
            [
                mark(
                    row,
                    x=context,
                    variant="with" if held else "without",
                    series=f"with{'' if held else 'out'} KV cache",
                )
                for held, points in curve.items()
                for context, row in points
            ],
            x_title="tokens before it",
            unit="s",
            per="per token",
        ),
        table=[
            {"cache": held, "context": context} | figures(row)
            for held, points in curve.items()
            for context, row in points
        ],
    )


def break_even(run: Comparison) -> Chart | str:
    """What serving has cost, as a share of what training had, by served tokens for each trained one."""
    import altair as alt

    flops = sum(line.flops.value or 0.0 for line in run.training if line.flops)
    trained = {"time": run.step.time_per_token_s or 0.0, "FLOPs": flops / run.step.tokens}
    table: list[Record] = []
    for line in run.inference[1:]:
        counted = line.flops.value / line.tokens if line.flops and line.flops.value else None
        table += [
            {
                "phase": line.phase,
                "cost": cost,
                "served_tokens_per_trained_token": break_even_tokens(trained[cost], each),
            }
            for cost, each in (("time", line.time_per_token_s), ("FLOPs", counted))
            if each and trained[cost]
        ]
    drawn = sorted(
        (  # a prompt's token and a decoded one need about the same FLOPs: two lines in one place
            {"at": way["served_tokens_per_trained_token"], "phase": way["phase"], "cost": way["cost"]}
            for way in table
            if (way["phase"], way["cost"]) != ("prefill", "FLOPs")
        ),
        key=lambda way: way["at"],
    )
    if not drawn:
        return "these rows tell neither time nor FLOPs of a decoded token"
    low, high = drawn[0]["at"] / 10, drawn[-1]["at"] * 10
    for way in drawn:
        way |= {"share": 1.0, "way": f"{way['phase']}, {way['cost']}: {units.digits(way['at'])}"}
    lines = [way | {"share": share, "at": way["at"] * share} for way in drawn for share in (1e-6, 1e6)]
    x = alt.X(
        "at:Q",
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
        axis=alt.Axis(title="served tokens for each trained one", values=DECADES, format="~r", grid=False),
    )
    y = alt.Y(
        "share:Q",
        scale=alt.Scale(type="log", domain=[0.01, 100], nice=False),
        axis=alt.Axis(title="cost of serving ÷ cost of training", values=DECADES, format="~r"),
    )
    colour = alt.Color("colour:N", scale=None)
    for way in [*drawn, *lines]:
        way["colour"] = PHASE_COLOURS[way["phase"]]
    dash = alt.StrokeDash("cost:N", legend=None, scale=alt.Scale(domain=["time", "FLOPs"], range=DASHES[:2]))
    crossings = alt.Chart(data(drawn)).encode(x=x, y=y, color=colour)
    layers = [
        alt.Chart(data([{"share": 1.0}])).mark_rule(color=MUTED, strokeWidth=1.5).encode(y=y),
        alt.Chart(data(lines))
        .mark_line(strokeWidth=2.5, clip=True)
        .encode(x=x, y=y, color=colour, strokeDash=dash, detail="way:N"),
        crossings.mark_point(filled=True, size=90, opacity=1).encode(
            tooltip=[alt.Tooltip("way:N", title="serving overtakes")]
        ),
    ]
    for n, way in enumerate(drawn):  # where no line is: below a crossing on the left, above one on the right
        left = way["at"] < (low * high) ** 0.5
        place = {"align": "left", "dx": 8, "dy": 15} if left else {"align": "right", "dx": -8, "dy": -15 - 19 * (n - 1)}
        layers += haloed(alt.Chart(data([way])).encode(x=x, y=y, text="way:N"), fontSize=13, **place)
    decoded = {way["cost"]: units.digits(way["at"]) for way in drawn if way["phase"] == "decode"}
    said = [f"{at} decoded tokens for each trained one in {cost}" for cost, at in decoded.items()]
    return Chart(
        name="break_even",
        title=f"Serving overtakes training at {' and at '.join(said)}",
        spec=themed(alt.layer(*layers), height=320),
        table=table,
    )


def roofline(run: Comparison) -> Chart | str:
    """What each phase reaches below what the machine could; or why that cannot be drawn."""
    import altair as alt

    flops, bandwidth = only(run.results, quantity="peak_flops"), only(run.results, quantity="peak_bandwidth")
    if not (flops and bandwidth and flops.value and bandwidth.value):
        return "these rows hold no peak FLOP/s and no peak bandwidth of this machine"
    table: list[Record] = []
    for line in [*run.training, *run.inference]:
        time = line.time
        if time is None or not time.value or not line.flops_per_s or not line.bytes_per_s:
            continue
        intensity = line.flops_per_s / line.bytes_per_s
        slow, fast = (time.value / (end or time.value) * line.flops_per_s for end in (time.high, time.low))
        table.append(
            {"life": line.life, "phase": line.phase, "label": line.label, "flop_per_byte": intensity}
            | {"flop_per_s": line.flops_per_s, "low_flop_per_s": slow, "high_flop_per_s": fast}
            | {"of_roof": line.flops_per_s / min(flops.value, bandwidth.value * intensity)}
        )
    if not table:
        return "these rows give no phase both its FLOPs and its bytes"
    ridge = flops.value / bandwidth.value
    reach = [point["flop_per_byte"] for point in table] + [ridge]
    low, high = min(reach) / 5, max(reach) * 5
    roof = [{"flop_per_byte": at, "flop_per_s": min(flops.value, bandwidth.value * at)} for at in (low, ridge, high)]
    drawn = [
        point
        | {"said": f"{point['label']}: {point['of_roof']:.0%} of the roof", "colour": PHASE_COLOURS[point["phase"]]}
        for point in table
    ]
    x = alt.X(
        "flop_per_byte:Q",
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
        axis=alt.Axis(title="FLOP per byte moved", values=DECADES, format="~r", grid=False),
    )
    log = alt.Scale(type="log")
    y = alt.Y("flop_per_s:Q", scale=log, axis=alt.Axis(title="FLOP/s", values=DECADES, format="~s"))
    points = alt.Chart(data(drawn)).encode(x=x, color=alt.Color("colour:N", scale=None))
    shape = alt.Shape("life:N", scale=alt.Scale(domain=["training", "inference"], range=["square", "circle"]))
    layers = [
        alt.Chart(data(roof)).mark_line(color=INK, strokeWidth=2).encode(x=x, y=y),
        points.mark_rule(strokeWidth=2).encode(y=alt.Y("low_flop_per_s:Q", scale=log), y2="high_flop_per_s:Q"),
        points.mark_point(filled=True, size=120, opacity=1).encode(y=y, shape=shape, tooltip=["said:N"]),
    ]
    for n, point in enumerate(drawn):
        beside = {"align": "right" if point["flop_per_byte"] > ridge else "left", "dy": 18 if n % 2 else -18}
        layers += haloed(alt.Chart(data([point])).encode(x=x, y=y, text="said:N"), fontSize=12, **beside)
    return Chart(
        name="roofline",
        title=(
            f"Each phase below what this machine could do: {units.count(flops.value, 'FLOP/s')}, "
            f"{units.count(bandwidth.value, 'B/s')}"
        ),
        spec=themed(alt.layer(*layers), height=360),
        table=table,
    )


def of_rows(name: str, rows: Sequence[Row], varying: Sequence[str]) -> Chart | None:
    """Rows of one quantity: over the number that varies most, if one takes three values; else one below the other."""
    rows = [row for row in rows if row.value is not None]
    if not rows:
        return None
    quantity, unit, per = rows[0].quantity, rows[0].unit, f"per {rows[0].per}"
    across = {key: {row.conditions.get(key) for row in rows} for key in varying}
    numeric = {key: found for key, found in across.items() if len(found) > 2 and all(map(is_number, found))}
    x = max(numeric, key=lambda key: len(numeric[key]), default=None)
    lives = len({row.life for row in rows}) > 1
    marks = []
    for row in rows:
        variant = [row.life] * lives + [
            printable(f"{k}={row.conditions[k]}", 60) for k in varying if k != x and k in row.conditions
        ]
        at = {} if x is None else {"x": row.conditions[x]}
        said = f"{row.life} {row.phase}" if not lives else row.phase
        marks.append(mark(row, variant=", ".join(variant), series=", ".join([said, *variant]), **at))
    series = {m["series"] for m in marks}
    title = f"{quantity.replace('_', ' ').capitalize()} {per}"
    if x is not None and len(series) * 2 <= len(marks) and len(series) <= 12:
        spec = curves(marks, x_title=x, unit=unit, per=per)
        title += f", by {x}"
    else:
        if len(marks) > MOST_DOTS:
            title += f": the first {MOST_DOTS} of {len(marks)}, all in the table"
        for m, row in zip(marks, rows, strict=True):
            m["series"] += "" if x is None else f", {x}={row.conditions[x]}"
        spec = dots(marks[:MOST_DOTS], unit=unit, per=per)
    return Chart(name=f"{name}_{quantity}", title=title, spec=spec, table=[])


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def mark(row: Row, **at: Any) -> Record:
    assert row.value is not None
    low, high = (row.value if end is None else end for end in (row.low, row.high))
    said = units.quantity(row.value, row.unit)
    return {
        "value": row.value,
        "low": low,
        "high": high,
        "phase": row.phase,
        "colour": PHASE_COLOURS[row.phase],
        "said": said,
        "told": f"{said} ({interval(row)}), {row.provenance}",
        **at,
    }


def interval(row: Row, divisor: float = 1.0) -> str:
    if row.low is None or row.high is None:
        return "no interval"
    return f"{units.quantity(row.low / divisor, row.unit)} to {units.quantity(row.high / divisor, row.unit)}"


def figures(row: Row, divisor: float = 1.0, unit: str | None = None) -> Record:
    def each(value: float | None) -> float | None:
        return None if value is None else value / divisor

    told = {"value": each(row.value), "low": each(row.low), "high": each(row.high)}
    return told | {"unit": unit or row.unit, "provenance": row.provenance}
