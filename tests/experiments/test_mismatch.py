"""The question, whole, on a model as small as it gets, and an endpoint that goes wrong."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from experiments import mismatch
from isoforward.base.config import MeasureConfig, ModelConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, only, select
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import export, freeze
from isoforward.measure.benchmark import Measured
from isoforward.measure.case import Case, master_of
from isoforward.model.gpt import GPT
from isoforward.serve import decoding
from isoforward.serve.compiled import one_more
from isoforward.serve.decoding import Sampling, forward_passes
from isoforward.serve.endpoint import Answer, Endpoint
from tests.conftest import lively, tiny
from tests.planted import results_of

TOKENIZER = Tokenizer.from_characters(["the quick brown fox jumps over the lazy dog.\n"])
MEASURE = MeasureConfig(prompt=4, new_tokens=12)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = lively(GPT(tiny(vocab=TOKENIZER.vocabulary, dropout=0.1)))
    place = export(model, tmp_path_factory.mktemp("mismatch") / "export", tokenizer=TOKENIZER)
    return Case(experiment="mismatch", model=model.config, export=str(place), measure=MEASURE)


@pytest.fixture(scope="module")
def results(case: Case) -> Iterator[Results]:
    """With the step that would be compiled in place of compiling."""
    pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "compiled_decode", lambda device: torch.inference_mode()(one_more))
        yield results_of(mismatch.comparisons(case, 6))


def test_exact_decoding_is_0_in_every_way_and_the_others_are_not(results: Results) -> None:
    largest = {
        (str(r.conditions["way"]), r.conditions["batch"]): float(r.value or 0) for r in rows(results, "difference")
    }
    exact = {way for way in largest if way[0].startswith("cached decode, exact")}
    assert {batch for _, batch in exact} == {1, 4, 16, 64}
    assert len(exact) == 6
    assert all(largest[way] == 0 for way in exact)
    assert 0 < largest["cached decode", 1] < 1e-4 < largest["cached decode in bf16", 64] < 1
    assert 0 < largest["Transformers' generate", 16] < 1e-4
    assert 0 < largest["cached decode, compiled", 4] < 1e-4


def test_rows_say_of_how_many_sequences_they_are(results: Results) -> None:
    told = {str(r.conditions["way"]): r.conditions["sequences"] for r in rows(results, "difference")}
    assert {told[way] for way in ("cached decode", "left-padded batch", "Transformers' generate")} == {6}
    assert {told[way] for way in ("uncached", "with a draft", "cached decode, compiled")} == {4}


def test_of_a_large_model_fewer_sequences_are_compared() -> None:
    gpt2 = ModelConfig(layers=12, heads=12, width=768, context=1024, vocab=50257)
    assert mismatch.Mismatch().compared(tiny()) == 64
    assert mismatch.Mismatch().compared(gpt2) == 3
    assert mismatch.Mismatch(sequences=7).compared(gpt2) == 7


def test_what_is_timed_in_every_process_holds_no_rows_that_need_no_clock(case: Case) -> None:
    bench = mismatch.bench(case)
    assert [(work.part.phase, work.part.conditions["way"]) for work in bench.works[:4]] == [
        ("prefill", "exact"),
        ("prefill", "usual"),
        ("decode", "exact"),
        ("decode", "usual"),
    ]
    assert list(bench.rows(Measured.__new__(Measured))) == []


def rows(results: Results, quantity: str) -> list[Row]:
    return select(results, quantity=quantity, statistic="largest")


def test_the_answer_says_what_the_rows_say(results: Results) -> None:
    told = mismatch.answer(results)
    assert "Under exact=true all have training's bits" in told
    assert "Norms, activations and casts move none" in told
    moved = only(results, quantity="moved by a kernel", kernel="products").value
    assert moved is not None
    assert moved > 0
    assert "products " in told
    assert "attention " in told


class Engine:
    """In place of a server: the checkpoint's own decoding, or another's, for so many answers."""

    def __init__(self, model: GPT, answers: int = 1000) -> None:
        self.own, self.answers, self.model, self.url = model, answers, "king", "x"

    def complete(self, prompt: list[int], *, new_tokens: int, temperature: float, seed: int) -> Answer:
        self.answers -= 1
        if self.answers < 0:
            raise BadInput("endpoint=x gives no answer (Connection refused)")
        sampling = Sampling(temperature=temperature, seed=seed)
        answer = Answer(prompt, [], [])
        for step in forward_passes(self.own, [prompt], max_new_tokens=new_tokens, sampling=sampling):
            answer.tokens.append(step.tokens[0])
            answer.logprobs.append(float(step.logits[0].float().log_softmax(-1)[step.tokens[0]]))
        return answer


def asked(case: Case, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Row], str]:
    """The rows that are kept, and the message."""
    kept: list[Row] = []
    try:
        kept.extend(mismatch.endpoint_rows(case, cast(Any, engine), 6, Console(quiet=True)))
    except BadInput as refusal:
        return kept, str(refusal)
    return kept, ""


def test_a_server_of_the_same_weights_is_compared(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, told = asked(case, Engine(freeze(master_of(case))), monkeypatch)
    assert told == ""
    (largest,) = rows(results_of(kept), "difference")
    assert largest.value is not None
    assert largest.value < 1e-5
    assert only(results_of(kept), quantity="agreed").value == 12


def test_what_was_measured_before_a_server_stops_is_kept(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, told = asked(case, Engine(freeze(master_of(case)), answers=3), monkeypatch)
    assert "gives no answer" in told
    assert len(rows(results_of(kept), "difference")) == 1


def test_a_server_that_never_answers_leaves_no_rows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, told = asked(case, Engine(freeze(master_of(case)), answers=0), monkeypatch)
    assert "gives no answer" in told
    assert kept == []


def test_another_model_is_known_by_its_tokens(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(99)
    other = GPT(case.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    kept, told = asked(case, Engine(freeze(other)), monkeypatch)
    assert f"serves another model than {case.export}" in told
    assert kept == []


def test_an_endpoint_needs_the_export_it_serves() -> None:
    with pytest.raises(BadInput, match="name it, checkpoint=runs/latest"):
        mismatch.Mismatch(endpoint="http://127.0.0.1:1/v1")


def test_compiled_decode_is_not_asked_for() -> None:
    with pytest.raises(BadInput, match="compiled decode is one of the ways"):
        mismatch.Mismatch(compile=True)


def test_no_server_is_one_message() -> None:
    with pytest.raises(BadInput, match="start the server"):
        mismatch.reached("http://127.0.0.1:9/v1", TOKENIZER)


def test_another_tokenizer_is_known_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(engine: Endpoint, path: str, body: Any, timeout_s: float) -> Any:
        if path == "models":
            return {"data": [{"id": "king"}]}
        return {"choices": [{"logprobs": {"tokens": ["zzz"], "token_logprobs": [-1.0]}}]}

    monkeypatch.setattr(Endpoint, "asked", asked)
    with pytest.raises(BadInput, match="another tokenizer than the checkpoint's: 'zzz' is a token there"):
        mismatch.reached("http://x/v1", TOKENIZER)


def test_more_tokens_than_the_context_are_refused_where_they_were_asked_for(case: Case) -> None:
    context = case.model.context
    with pytest.raises(BadInput, match=f"{context + 1} is longer than the model's context of {context}"):
        mismatch.refuse_cut(mismatch.Mismatch(measure=MeasureConfig(prompt=context - 9, new_tokens=10)), case)
    mismatch.refuse_cut(mismatch.Mismatch(), case)
