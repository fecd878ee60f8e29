"""The question, whole, on a model as small as it gets, and an endpoint that goes wrong."""

import pytest
import torch
from rich.console import Console

from experiments import mismatch
from isoforward.base.config import MeasureConfig
from isoforward.base.errors import BadInput
from isoforward.base.results import Results, Row, only, select
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats.export import export, freeze
from isoforward.measure.benchmark import Measured
from isoforward.measure.case import Case, master_of
from isoforward.model.gpt import GPT
from isoforward.serve.decoding import Sampling, forward_passes
from isoforward.serve.endpoint import Answer
from tests.conftest import lively, tiny
from tests.planted import results_of

TOKENIZER = Tokenizer.from_characters(["the quick brown fox jumps over the lazy dog.\n"])
MEASURE = MeasureConfig(prompt=4, new_tokens=12)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = lively(GPT(tiny(vocab=TOKENIZER.vocabulary)))
    place = export(model, tmp_path_factory.mktemp("mismatch") / "export", tokenizer=TOKENIZER)
    return Case(experiment="mismatch", model=model.config, export=str(place), measure=MEASURE)


@pytest.fixture(scope="module")
def results(case: Case) -> Results:
    pytest.importorskip("transformers")
    nothing = Measured.__new__(Measured)
    return results_of(list(mismatch.bench(case, 16).rows(nothing)))


def test_exact_decoding_is_0_in_every_way_and_the_others_are_not(results: Results) -> None:
    largest = {
        (str(r.conditions["way"]), r.conditions["batch"]): float(r.value or 0) for r in rows(results, "difference")
    }
    exact = {way for way in largest if way[0].startswith("cached decode, exact")}
    assert len(exact) == 5
    assert all(largest[way] == 0 for way in exact)
    assert 0 < largest["cached decode", 1] < 1e-4 < largest["cached decode in bf16", 16] < 1
    assert 0 < largest["Transformers' generate", 16] < 1e-4


def rows(results: Results, quantity: str) -> list[Row]:
    return select(results, quantity=quantity, statistic="largest")


def test_the_answer_says_what_the_rows_say(results: Results) -> None:
    told = mismatch.answer(results)
    assert "Exact=true gives training's bits everywhere" in told
    assert "Norms, activations and casts move none" in told
    moved = only(results, quantity="moved by a kernel", kernel="products").value
    assert moved is not None
    assert moved > 0
    assert "products " in told
    assert "attention " in told


class Engine:
    """In place of a server: the checkpoint's own decoding, or another's, for so many answers."""

    def __init__(self, model: GPT, answers: int = 1000) -> None:
        self.own, self.answers, self.model = model, answers, "king"

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
    monkeypatch.setattr(mismatch, "Endpoint", lambda *_: engine)
    kept: list[Row] = []
    try:
        kept.extend(mismatch.endpoint_rows(case, "x", TOKENIZER, 6, Console(quiet=True)))
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


def test_no_server_is_one_message(case: Case) -> None:
    with pytest.raises(BadInput, match="start the server"):
        list(mismatch.endpoint_rows(case, "http://127.0.0.1:9/v1", TOKENIZER, 2, Console(quiet=True)))
