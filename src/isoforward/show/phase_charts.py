"""What the report draws of both lives: time of a token, memory, the cache, break-even, the roofline."""

from __future__ import annotations

from collections.abc import Sequence

from isoforward.base import units
from isoforward.base.results import Results, at_most_one, select
from isoforward.plan.economics import break_even_tokens
from isoforward.show.charts import (
    DASHES,
    INK,
    MUTED,
    PHASE_COLOURS,
    PLAIN,
    Bar,
    Chart,
    Part,
    Record,
    bars,
    curves,
    decade_axis,
    field,
    haloed,
    layer,
    on_axis,
    themed,
)
from isoforward.show.compare import BothLives, Line, cache_curve
from isoforward.show.row_charts import accounted, by_purpose, figures, interval, ledgers, mark, whole


def two_lives(runs: Sequence[tuple[str, BothLives]]) -> Chart:
    """Time per token: a training step by its phases, and below it each way to serve."""
    lanes: list[tuple[str, Line, list[Line], BothLives]] = []
    for which, label in enumerate(("Training step", "Frozen forward, same batch", "Prefill", "Decode with KV cache")):
        for name, run in runs:
            whole = [run.step, *run.inference][which]
            parts = [line for line in run.training if line.time_per_token_s] if which == 0 else [whole]
            if whole.time_per_token_s:
                named = f"{name}: {label[0].lower()}{label[1:]}" if len(runs) > 1 else label
                lanes.append((named, whole, parts, run))
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

    def total(line: Line, run: BothLives) -> str:
        assert line.time_per_token_s and run.step.time_per_token_s
        against = "1x" if line is run.step else units.times(line.time_per_token_s / run.step.time_per_token_s)
        return f"{units.seconds(line.time_per_token_s)} · {against}"

    title = "Time of one token, in training and in serving"
    if len(runs) == 1:
        run = runs[0][1]
        phases = {line.phase: line.time_per_token_s for line in run.training if line.time_per_token_s}
        shares = [f"{time / sum(phases.values()):.0%} {phase}" for phase, time in phases.items()]
        served = [units.seconds(line.time_per_token_s) for line in run.inference if line.time_per_token_s]
        ways = zip(served, ("in the same batch", "in a prompt", "decoded alone"), strict=False)
        title = (
            f"A token in training takes {units.seconds(run.step.time_per_token_s or 0.0)}: {', '.join(shares)}. "
            f"Served it takes {', '.join(f'{time} {how}' for time, how in ways)}"
        )
    return Chart(
        name="two_lives",
        title=title,
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
    """What the peak of each life is made of."""
    lanes = [
        (
            f"{name}: {label}" if len(runs) > 1 else label.capitalize(),
            accounted(select(run, life=life, quantity="memory")),
        )
        for life, label in (("training", "training step"), ("inference", "inference"))
        for name, run in runs
    ]
    lanes = [(label, rows) for label, rows in lanes if rows]
    if not lanes:
        return "these rows hold no memory ledger"
    title = "Memory at its peak, by what it is kept for"
    if len(lanes) == 2 and len(runs) == 1:
        kept, (trained, served) = by_purpose(lanes[0][1]), (whole(rows) for _, rows in lanes)
        if kept and served:  # a small model may need no page that its process did not have
            most = max(kept, key=kept.__getitem__)
            title = (
                f"At its peak a training step holds {units.size(trained)}, {units.times(trained / served)} what "
                f"inference holds ({units.size(served)}); {kept[most] / sum(kept.values()):.0%} of it is {most}"
            )
    return ledgers("memory", title, lanes)


def cache(results: Results) -> Chart | str:
    """Time of one more token by the tokens before it."""
    curve = {held: [p for p in points if p[1].value is not None] for held, points in cache_curve(results).items()}
    if not all(len(points) > 1 for points in curve.values()):
        return "these rows do not time one more token at several contexts, with a KV cache and without"
    points = [(held, context, row) for held, ends in curve.items() for context, row in ends]
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
                for held, context, row in points
                for how in ["with" if held else "without"]
            ],
            x_title="tokens before it",
            unit="s",
            per="per token",
        ),
        table=[{"cache": held, "context": context} | figures(row) for held, context, row in points],
    )


