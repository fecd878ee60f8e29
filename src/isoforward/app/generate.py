"""What `python generate.py` does: text to stdout as it comes, figures to stderr."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from isoforward.base.config import GenerateConfig
from isoforward.base.errors import BadInput
from isoforward.base.units import several
from isoforward.data.text import NotText, decoded
from isoforward.formats.untrusted import harmless
from isoforward.serve.continuation import Continuation
from isoforward.serve.decoding import Pass, Sampling
from isoforward.serve.inference import InferenceModule, load


def generate(config: GenerateConfig) -> None:
    prompts = read_prompts(config)
    module = load(
        config.checkpoint,
        precision=config.precision,
        draft=config.draft,
        draft_tokens=config.draft_tokens,
        compile=config.compile,
        batch=len(prompts),
        exact=config.exact,
        lora=config.lora,
    )
    if config.compile:
        say("the first decode pass compiles the step, for half a minute where nothing is kept from before")
    ids = [encoded(module, prompt, config) for prompt in prompts]
    if config.logprobs or config.prompts_file is not None:
        batch(module, prompts, ids, config)
    else:
        one(module, prompts[0], ids[0], config)


def sampling_of(config: GenerateConfig) -> Sampling:
    return Sampling(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
    )


def encoded(module: InferenceModule, prompt: str, config: GenerateConfig) -> list[int]:
    if config.chat:
        return module.encode_chat(prompt)
    spelt = [] if config.parse_special else sorted(token for token in module.tokenizer.special if token in prompt)
    if spelt:
        say(f"{spelt[0]} in the prompt is read as text; parse_special=true makes it the special token")
    return module.encode(prompt, template=config.add_special_tokens, special=config.parse_special)


def read_prompts(config: GenerateConfig) -> list[str]:
    if config.prompts_file is None:
        return [config.prompt or ""]
    path = Path(config.prompts_file)
    try:
        with path.open("rb") as file:
            prompts = "".join(decoded(file)).splitlines()
    except OSError as error:
        raise BadInput(f"prompts_file={path} cannot be read: {error.strerror}") from error
    except NotText as error:
        raise BadInput(f"prompts_file={path} {error}") from error
    if not prompts:
        raise BadInput(f"prompts_file={path} is empty; write a prompt a line")
    return prompts


def one(module: InferenceModule, prompt: str, ids: list[int], config: GenerateConfig) -> None:
    passes: list[Pass] = []
    before = "" if config.chat else prompt  # of a chat the answer alone is shown
    explain, as_page = (str(config.explain).lower() == way for way in ("true", "html"))
    if as_page:
        from isoforward.lesson.page import refuse_unpackable

        refuse_unpackable(module)
    if explain:
        say(EXPLANATION)
    whole = ""
    for text, step in module.stream(
        ids, max_new_tokens=config.max_new_tokens, sampling=sampling_of(config), stop=config.stop, cache=config.cache
    ):
        if not passes or passes[-1] is not step:
            passes.append(step)
            if explain:
                say(explained(module, len(passes), step))
            elif config.stream and len(passes) == 1:
                write(before)
        if config.stream and not explain:
            write(text)
        whole += text
    if explain or not config.stream or not passes:
        write(before + whole)
    write("\n")
    say(figures(passes, cache=config.cache, compiled=config.compile))
    given = sum(len(step.tokens) for step in passes)
    if passes and given < config.max_new_tokens and passes[-1].context == module.model.config.context:
        say(f"the context of {module.model.config.context} tokens is full")
    if as_page:
        from isoforward.lesson.page import write_generation

        say(f"page     {write_generation(module, config.checkpoint, prompt, passes, Path('generation.html'))}")


def batch(module: InferenceModule, prompts: list[str], ids: list[list[int]], config: GenerateConfig) -> None:
    start = time.perf_counter()
    rows = module.complete(
        ids,
        max_new_tokens=config.max_new_tokens,
        sampling=sampling_of(config),
        stop=config.stop,
        cache=config.cache,
        logprobs=config.logprobs,
    )
    time_s = time.perf_counter() - start
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True), start=1):
        if config.logprobs:
            write(scored(row, None if config.prompts_file is None else number))
        else:
            write(f"{prompt}\n{row.text}\n\n" if config.chat else f"{prompt}{row.text}\n\n")
    context = module.model.config.context
    for number, row in enumerate(rows, start=1):
        if row.fills(context) and len(row.tokens) < config.max_new_tokens:
            which = "" if config.prompts_file is None else f"prompt {number}: "
            say(f"{which}the context of {context} tokens is full after {len(row.tokens)} new ones")
    what = "1 prompt" if len(prompts) == 1 else f"{len(prompts)} prompts as one batch"
    say(f"{what} in {time_s:.2f} s" + (", compiling included" if config.compile else ""))


def scored(row: Continuation, prompt: int | None) -> str:
    """A JSON line for each token, its log-probability under the model's own distribution: before any penalty,
    temperature and cut. The texts together are the continuation.
    """
    which = {} if prompt is None else {"prompt": prompt}
    return "".join(
        json.dumps({**which, "token": token, "text": text, "logprob": logprob}) + "\n"
        for token, text, logprob in zip(row.tokens, row.pieces, row.logprobs, strict=True)
    )


EXPLANATION = "Each line is one forward pass: what it could see, its five likeliest next tokens, the one chosen."


def explained(module: InferenceModule, number: int, step: Pass) -> str:
    """A line for each token that the pass gave: with a draft there can be several."""
    kind = "prefill" if number == 1 else "decode "
    about = f"{number:4d} {kind} sees {step.context:4d} {step.time_s * 1e3:7.2f} ms  "
    name = module.tokenizer.decode
    lines = []
    for token, scores in zip(step.tokens, step.scores, strict=True):
        probability = scores.float().softmax(-1)
        likeliest = probability.topk(min(5, len(probability)))
        thoughts = "  ".join(
            f"{name([int(i)])!r} {p:.1%}" for p, i in zip(likeliest.values, likeliest.indices, strict=True)
        )
        lines.append(f"{about}{thoughts}  -> {name([token])!r}")
        about = " " * len(about)
    return "\n".join(lines)


def figures(passes: list[Pass], *, cache: bool, compiled: bool) -> str:
    """TTFT: start of the prompt's forward to its first token chosen. TPOT: later passes' time by their tokens, without
    the one that compiled the step.
    """
    if not passes:
        return "no token was asked for"
    line, later = f"TTFT {passes[0].time_s * 1e3:.1f} ms for {several(passes[0].context, 'prompt token')}", passes[1:]
    if compiled and later:
        line += f" · {later[0].time_s:.1f} s to compile the step"
        later = later[1:]
    if later:
        time_s, tokens = sum(step.time_s for step in later), sum(len(step.tokens) for step in later)
        line += f" · TPOT {time_s / tokens * 1e3:.2f} ms · {tokens / time_s:.0f} tokens/s over {tokens} decoded"
        if tokens > len(later):
            line += f" in {several(len(later), 'forward pass')}"
    return line + ("" if cache else " · without KV cache")


def write(text: str) -> None:
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
