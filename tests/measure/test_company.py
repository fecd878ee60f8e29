"""What a sequence's logits depend on: exactly, on nothing but its tokens."""

import pytest
import torch

from isoforward.base.errors import BadInput
from isoforward.formats.export import freeze
from isoforward.measure import mismatch
from isoforward.measure.case import Case
from isoforward.measure.company import changes, company_rows
from isoforward.model.gpt import GPT
from isoforward.serve import decoding
from isoforward.serve.exact import use_exact
from tests.conftest import lively, tiny


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    return torch.randint(61, (64, 20), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_decoding_depends_on_nothing_else_in_the_batch(dtype: torch.dtype, texts: torch.Tensor) -> None:
    model = freeze(lively(GPT(tiny(), dtype=dtype)))
    use_exact(model)
    found = {change: differing() for change, differing in changes(model, texts, exact=True).items()}
    assert found == dict.fromkeys(found, 0)
    assert {"batch 4", "batch 16", "batch 64", "place in the batch", "left padding"} < set(found)


def test_usual_decoding_in_fp32_depends_on_its_batch(texts: torch.Tensor) -> None:
    assert changes(freeze(lively(GPT(tiny()))), texts, exact=False)["batch 64"]() > 0


def test_a_batch_that_memory_does_not_hold_is_a_row_that_says_so(
    texts: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for = decoding.room_for

    def of_few(model: GPT, *, batch: int, **how: object) -> object:
        if batch == 64:
            raise BadInput("the KV cache of 64 x 20 positions takes too much")
        return room_for(model, batch=batch, **how)  # type: ignore[arg-type]  # as it is asked

    monkeypatch.setattr(mismatch, "room_for", of_few)
    model = freeze(lively(GPT(tiny())))
    case = Case(experiment="mismatch", model=model.config)
    rows = list(company_rows(case, model, texts, exact=False, way="usual"))
    missing = {row.conditions["change"]: row.reason for row in rows if row.value is None}
    assert missing == {"batch 64": "the KV cache of 64 x 20 positions takes too much"}
    assert len(rows) == 6
