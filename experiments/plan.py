"""Will it fit, how long will it take and what will it cost; and what makes it fit where it does not?

    python experiments/plan.py model=llama3_8b hardware=h100 batch=64 tokens=1e9 price_per_hour=2.5
    python experiments/plan.py model=gpt2 hardware=rtx_4090 batch=480 length=1024 accumulate=40
    python experiments/plan.py model=llama3_70b devices=64 strategy=fsdp batch=64 users=256
    python experiments/plan.py model=transformers model.path=DIR         any architecture of Transformers
    python experiments/plan.py checkpoint=runs/latest hardware=here      this machine, as it was calibrated

Nothing is run, downloaded or allocated: a config.json is enough. Memory is the peak of each phase on one device, within
10 %. On a calibrated machine time is read operator by operator, as far off as `predict` found it to be. On other
hardware it is the data sheet's, at the share of it that others published, and as far off as that is for them. Where
training does not fit, the changes that make it fit are ranked by the device time that they cost, after them those that
change what is learnt. A model of another architecture than ours (model=transformers) is counted on the meta device,
without data. batch is of one step, over all devices; users are served at once, each with a prompt and an answer.

:chapter: Planning
:unread: adapter.alpha model.norm_eps model.rope_scaling model.rope_theta
"""

import dataclasses
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isoforward.app.command_line import run
from isoforward.base import units
from isoforward.base.checks import within
from isoforward.base.config import AdapterConfig, ModelConfig, TrackingConfig
from isoforward.base.datasheets import Hardware, lookup
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, RowFields, at_most_one, only, row_of, select
from isoforward.base.vocabulary import Condition
from isoforward.plan import economics
from isoforward.plan.planning import Figure, OnPaper, Plan, peak
from isoforward.plan.subject import Known, NotCounted, Serving, Setup, Subject

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

VOCABULARY = 1024  # of a preset without one: what data=shakespeare learns
LONG = 2048  # tokens of a sequence, unless asked otherwise
INTERVAL: RowFields = {"interval": "errors of like predictions", "confidence": 0.9}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: str | None = None
    hardware: str = "h100"
    precision: str = "bf16"
    batch: int = 8
    length: int | None = None  # None: the context, at most 2048
    optimizer: str = "adamw"
    accumulate: int = 1
    checkpointing: str = "none"
    devices: int = 1
    strategy: str = "ddp"  # or fsdp
    tokens: float | None = None  # trained on; None: 20 a parameter
    price_per_hour: float | None = None  # of one device; None: as its hardware file says
    users: int = 32
    prompt: int | None = None  # None: 1000, or four fifths of the context
    new_tokens: int | None = None  # None: 250, or what is left of the context
    run_dir: str = ""

    def __post_init__(self) -> None:
        within("tokens", 1 if self.tokens is None else self.tokens, 1, 1e18)
        if self.price_per_hour is not None and not 0 < self.price_per_hour < 1e9:
            raise BadInput(f"price_per_hour={self.price_per_hour} must be positive: what one device costs an hour")


