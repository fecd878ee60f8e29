"""What do the same weights cost in Transformers' own training step and `generate`, and in llama.cpp?

    python experiments/peers.py
    python experiments/peers.py checkpoint=runs/latest
    python experiments/peers.py model=gpt2 data.batch=1 data.length=128 measure.budget=20 compile=true

All three hold the same numbers and give the same logits. Every phase runs in each of them in turn, in one process.
llama.cpp is measured where it is installed: pip install llama-cpp-python, which builds for some minutes.
compile=true measures our compiled decoding step beside the eager one. With precision=bf16 Transformers trains bf16
weights, as it loads them; we train fp32 weights that are cast where they are used.

:chapter: Training against inference
:unread: measure.context measure.energy optim.min_lr optim.schedule optim.warmup_steps
"""

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from isoforward.app.command_line import run
from isoforward.app.question import asking, at_most, case_of
from isoforward.base import units
from isoforward.base.config import ExperimentConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, RowFields, only
from isoforward.base.vocabulary import TRAINING
from isoforward.formats.export import export, freeze
from isoforward.formats.gguf_writing import write_gguf
from isoforward.measure.benchmark import Measured, Part, Work, part_by_part, timed
from isoforward.measure.case import Case, batch_of, frozen_of, identity_row, master_of
from isoforward.measure.memory import HONEST_MALLOC, account
from isoforward.measure.passes import Bench, call_apart, measured_or_refused
from isoforward.measure.train_and_serve import Training
from isoforward.measure.transformers_lives import audit, optimizer_of
from isoforward.model.gpt import GPT
from isoforward.serve.decoding import Sampling, forward_passes
from isoforward.serve.inference import DTYPES
from isoforward.serve.transformers_model import Wrapped, load_wrapped

OURS, THEIRS, COMPILED, LLAMA_CPP = "isoforward", "transformers", "isoforward compiled", "llama.cpp"
PROMPTS = (16, 128, 1024)
GGML_TYPES = {"fp32": 0, "bf16": 30}


def prompts(case: Case) -> list[int]:
    """Those that leave room for a token more."""
    return [n for n in PROMPTS if n < case.model.context] or [case.model.context - 1]


Generate = Callable[[int, int], object]  # of a prompt of so many tokens so many more, greedily


def our_serving(model: GPT, text: torch.Tensor, *, compile: bool) -> Generate:
    def generate(prompt: int, new_tokens: int) -> object:
        ids = text[0, :prompt].tolist()
        greedy = Sampling(temperature=0)
        return list(forward_passes(model, [ids], max_new_tokens=new_tokens, sampling=greedy, compile=compile))

    return generate


def their_serving(model: Any, text: torch.Tensor) -> Generate:
    def generate(prompt: int, new_tokens: int) -> object:
        ids = text[:, :prompt]
        exactly = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=None, **exactly)

    return generate


class LlamaCpp:
    """The same weights in a GGUF file; its cache is of their dtype. No tokenizer is needed."""

    def __init__(self, case: Case, model: GPT, text: torch.Tensor) -> None:
        from llama_cpp import Llama, llama_get_logits_ith

        self.raw_logits = llama_get_logits_ith
        self.text = text[0].tolist()
        with tempfile.TemporaryDirectory() as directory:
            path = write_gguf(model, Path(directory) / "model.gguf")
            threads = case.threads or torch.get_num_threads()
            cached = GGML_TYPES[case.precision]
            self.llama = Llama(
                str(path),
                n_ctx=case.model.context,
                n_threads=threads,
                n_threads_batch=threads,
                type_k=cached,
                type_v=cached,
                use_mmap=False,
                verbose=False,
            )

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """After the last of tokens (1, T), (V,)"""
        self.llama.reset()
        self.llama.eval(tokens[0].tolist())
        return torch.tensor(self.raw_logits(self.llama.ctx, -1)[: self.llama.n_vocab()])

    def generate(self, prompt: int, new_tokens: int) -> object:
        self.llama.reset()
        stream = self.llama.generate(self.text[:prompt], temp=0.0)
        return [next(stream) for _ in range(new_tokens)]