def break_even(run: BothLives) -> Chart | str:
    """What serving has cost, as a share of what training had, by served tokens for each trained one."""
    flops = sum(line.flops.value or 0.0 for line in run.training if line.flops)
    trained = {"time": run.step.time_per_token_s or 0.0, "FLOPs": flops / run.step.tokens}
    table: list[Record] = []
    for line in run.inference[1:]:
        counted = line.flops.value / line.tokens if line.flops and line.flops.value else None
        table += [
            {"phase": line.phase, "cost": cost}
            | {"served_tokens_per_trained_token": break_even_tokens(trained[cost], each), "provenance": row.provenance}
            for cost, each, row in (("time", line.time_per_token_s, line.time), ("FLOPs", counted, line.flops))
            if each and trained[cost] and row is not None
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
    title = "served tokens for each trained one"
    x = decade_axis("at:Q", title, ends=(low, high), format=PLAIN, grid=False)
    y = decade_axis("share:Q", "cost of serving ÷ cost of training", ends=(0.01, 100), format=PLAIN)
    colour = field("colour:N", scale=None)
    for way in [*drawn, *lines]:
        way["colour"] = PHASE_COLOURS[way["phase"]]
    dash = field("cost:N", legend=None, scale={"domain": ["time", "FLOPs"], "range": DASHES[:2]})
    growing: Record = {"type": "line", "strokeWidth": 2.5, "clip": True}
    point: Record = {"type": "point", "filled": True, "size": 90, "opacity": 1}
    tooltip = [field("way:N", title="serving overtakes")]
    layers = [
        layer([{"share": 1.0}], {"type": "rule", "color": MUTED, "strokeWidth": 1.5}, y=y),
        layer(lines, growing, x=x, y=y, color=colour, strokeDash=dash, detail=field("way:N")),
        layer(drawn, point, x=x, y=y, color=colour, tooltip=tooltip),
    ]
    middle = (low * high) ** 0.5
    left, right = ([way for way in drawn if (way["at"] < middle) is side] for side in (True, False))
    below, above = {"align": "left", "dx": 8}, {"align": "right", "dx": -8}  # where no line is, or one already crossed
    for place, sign, ways in ((below, 1, left[::-1]), (above, -1, right)):
        for n, way in enumerate(ways):
            style = {"fontSize": 13, "dy": sign * (15 + 19 * n), **place}
            layers += haloed([way], style, x=x, y=y, text=field("way:N"))
    decoded = {way["cost"]: units.digits(way["at"]) for way in drawn if way["phase"] == "decode"}
    said = [f"{at} in {cost}" for cost, at in decoded.items()]
    return Chart(
        name="break_even",
        title=f"Decoded tokens for each trained one at which serving overtakes training: {', '.join(said)}",
        spec=themed(layers, height=320),
        table=table,
    )


def roofline(run: BothLives) -> Chart | str:
    """What each phase reaches below what the machine could; or why that cannot be drawn."""
    flops, bandwidth = (
        at_most_one(run.results, quantity="peak_flops"),
        at_most_one(run.results, quantity="peak_bandwidth"),
    )
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
            | {"provenance": ", ".join(dict.fromkeys(r.provenance for r in (time, line.flops, line.bytes) if r))}
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
    x = decade_axis("flop_per_byte:Q", "FLOP per byte moved", ends=(low, high), format=PLAIN, grid=False)
    y = decade_axis("flop_per_s:Q", "FLOP/s", format=".3~s")
    reach_of = {"y": field("low_flop_per_s:Q", scale={"type": "log"}), "y2": field("high_flop_per_s")}
    colour = field("colour:N", scale=None)
    shape = field("life:N", scale={"domain": ["training", "inference"], "range": ["square", "circle"]})
    dot: Record = {"type": "point", "filled": True, "size": 120, "opacity": 1}
    layers = [
        layer(roof, {"type": "line", "color": INK, "strokeWidth": 2}, x=x, y=y),
        layer(drawn, {"type": "rule", "strokeWidth": 2}, x=x, color=colour, **reach_of),
        layer(drawn, dot, x=x, y=y, color=colour, shape=shape, tooltip=[field("said:N")]),
    ]
    for n, point in enumerate(drawn):
        beside = {"align": "right" if point["flop_per_byte"] > ridge else "left", "dy": (-18, 18, -38, 38)[n % 4]}
        layers += haloed([point], {"fontSize": 12, **beside}, x=x, y=y, text=field("said:N"))
    placed = {(point["life"], point["phase"]) for point in table}
    absent = [line.label for line in [*run.training, *run.inference] if (line.life, line.phase) not in placed]
    return Chart(
        name="roofline",
        title=(
            f"Below what this machine could do, {units.count(flops.value, 'FLOP/s')} and "
            f"{units.count(bandwidth.value, 'B/s')}"
            + (f"; not placed, for want of FLOPs or bytes: {', '.join(absent)}" if absent else "")
        ),
        spec=themed(layers, height=360),
        table=table,
    )
