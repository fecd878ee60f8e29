"""What `python generate.py` does: text to stdout as it comes, figures to stderr."""

from __future__ import annotations

import sys
from pathlib import Path

from isoforward.base.config import GenerateConfig
from isoforward.base.errors import BadInput
from isoforward.formats.untrusted import harmless
from isoforward.serve.decoding import Pass, Sampling
from isoforward.serve.inference import InferenceModule, load


def generate(config: GenerateConfig) -> None:
    sampling = Sampling(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
    )
    prompts = read_prompts(config)
    if config.compile:
        say("the first decode pass compiles the step, for half a minute where nothing is kept from before")
    module = load(
        config.checkpoint,
        precision=config.precision,
        draft=config.draft,
        draft_tokens=config.draft_tokens,
        compile=config.compile,
    )
    if isinstance(prompts, list):
        batch(module, prompts, config)
    else:
        one(module, prompts, config, sampling)


def read_prompts(config: GenerateConfig) -> str | list[str]:
    if config.prompts_file is None:
        return config.prompt if config.prompt is not None else ""
    path = Path(config.prompts_file)
    try:
        prompts = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BadInput(f"prompts_file={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"prompts_file={path} is not UTF-8 at byte {error.start}") from error
    if not prompts:
        raise BadInput(f"prompts_file={path} is empty; write a prompt a line")
    return prompts


def one(module: InferenceModule, prompt: str, config: GenerateConfig, sampling: Sampling) -> None:
    passes: list[Pass] = []
    if config.explain:
        say(EXPLANATION)
    whole = ""
    for text, step in module.stream(
        prompt, max_new_tokens=config.max_new_tokens, sampling=sampling, stop=config.stop, cache=config.cache
    ):
        if not passes or passes[-1] is not step:
            passes.append(step)
            if config.explain:
                say(explained(module, len(passes), step))
            elif config.stream and len(passes) == 1:
                write(prompt)
        if config.stream and not config.explain:
            write(text)
        whole += text
    if config.explain or not config.stream or not passes:
        write(prompt + whole)
    write("\n")
    say(figures(passes, cache=config.cache, compiled=config.compile))
    given = sum(len(step.tokens) for step in passes)
    if passes and given < config.max_new_tokens and passes[-1].context == module.model.config.context:
        say(f"the context of {module.model.config.context} tokens is full")


def batch(module: InferenceModule, prompts: list[str], config: GenerateConfig) -> None:
    import time

    start = time.perf_counter()
    texts = module.generate(
        prompts,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        stop=config.stop,
        seed=config.seed,
        cache=config.cache,
    )
    time_s = time.perf_counter() - start
    for prompt, text in zip(prompts, texts, strict=True):
        write(f"{prompt}{text}\n\n")
    say(f"{len(prompts)} prompts as one batch in {time_s:.2f} s" + (", compiling included" if config.compile else ""))


EXPLANATION = "Each line is one forward pass: what it could see, its five likeliest next tokens, the one chosen."


def explained(module: InferenceModule, number: int, step: Pass) -> str:
    """A line for each token that the pass gave: with a draft there can be several."""
    kind = "prefill" if number == 1 else "decode "
    about = f"{number:4d} {kind} sees {step.context:4d} {step.time_s * 1e3:7.2f} ms  "
    name = module.tokenizer.decode
    lines = []
    for token, logits in zip(step.tokens, step.logits, strict=True):
        probability = logits.float().softmax(-1)
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
    line, later = f"TTFT {passes[0].time_s * 1e3:.1f} ms for {passes[0].context} prompt tokens", passes[1:]
    if compiled and later:
        line += f" · {later[0].time_s:.1f} s to compile the step"
        later = later[1:]
    if later:
        time_s, tokens = sum(step.time_s for step in later), sum(len(step.tokens) for step in later)
        line += f" · TPOT {time_s / tokens * 1e3:.2f} ms · {tokens / time_s:.0f} tokens/s over {tokens} decoded"
        if tokens > len(later):
            line += f" in {len(later)} forward passes"
    return line + ("" if cache else " · without KV cache")


def write(text: str) -> None:
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