def serving(case: Case, generate: Generate, lengths: list[int], peer: str) -> list[Work]:
    """Prefill is a generation of one token; decode what each token more takes."""

    def prefill(prompt: int) -> Work:
        conditions = case.conditions(batch=1, prompt=prompt, tokens=prompt, peer=peer)
        part = Part(life="inference", phase="prefill", per="sequence", conditions=conditions)
        return timed(case.clock, part, partial(generate, prompt, 1))

    conditions = case.conditions(batch=1, prompt=case.prompt, new_tokens=case.new_tokens, tokens=1, peer=peer)
    part = Part(life="inference", phase="decode", per="token", conditions=conditions)
    first = timed(case.clock, part, partial(generate, case.prompt, 1))
    whole = timed(case.clock, part, partial(generate, case.prompt, case.new_tokens))

    def decode(n: int) -> Sequence[float]:
        (whole_s,), (first_s,) = whole.run(n), first.run(n)
        return ((whole_s - first_s) / (case.new_tokens - 1),)

    return [*(prefill(n) for n in lengths), Work(parts=(part,), run=decode)]


def their_step(case: Case, wrapped: Wrapped, tokens: torch.Tensor) -> Callable[[], object]:
    """As their guide writes it: labels go in, and the loss, its labels shifted inside, comes out with the logits."""
    optimizer = optimizer_of(wrapped, case.optim)

    def step() -> None:
        loss = wrapped.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), case.optim.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench(case: Case, weights: str) -> Bench:
    """Every phase of ours against the same phase of each peer."""
    compiles, case = case.compile, dataclasses.replace(case, compile=False)  # only our decoding is compiled
    master = master_of(case)
    frozen = frozen_of(case, master)
    dtype = DTYPES[case.precision]
    wrapped = load_wrapped(Path(weights), dtype=dtype, device=case.device)
    served = load_wrapped(Path(weights), dtype=dtype, device=case.device).model.eval()
    tokens, targets = batch_of(case)
    reach = max(*prompts(case), case.prompt) + case.new_tokens
    text = tokens.flatten().repeat(-(-reach // tokens.numel()))[None]
    identity = identity_row(case, master, frozen, tokens[:1])
    with torch.inference_mode():
        logits = frozen(tokens[:1]).float()
        apart = {THEIRS: float((logits - served(tokens[:1]).logits).abs().max())}
    serves = {OURS: our_serving(frozen, text, compile=False), THEIRS: their_serving(served, text)}
    if compiles:
        serves[COMPILED] = our_serving(frozen, text, compile=True)
    if find_spec("llama_cpp") is not None:
        llama = LlamaCpp(case, frozen, text)
        apart[LLAMA_CPP] = float((logits[0, -1] - llama.logits(tokens[:1])).abs().max())
        serves[LLAMA_CPP] = llama.generate
    ours = Training(case, master, tokens, targets)
    theirs = Training(case, wrapped, tokens, targets, optimizer=optimizer_of(wrapped, case.optim))
    own_step = timed(case.clock, case.step("step"), their_step(case, wrapped, tokens))
    training = {
        OURS: [work.labelled(peer=OURS) for work in (ours.phased, ours.whole)],
        THEIRS: [work.labelled(peer=THEIRS) for work in (theirs.phased, own_step)],
    }
    serving_works = {
        peer: serving(case, generate, [] if peer == COMPILED else prompts(case), peer)  # prefill is not compiled
        for peer, generate in serves.items()
    }
    pairs = part_by_part(training[OURS], training[THEIRS])
    for peer, works in serving_works.items():
        if peer == COMPILED:
            pairs += [(works[-1].part, serving_works[other][-1].part) for other in serves if other != COMPILED]
        elif peer != OURS:
            pairs += part_by_part(serving_works[OURS], works)

    def rows(measured: Measured) -> Iterator[Row]:
        yield identity
        about: RowFields = {
            "life": "inference",
            "phase": "forward",
            "quantity": "difference",
            "unit": "logit",
            "per": "run",
        }
        for peer, difference in apart.items():
            yield case.row(about, value=difference, conditions=case.conditions(peer=peer))

    works = [work for each in (*training.values(), *serving_works.values()) for work in each]
    return Bench(works=works, pairs=pairs, rows=rows)


def memory_rows(case: Case, weights: str) -> Iterator[Row]:
    """The highest peak of any phase, each life and each peer in a process of its own."""
    wrapped = dataclasses.replace(case, model=dataclasses.replace(case.model, source="transformers", path=weights))
    for life, phase, per in (("training", "step", "step"), ("generation", "run", "sequence")):
        own = measured_or_refused(account(case, life), f"the memory of {life}")
        theirs = call_apart(audit, wrapped, life, threads=case.threads, env=HONEST_MALLOC, what="memory")
        for peer, found in ((OURS, own.measured), (THEIRS, theirs)):
            about: RowFields = {"life": "training" if life == "training" else "inference", "phase": phase, "per": per}
            conditions = case.conditions(peer=peer)
            yield case.row(about, quantity="memory", value=float(max(found.values())), conditions=conditions)


def told_against(results: Results, peer: str, asked: list[tuple[str, str, Any]]) -> str:
    """Our time as a multiple of theirs, phase by phase, by what can be said of it."""
    told: dict[str, list[str]] = {"faster": [], "slower": [], "equal": [], "undecided": []}
    for life, phase, prompt in asked:
        ours, theirs = (
            only(results, quantity="time", life=life, phase=phase, prompt=prompt, peer=one) for one in (OURS, peer)
        )
        found = results.judge(ours, theirs)
        name = f"{phase} of {prompt}" if phase == "prefill" else phase
        told[found.outcome].append(f"{name} {found.sentence()}")
    return "; ".join(names for each in told.values() for names in each)


def answer(results: Results) -> str:
    serving = sorted(
        {("inference", r.phase, r.conditions["prompt"]) for r in results.rows if r.phase in ("prefill", "decode")},
        key=lambda one: (one[1] == "decode", one[2]),
    )
    training = [("training", phase, None) for phase in (*TRAINING, "step")]
    memory = []
    for life in ("training", "inference"):
        ours, theirs = (only(results, quantity="memory", life=life, peer=peer) for peer in (OURS, THEIRS))
        memory.append(f"{life} {units.times(ours.number / theirs.number)}")
    told = [
        f"Time against Transformers on the same weights: {told_against(results, THEIRS, training + serving)}.",
        f"Peak memory: {', '.join(memory)}.",
    ]
    if ours.conditions.get("dtype") == "bf16":
        told.append("Transformers trains weights in bf16, we train fp32 ones.")
    served = {r.conditions.get("peer") for r in results.rows if r.phase == "decode"}
    if LLAMA_CPP in served:
        told.append(f"Against {LLAMA_CPP}: {told_against(results, LLAMA_CPP, serving)}.")
    if COMPILED in served:
        told.append(compiled_against(results, [peer for peer in (OURS, THEIRS, LLAMA_CPP) if peer in served]))
    return " ".join(told)


def compiled_against(results: Results, peers: list[str]) -> str:
    told = []
    for peer in peers:
        ours, theirs = (only(results, quantity="time", phase="decode", peer=one) for one in (COMPILED, peer))
        told.append(f"against {peer} {results.judge(ours, theirs).sentence()}")
    return f"Decode, compiled: {'; '.join(told)}."


def main(config: ExperimentConfig) -> None:
    if find_spec("transformers") is None:
        raise BadInput("peers needs Transformers: pip install isoforward[hf]")
    with tempfile.TemporaryDirectory() as directory:
        case = case_of(config, "peers")
        weights = str(export(freeze(master_of(case)), Path(directory) / "export", tokenizer=None))
        with asking(config, answer) as run:
            run.say(f"measuring peers{at_most(config.measure)}")
            run.measure(case, bench, weights)
            run.add(memory_rows(dataclasses.replace(case, compile=False), weights))


if __name__ == "__main__":
    sys.exit(run(main, ExperimentConfig))
