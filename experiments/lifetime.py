"""Which size of model is the cheapest over its life, for one quality and so many served tokens?

    python experiments/lifetime.py like=13e9
    python experiments/lifetime.py like=70e9 hardware=h100 price_per_hour=2.5 decode_batch=64
    python experiments/lifetime.py like=7e9 served=[1e11,1e12,1e13] prompt=200 new_tokens=800

`like` is a size: the quality wanted is the loss that a model of it reaches with Chinchilla's tokens. A smaller model
reaches it with more tokens (Hoffmann 2022), and is cheaper to serve. In FLOPs, 6ND and 2N a served token, this is
Sardana 2024. In device time the optimum moves: a decoded token waits for the weights to be read, which its FLOPs do not
show. Shares of the hardware's peaks are those that others published, unless they are given. Nothing is run.

:chapter: Planning
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from isoforward.app.command_line import run
from isoforward.base import units
from isoforward.base.checks import one_of, within
from isoforward.base.config import TrackingConfig
from isoforward.base.datasheets import TABLE, Hardware, lookup
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, RowFields, only, row_of, select
from isoforward.plan import efficiency, optimal_size
from isoforward.plan.lifetime import Assumptions
from isoforward.plan.optimal_size import Life, chinchilla_tokens, lives, loss, sizes_below

if TYPE_CHECKING:
    from rich.console import Console

FLOPS, COUNTED = "FLOPs, 6ND and 2N", ("FLOPs, 6ND and 2N", "device time", "money")
SERVED = (1e11, 3e11, 1e12, 2e12, 5e12, 1e13, 5e13)
DRAWN = 1.2  # of `like`: the largest size that is looked at


@dataclass(frozen=True, kw_only=True)
class Lifetime:
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    hardware: str = "h100"
    like: float = 13e9  # parameters
    served: list[float] = field(default_factory=lambda: list(SERVED))  # tokens in its life
    precision: str = "bf16"
    prompt: int = 1000
    new_tokens: int = 250
    decode_batch: int = 32
    training_mfu: float | None = None  # None: as others published
    prefill_mfu: float | None = None
    decode_mbu: float | None = None
    busy: float = 1.0
    price_per_hour: float | None = None
    training_price_per_hour: float | None = None
    run_dir: str = ""

    def __post_init__(self) -> None:
        within("like", self.like, 1e7, 1e13)
        if not self.served:
            raise BadInput("served=[] names no number of tokens; write served=[1e12]")
        for served in self.served:
            within("served", served, 1, 1e18)
        one_of("precision", self.precision, ("fp32", "bf16"))


def assumed(config: Lifetime, hardware: Hardware) -> Assumptions:
    key = next((key for key, known in TABLE.items() if known.name == hardware.name), None)
    works = {"training_mfu": "training", "prefill_mfu": "prefill", "decode_mbu": "decode"}
    shares: dict[str, Any] = {
        name: getattr(config, name) or efficiency.share(work, key).value for name, work in works.items()
    }
    keys = ("precision", "prompt", "new_tokens", "decode_batch", "busy", "price_per_hour", "training_price_per_hour")
    own: dict[str, Any] = {name: getattr(config, name) for name in keys}
    return Assumptions(**shares, **own, training_length=4096)


def told(config: Lifetime, quantity: str, value: float, **more: Any) -> Row:
    about: RowFields = {"life": "training", "phase": "run", "per": "run", "provenance": "predicted"}
    own: Any = {key: more.pop(key) for key in ("unit", "convention", "warnings", "life") if key in more}
    at = {"goal": f"the loss of {units.count(config.like)} parameters", "hardware": config.hardware}
    return row_of("lifetime", about, own, quantity=quantity, value=value, conditions=at | more)


def rows(config: Lifetime, hardware: Hardware) -> Iterator[Row]:
    wanted, asked = loss(config.like, chinchilla_tokens(config.like)), assumed(config, hardware)
    shares = {key: getattr(asked, key) for key in ("training_mfu", "prefill_mfu", "decode_mbu", "decode_batch")}
    at = shares | {"prompt": asked.prompt, "new_tokens": asked.new_tokens, "dtype": asked.precision}
    yield told(config, "loss", wanted, life="training", goal_nats=wanted)
    every = lives(wanted, asked, hardware, largest=DRAWN * config.like)
    for served in config.served:
        yield from in_flops(config, wanted, served)
        for counted in COUNTED[1:]:
            if counted in every[0].served_token:
                yield from in_cost(config, every, counted, served, **at)
    for life in every:
        middle = config.served[len(config.served) // 2]
        more = {"parameters": life.parameters, "trained_tokens": life.tokens, "counted": "device time"}
        total = life.cost("device time", middle)
        yield told(config, "time", total, life="inference", served_tokens=middle, **more)


def in_flops(config: Lifetime, wanted: float, served: float) -> Iterator[Row]:
    def cost(size: float) -> float:
        return optimal_size.lifetime_flops(wanted, size, served)

    size, price = optimal_size.cheapest(sizes_below(config.like), cost)
    tokens = optimal_size.tokens_for(wanted, size)
    yield from best(config, FLOPS, served, size, tokens, 1 - price / cost(config.like))


def in_cost(config: Lifetime, every: list[Life], counted: str, served: float, **at: Any) -> Iterator[Row]:
    life = min(every, key=lambda life: life.cost(counted, served))
    near = min(every, key=lambda life: abs(life.parameters - config.like))
    saved = 1 - life.cost(counted, served) / near.cost(counted, served)
    yield from best(config, counted, served, life.parameters, life.tokens, saved, **at)


def best(
    config: Lifetime, counted: str, served: float, size: float, tokens: float, saved: float, **at: Any
) -> Iterator[Row]:
    more = {"counted": counted, "served_tokens": served, "trained_tokens": tokens, **at}
    ratio = tokens / size
    far = (f"{ratio:.0f} training tokens a parameter: beyond what the law was fitted on",)
    warnings = far if ratio > optimal_size.FITTED else ()
    yield told(config, "cheapest size", float(size), warnings=warnings, **more)
    yield told(config, "saved", saved, **more)


def table(results: Results) -> Any:
    from isoforward.show.tables import plain_table

    columns = ("served tokens", "counted in", "cheapest", "trained on", "a parameter", "saved")
    shown = plain_table(*columns, left=("counted in",))
    for row in select(results, quantity="cheapest size"):
        at = row.conditions
        saved = only(results, quantity="saved", counted=at["counted"], served_tokens=at["served_tokens"])
        shown.add_row(
            units.count(row.setting("served_tokens")),
            str(at["counted"]),
            units.count(row.number),
            units.count(row.setting("trained_tokens")),
            f"{row.setting('trained_tokens') / row.number:.0f}",
            f"{saved.number:.0%}",
        )
    return shown


def answer(results: Results) -> str:
    goal = results.rows[0].conditions["goal"]
    demands = list(dict.fromkeys(r.setting("served_tokens") for r in select(results, quantity="cheapest size")))
    middle = demands[len(demands) // 2]
    said = []
    for counted in COUNTED[:2]:
        at = {"counted": counted, "served_tokens": middle}
        size, saved = only(results, quantity="cheapest size", **at), only(results, quantity="saved", **at)
        tokens = units.count(size.setting("trained_tokens"))
        said.append(f"{units.count(size.number)} in {counted} ({tokens} training tokens, {saved.number:.0%} saved)")
    last = [only(results, quantity="cheapest size", counted=c, served_tokens=demands[-1]).number for c in COUNTED[:2]]
    return (
        f"For {goal} and {units.count(middle)} served tokens the cheapest model has {said[0]}, and {said[1]}; "
        f"for {units.count(demands[-1])}, {units.count(last[0])} and {units.count(last[1])}."
    )


def shown(console: "Console", results: Results) -> None:
    from isoforward.show.tables import verdicts

    console.print(table(results))
    verdicts(console, results)


def main(config: Lifetime) -> None:
    hardware = lookup(config.hardware)
    if config.precision not in hardware.peak_flops_per_s:
        raise BadInput(f"precision={config.precision}: the rate of {hardware.name} is not known; choose another")
    predicted = list(rows(config, hardware))  # refuses before anything heavy is loaded, or written

    from isoforward.app.telling import tell_predictions

    doubts = dict.fromkeys(warning for row in predicted for warning in row.warnings[:1])
    reasons = ("nothing was measured: a law of losses and published shares of peaks", *list(doubts)[:1])
    tell_predictions(config, predicted, reasons, answer, shown)


if __name__ == "__main__":
    sys.exit(run(main, Lifetime))