def subject_of(config: PlanConfig) -> Subject:
    """By its config alone. torch is loaded only where a file has to be read."""
    model = config.model
    if config.checkpoint is not None:
        from isoforward.formats.loading import find
        from isoforward.serve.inference import find_export

        return Known(find(find_export(config.checkpoint), verify=False).config)
    if model.source == "transformers":
        from isoforward.plan.counted import Counted

        return Counted(directory_of(model), most=max(1, config.batch // (config.accumulate * config.devices)))
    if model.source == "hf":
        from isoforward.formats.transformers_format import config_in

        return Known(config_in(Path(str(model.path))))
    return Known(model if model.vocab is not None else dataclasses.replace(model, vocab=VOCABULARY))


def directory_of(model: ModelConfig) -> Path:
    path = Path(str(model.path))
    return path.parent if path.name == "config.json" else path


def plan_of(config: PlanConfig) -> Plan:
    subject, hardware = subject_of(config), lookup(config.hardware)
    setup = Setup(
        batch=config.batch,
        length=config.length or min(subject.context, LONG),
        precision=config.precision,
        optimizer=config.optimizer,
        accumulate=config.accumulate,
        checkpointing=config.checkpointing,
        devices=config.devices,
        strategy=config.strategy,
        adapter=config.adapter,
    )
    prompt = config.prompt or max(1, min(1000, subject.context * 4 // 5))
    new_tokens = config.new_tokens or max(1, min(250, subject.context - prompt))
    serving = Serving(users=config.users, prompt=prompt, new_tokens=new_tokens, precision=config.precision)
    for key, length in (("length", setup.length), ("prompt + new_tokens", prompt + new_tokens)):
        if length > subject.context:
            raise BadInput(f"{key}={length} is longer than the model's context of {subject.context}; write less")
    clock: Any = OnPaper(hardware=hardware)
    clock.peak_flops_per_s(config.precision)  # or BadInput
    if hardware.calibration and isinstance(subject, Known) and config.adapter.name == "none":
        from isoforward.plan.calibrated_clock import CalibratedClock
        from isoforward.plan.forecast import Calibrated, forecaster

        by = forecaster(hardware)
        assert isinstance(by, Calibrated)
        clock = CalibratedClock(hardware, by)
    return Plan(subject=subject, hardware=hardware, setup=setup, serving=serving, clock=clock)


# Rows


def told(plan: Plan, life: str, phase: str, quantity: str, per: str, found: Figure | float, **more: Any) -> Row:
    own: Any = {key: more.pop(key) for key in ("provenance", "unit") if key in more}
    about: RowFields = {
        "life": life,
        "phase": phase,
        "quantity": quantity,
        "per": per,
        "provenance": "predicted",
    }
    if isinstance(found, Figure):
        doubts = (found.doubt,) if found.doubt else ()
        about["value"], about["low"], about["high"], about["warnings"] = found.value, found.low, found.high, doubts
        about.update(INTERVAL)
    else:
        about["value"] = found
    at = dict(plan.subject.conditions) | where(plan.hardware) | plan.setup.conditions
    return row_of("plan", about, own, conditions=at | {"basis": plan.clock.basis} | more)


def where(hardware: Hardware) -> dict[str, Condition]:
    return {"hardware": hardware.name, "hardware_source": hardware.source}


def rows(plan: Plan, config: PlanConfig) -> Iterator[Row]:
    yield from training_rows(plan, config)
    yield from serving_rows(plan, config)


def training_rows(plan: Plan, config: PlanConfig) -> Iterator[Row]:
    try:
        held = plan.training_bytes(plan.setup)
    except NotCounted as refusal:
        yield unavailable(plan, "training", "step", "memory", "step", str(refusal))
        return
    for phase, size in held.items():
        yield told(plan, "training", phase, "memory", "step", peak(size))
    whole = plan.training_peak(plan.setup)
    fits = plan.fits(whole)
    yield told(
        plan, "training", "step", "memory", "step", whole, fits=fits, state_dtype=plan.subject.state_dtype(plan.setup)
    )
    step = plan.clock.step(plan.subject, plan.setup)
    yield told(plan, "training", "step", "time", "step", step)
    tokens = config.tokens or 20 * plan.subject.parameters
    yield from run_rows(plan, config, step.scaled(tokens / plan.setup.tokens), tokens)
    for remedy in plan.remedies() if fits != "yes" else []:
        said = ", ".join(f"{key}={value}" for key, value in remedy.changes.items())
        more: dict[str, Any] = {"change": said} | remedy.setup.conditions
        yield told(plan, "training", "step", "memory", "step", remedy.peak, fits="yes", **more)
        yield told(plan, "training", "step", "time", "step", remedy.time, **more)


def run_rows(plan: Plan, config: PlanConfig, whole: Figure, tokens: float) -> Iterator[Row]:
    """All of training: what passes on the clock, and what all devices together cost and draw."""
    at = {"trained_tokens": float(tokens)}
    yield told(plan, "training", "run", "time", "run", whole, **at)
    price = config.price_per_hour or plan.hardware.price_per_hour_usd
    if price is None:
        yield unavailable(plan, "training", "run", "money", "run", "no price is known: write price_per_hour=", **at)
    else:
        paid = whole.scaled(economics.money(1.0, price_per_hour=price, devices=plan.setup.devices))
        yield told(plan, "training", "run", "money", "run", paid, price_per_hour=price, **at)
    if plan.hardware.tdp_w is not None:  # what a device may draw, not what it did
        drawn = whole.scaled(plan.hardware.tdp_w * plan.setup.devices)
        yield told(plan, "training", "run", "energy", "run", drawn, provenance="estimated", **at)


def serving_rows(plan: Plan, config: PlanConfig) -> Iterator[Row]:
    serving, devices = plan.serving, plan.setup.devices
    at: dict[str, Any] = {key: getattr(serving, key) for key in ("users", "prompt", "new_tokens")}
    try:
        held = plan.serving_bytes()
    except NotCounted as refusal:
        yield unavailable(plan, "inference", "decode", "memory", "sequence", str(refusal), **at)
        return
    for phase, size in held.items():
        yield told(plan, "inference", phase, "memory", "sequence", peak(size), **at)
    whole = plan.serving_peak()
    cache = plan.subject.kv_bytes(serving)
    yield told(plan, "inference", "run", "memory", "sequence", whole, fits=plan.fits(whole), **at)
    yield told(plan, "inference", "run", "memory", "sequence", float(cache), category="KV cache", **at)
    most = plan.users_at_most()
    yield told(plan, "inference", "run", "users that fit", "run", float(most), **(at | {"users": None}))
    yield told(
        plan, "inference", "prefill", "time", "sequence", plan.clock.prefill(plan.subject, serving, devices), **at
    )
    decode = plan.clock.decode(plan.subject, serving, devices)
    yield told(plan, "inference", "decode", "time", "token", decode, **at)
    price = config.price_per_hour or plan.hardware.price_per_hour_usd
    if price is not None:
        million = decode.scaled(1e6 / serving.users * economics.money(1.0, price_per_hour=price, devices=devices))
        yield told(
            plan, "inference", "decode", "money", "token", million, served_tokens=1e6, price_per_hour=price, **at
        )


def unavailable(plan: Plan, life: str, phase: str, quantity: str, per: str, reason: str, **more: Any) -> Row:
    about: dict[str, Any] = {"life": life, "phase": phase, "quantity": quantity, "per": per}
    at = dict(plan.subject.conditions) | where(plan.hardware) | more
    return Row(experiment="plan", **about, value=None, provenance="unavailable", reason=reason, conditions=at)


# What is said


def screen(console: "Console", results: Results) -> None:
    at = results.rows[0].conditions
    how = " x ".join(str(at[key]) for key in ("batch", "length") if key in at)
    lines = [f"{at['parameters']:,} parameters on {at.get('devices', 1)} x {at['hardware']}"]
    if how:
        made = f"{at['precision']}, {at['optimizer']}, {at['strategy']}, accumulate {at['accumulate']}"
        more = "" if at["adapter"] == "full" else f", {at['adapter']}"
        lines.append(f"training {how}: {made}, checkpointing {at['checkpointing']}{more}")
        if (state := state_dtype(results)) is not None:
            lines.append(f"weights, gradients and optimizer state in {state}")
    if served := select(results, life="inference", phase="decode", quantity="memory"):
        size = served[0].conditions
        lines.append(f"serving {size['users']} users of {size['prompt']} + {size['new_tokens']} tokens")
    console.print("\n".join(lines), style="dim", markup=False, highlight=False)
    console.print(table(results))
    if changed := changed_rows(results):
        console.print()
        console.print(remedy_table(results, changed))
    elif unfit(results):
        console.print(f"\n{nothing_fits(results)}", style="dim", markup=False, highlight=False)
    for reason in dict.fromkeys(row.reason for row in results.rows if row.reason):
        console.print(f"unavailable: {reason}", style="dim", markup=False, highlight=False)


def state_dtype(results: Results) -> Condition:
    held = select(results, life="training", phase="step", quantity="memory", change=None)
    return held[0].conditions.get("state_dtype") if held else None


def unfit(results: Results) -> bool:
    """Training, with no change that makes it fit."""
    held = select(results, life="training", phase="step", quantity="memory")
    return len(held) == 1 and held[0].value is not None and held[0].conditions["fits"] != "yes"


def nothing_fits(results: Results) -> str:
    batch = select(results, life="training", phase="step", quantity="memory")[0].conditions["batch"]
    return f"nothing makes training fit on the devices that batch={batch} can be shared by; a larger batch= allows more"


def changed_rows(results: Results) -> list[Row]:
    return [row for row in select(results, quantity="time", per="step") if row.conditions.get("change")]


def new_table(*names: str) -> "Table":
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        shown.add_column(name, no_wrap=True, justify="right" if shown.columns else "left")
    return shown


def table(results: Results) -> "Table":
    shown = new_table("", "predicted", "from", "to")
    for row in results.rows:
        if row.value is not None and not row.conditions.get("change"):
            ends = ("", "") if row.low is None else (amount(row, row.low), amount(row, row.high))
            shown.add_row(label(row), amount(row, row.value), *ends)
    return shown


def label(row: Row) -> str:
    at = row.conditions
    if row.quantity == "memory":
        if at.get("category"):
            return "  KV cache of all users"
        whole = {"step": "training holds", "run": "serving holds"}.get(row.phase)
        return f"{whole}, fits: {at['fits']}" if whole else f"  {row.phase}"
    if row.quantity == "users that fit":
        return "  users that fit"
    if row.per == "run":
        trained = units.count(row.setting("trained_tokens"))
        return {"time": f"{trained} tokens", "money": "  paid", "energy": "  energy at TDP"}[row.quantity]
    if row.quantity == "money":
        return "  a million tokens"
    return {"step": "a step", "prefill": "a prompt", "decode": "a token each"}[row.phase]


def amount(row: Row, value: float | None) -> str:
    if value is None:
        return ""
    if row.quantity == "users that fit":
        return f"{value:,.0f}"
    if row.unit == "usd":
        return f"${value:,.2f}" if value < 100 else f"${value:,.0f}"
    if row.unit == "s" and value >= 2 * 86400:
        return f"{units.digits(value / 86400)} days"
    return units.quantity(value, row.unit)


def remedy_table(results: Results, changed: list[Row]) -> "Table":
    shown = new_table("what makes training fit", "holds", "a step", "device time")
    shown.columns[0].no_wrap = False  # several changes take a line of their own
    asked = only(results, quantity="time", per="step", change=None)
    for row in changed:
        change = row.conditions["change"]
        held = only(results, quantity="memory", phase="step", change=change)
        ratio = row.number * row.setting("devices") / (asked.number * asked.setting("devices"))
        shown.add_row(str(change), units.size(held.number), units.seconds(row.number), f"{ratio - 1:+.0%}")
    return shown


def answer(results: Results) -> str:
    said = []
    for life, phase in (("training", "step"), ("inference", "run")):
        held = select(results, life=life, phase=phase, quantity="memory", change=None, category=None)
        name = "Training" if life == "training" else "Serving"
        if not held or held[0].value is None:
            said.append(f"{name} cannot be planned: what it holds is not known without data")
            continue
        row = held[0]
        fits = {"yes": "fits", "no": "does not fit", "uncertain": "may not fit"}[str(row.conditions["fits"])]
        said.append(f"{name} {fits} {row.conditions['hardware']}: {units.size(row.number)} ± 10 % on each device")
        if life == "training" and (state := state_dtype(results)) is not None:
            said[-1] += f" (weights and optimizer state in {state})"
        said[-1] += training_said(results) if life == "training" else serving_said(results)
    return ". ".join(said) + "."


def training_said(results: Results) -> str:
    step = only(results, quantity="time", per="step", change=None)
    whole = only(results, life="training", quantity="time", per="run")
    text = f", a step takes {amount(step, step.value)} ({amount(step, step.low)} to {amount(step, step.high)})"
    text += f" and {units.count(whole.setting('trained_tokens'))} tokens {amount(whole, whole.number)}"
    paid = at_most_one(results, life="training", quantity="money", per="run")
    text += f" ({amount(paid, paid.value)})" if paid is not None and paid.value is not None else ""
    changes = [row.conditions["change"] for row in changed_rows(results)]
    if unfit(results):
        return f"{text}; {nothing_fits(results)}"
    return text + (f"; {changes[0]} makes it fit" if changes else "")


def serving_said(results: Results) -> str:
    decode = only(results, phase="decode", quantity="time")
    prompt = only(results, phase="prefill", quantity="time")
    users = only(results, quantity="users that fit")
    rate = decode.setting("users") / decode.number
    return f", a prompt takes {amount(prompt, prompt.value)} and decode gives {units.count(rate)} tokens/s; " + (
        f"at most {units.several(round(users.number), 'user')}"
        if users.value
        else "not one user fits: write more devices="
    )


def main(config: PlanConfig) -> None:
    gc.disable()  # what imports and counts make lives to the end: looking for what does not takes a fifth of the time
    try:
        plan = plan_of(config)
        predicted = list(rows(plan, config))  # refuses before anything heavy is loaded, or written
    finally:
        gc.enable()

    from isoforward.app.telling import tell_predictions

    reasons = ("nothing was measured", f"times rest on {plan.clock.basis}")
    tell_predictions(config, predicted, reasons, answer, screen)


if __name__ == "__main__":
    sys.exit(run(main, PlanConfig))
