"""Does a small model that proposes tokens make a large one faster, and how often is it right?

    python experiments/speculate.py checkpoint=BIG draft=SMALL
    python experiments/speculate.py checkpoint=BIG draft=SMALL draft_tokens=[2,4] temperature=0

BIG and SMALL are exports or run directories of models trained with the same tokenizer. The same prompt and seeds run
with and without the draft, in turns, for several lengths of proposal.

:chapter: Serving
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from isoforward.app.command_line import run
from isoforward.app.question import ask
from isoforward.base import units
from isoforward.base.config import ExperimentConfig, at_least
from isoforward.base.errors import BadInput
from isoforward.base.estimates import judge, ratio, summarise
from isoforward.base.results import Results, Row
from isoforward.formats.export import freeze
from isoforward.measure.case import Case, Laps, batch_of, identity_row, master_of, record, row, spent, timed
from isoforward.serve.decoding import Pass, Sampling
from isoforward.serve.inference import InferenceModule, load
from isoforward.show.compare import only


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


def generation(case: Case, module: InferenceModule, packed: dict) -> Callable[[], dict[str, float]]:
    """Of one text, another in each round: seconds a token, tokens a forward of the large model, forwards."""
    ids, count = module.encode(packed["prompt"]), case.new_tokens
    rounds = iter(range(case.seed, 2**63))

    def write() -> dict[str, float]:
        passes: list[Pass] = []
        sampling = Sampling(temperature=packed["temperature"], seed=next(rounds))
        time_s = spent(
            case, lambda: passes.extend(module.passes(module.model, [ids], max_new_tokens=count, sampling=sampling))
        )
        return {"token": time_s / count, "gained": (count - 1) / (len(passes) - 1)}

    return write


def measure(packed: dict) -> str:
    case = Case.unpack(packed["case"])
    alone = load(str(case.export), precision=case.precision)
    drafts = {
        n: load(str(case.export), precision=case.precision, draft=packed["draft"], draft_tokens=n)
        for n in packed["counts"]
    }
    candidates = {"0": generation(case, alone, packed)}
    candidates |= {f"{n}": generation(case, module, packed) for n, module in drafts.items()}
    master = master_of(case)
    identity = identity_row(case, master, freeze(master), batch_of(case)[0][:1])

    def tell(laps: Laps, cold: Laps) -> Iterator[Row]:
        yield identity
        at = {"life": "inference", "phase": "decode", "per": "token"}
        for name, rounds in laps.items():
            n = int(name)
            conditions = case.conditions(draft_tokens=n, temperature=packed["temperature"], new_tokens=case.new_tokens)
            if n:
                conditions["forward"] = "several rows at once"  # the last bits may differ from one row's
            yield row(case, **at, **timed([lap["token"] for lap in rounds]), conditions=conditions)
            gained = summarise([lap["gained"] for lap in rounds])
            about = {"quantity": "tokens a forward", "unit": "token", "low": gained.low, "high": gained.high}
            yield row(case, **at, **about, value=gained.median, samples=gained.samples, conditions=conditions)
            if n:
                # E. Leviathan 2023, definition 3.1: here the share of proposals that stayed
                share = summarise([(lap["gained"] - 1) / n for lap in rounds])
                about = {"quantity": "accepted", "unit": "of proposals", "low": share.low, "high": share.high}
                yield row(case, **at, **about, value=share.median, samples=share.samples, conditions=conditions)

    return record(packed, candidates, tell)


def answer(results: Results) -> str:
    alone = only(results, quantity="time", draft_tokens=0)
    counts = sorted(
        {int(one.conditions["draft_tokens"]) for one in results.rows if "draft_tokens" in one.conditions} - {0}
    )
    told = []
    for n in counts:
        time, gained, share = (
            only(results, quantity=q, draft_tokens=n) for q in ("time", "tokens a forward", "accepted")
        )
        found = judge(ratio(time.samples, alone.samples))
        speed = f"{1 / found.ratio.value:.2f}x as fast ({1 / found.ratio.high:.2f} to {1 / found.ratio.low:.2f})"
        told.append(f"{n} proposed: {share.value:.0%} accepted, {gained.value:.2f} tokens a forward, {speed}")
    return f"Alone the large model takes {units.seconds(alone.value)} a token. With a draft, {'; '.join(told)}."


def main(config: Speculate) -> None:
    if config.checkpoint is None or config.draft is None:
        raise BadInput("two trained models are needed: write checkpoint=BIG draft=SMALL, two runs of one tokenizer")
    load(config.checkpoint, draft=config.draft)  # refused before anything is written
    more = {"draft": str(Path(config.draft).resolve()), "counts": config.draft_tokens}
    ask(config, "speculate", "speculate:measure", answer, **more, prompt=config.prompt, temperature=config.temperature)


if __name__ == "__main__":
    sys.exit(run(main, Speculate))
