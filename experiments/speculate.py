"""Does a small model that proposes tokens make a large one faster, and how often is it right?

    python experiments/speculate.py checkpoint=BIG draft=SMALL
    python experiments/speculate.py checkpoint=BIG draft=SMALL draft_tokens=[2,4] temperature=0

BIG and SMALL are exports or run directories of models trained with the same tokenizer. The same prompt and seeds run
with and without the draft, in turns, for several lengths of proposal.

:chapter: Serving
:unread: measure.context measure.energy optim.beta1 optim.beta2 optim.clip optim.lr optim.min_lr optim.momentum
optim.muon_lr optim.name optim.schedule optim.warmup_steps optim.weight_decay
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.checks import at_least
from isoforward.base.config import ExperimentConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, only
from isoforward.formats.export import freeze
from isoforward.measure.benchmark import Measured, Part, Work, timed
from isoforward.measure.case import Case, batch_of, identity_row, master_of
from isoforward.measure.passes import Bench, against_first, derived
from isoforward.serve.decoding import Pass, Sampling
from isoforward.serve.inference import InferenceModule, load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculate(ExperimentConfig):
    draft: str | None = None
    draft_tokens: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 4, 8])
    temperature: float = 0.8
    prompt: str = "ROMEO:"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("temperature", self.temperature, 0)
        for count in self.draft_tokens:
            at_least("draft_tokens", count, 1)


def generation(case: Case, module: InferenceModule, asked: Speculate, part: Part, gained: list[float]) -> Work:
    """Of one text, another in each sample; `gained` collects how many tokens a forward of the large model brought."""
    ids, count = module.encode(asked.prompt), case.new_tokens
    seeds = itertools.count(case.seed)

    def write() -> None:
        sampling = Sampling(temperature=asked.temperature, seed=next(seeds))
        passes: list[Pass] = list(module.passes(module.model, [ids], max_new_tokens=count, sampling=sampling))
        gained.append((count - 1) / (len(passes) - 1))

    return timed(case.clock, part, write, count=count)


def bench(case: Case, asked: Speculate) -> Bench:
    modules = {0: load(str(case.export), precision=case.precision)}
    for n in asked.draft_tokens:
        modules[n] = load(str(case.export), precision=case.precision, draft=asked.draft, draft_tokens=n)
    gained: dict[int, list[float]] = {n: [] for n in modules}
    works = [[generation(case, module, asked, part(case, asked, n), gained[n])] for n, module in modules.items()]
    master = master_of(case)
    identity = identity_row(case, master, freeze(master), batch_of(case)[0][:1])

    def rows(measured: Measured) -> Iterator[Row]:
        yield identity
        for n, samples in gained.items():
            yield derived(case, part(case, asked, n), samples, quantity="tokens a forward")
            if n:
                # E. Leviathan 2023, definition 3.1: here the share of proposals that stayed
                shares = [(each - 1) / n for each in samples]
                yield derived(case, part(case, asked, n), shares, quantity="accepted")

    return against_first(works, rows)


def part(case: Case, asked: Speculate, n: int) -> Part:
    conditions = case.conditions(draft_tokens=n, temperature=asked.temperature, new_tokens=case.new_tokens)
    if n:
        conditions["forward"] = "several rows at once"  # the last bits may differ from one row's
    return Part(life="inference", phase="decode", per="token", conditions=conditions)


def answer(results: Results) -> str:
    alone = only(results, quantity="time", draft_tokens=0)
    counts = sorted(
        {int(one.setting("draft_tokens")) for one in results.rows if "draft_tokens" in one.conditions} - {0}
    )
    told = []
    for n in counts:
        time, gained, share = (
            only(results, quantity=q, draft_tokens=n) for q in ("time", "tokens a forward", "accepted")
        )
        speed = f"time {results.judge(time, alone).sentence()}"
        told.append(f"{n} proposed: {share.value:.0%} accepted, {gained.value:.2f} tokens a forward, {speed}")
    return f"Alone the large model takes {units.seconds(alone.number)} a token. With a draft, {'; '.join(told)}."


def main(config: Speculate) -> None:
    if config.checkpoint is None or config.draft is None:
        raise BadInput("two trained models are needed: write checkpoint=BIG draft=SMALL, two runs of one tokenizer")
    load(config.checkpoint, draft=config.draft)  # refused before anything is written
    ask(config, "speculate", bench, answer, config)


if __name__ == "__main__":
    sys.exit(run(main, Speculate))
