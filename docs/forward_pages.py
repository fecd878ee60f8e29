"""The page "Why inference is a forward pass", in each language, with the numbers of a recorded run.

python docs/forward_pages.py            makes docs/forward.md and docs/forward.zh.md from their templates, *.md.in
"""

import sys
from pathlib import Path
from string import Template

from isoforward.base import units
from isoforward.base.results import Results, only, read
from isoforward.show.compare import Line, cache_curve, compare

DOCS = Path(__file__).resolve().parent
RECORDED = DOCS / "recorded" / "phase_costs" / "results.jsonl"
PAGES = ("forward.md", "forward.zh.md")
NAMES_ZH = {
    "forward": "训练：前向",
    "loss": "训练：损失",
    "backward": "训练：反向",
    "optimizer": "训练：优化器",
    "whole step": "训练：整个一步",
    "forward, same batch": "推理：前向，同一批数据",
    "prefill": "推理：预填充",
    "decode": "推理：解码",
}


def numbers(results: Results) -> dict[str, str]:
    """What the templates name, as text."""
    both, identity = compare(results), only(results, quantity="identity")
    (place, *_) = results.environments.values()
    decode, step = both.inference[2], both.step
    assert identity is not None and both.flops_ratio is not None and both.memory_ratio is not None
    assert decode.flops and decode.flops.value and both.training[0].flops and both.training[0].flops.value
    trained_flops = both.flops_ratio * both.training[0].flops.value / step.tokens
    curve = {kept: dict(points) for kept, points in cache_curve(results).items()}
    context = max(curve[True].keys() & curve[False].keys())
    doubtful = any(not verdict.trusted for verdict in results.verdicts)
    lines = [*both.training, step, *both.inference]
    share = decode.flops.value / trained_flops
    return {
        "command": f"`{place.command.partition(' run_dir=')[0]}`",
        "machine": f"{place.identity['cpu']}, {place.identity['threads']} threads",
        "dtype": str(both.conditions["dtype"]),
        "torch": str(place.identity["torch"]),
        "verdict": "The run itself said: take these times with care."
        if doubtful
        else "The run said: these numbers can be trusted.",
        "verdict_zh": "这次运行自己提醒：时间数据要谨慎看待。" if doubtful else "这次运行自己判定：这些数字可信。",
        "differing": f"{identity.value or 0:,.0f}",
        "logits": f"{identity.conditions['logits']:,}",
        "step_time": units.times(both.time_ratio.value),
        "step_low": units.times(both.time_ratio.low),
        "step_high": units.times(both.time_ratio.high),
        "step_flops": units.times(both.flops_ratio),
        "step_memory": units.times(both.memory_ratio),
        "decode_time": units.seconds(decode.time_per_token_s or 0.0),
        "trained_time": units.seconds(step.time_per_token_s or 0.0),
        "decode_ratio": units.times(both.decode_ratio),
        "decode_flops": f"{share:.0%}",
        "context": str(context),
        "cached_time": units.seconds(curve[True][context].value or 0.0),
        "uncached_time": units.seconds(curve[False][context].value or 0.0),
        "table": "\n".join(row(line, english(line)) for line in lines),
        "table_zh": "\n".join(row(line, NAMES_ZH[line.label]) for line in lines),
    }


def english(line: Line) -> str:
    return f"{line.life}: {line.label}"


def row(line: Line, name: str) -> str:
    time = units.seconds(line.time.value) if line.time and line.time.value is not None else ""
    flops = units.count(line.flops.value, "FLOP") if line.flops and line.flops.value else ""
    same = line.against_forward if line.label not in ("prefill", "decode") else None  # those run other shapes
    return f"| {name} | {time} | {units.times(same.ratio.value) if same else ''} | {flops} |"


def page(name: str, results: Results) -> str:
    text = (DOCS / f"{name}.in").read_text("utf-8")
    return Template(text).substitute(numbers(results))


if __name__ == "__main__":
    for name in PAGES:
        (DOCS / name).write_text(page(name, read(RECORDED)), "utf-8")
        print(DOCS / name, file=sys.stderr)
