"""What our families answer is what cost.py and footprint.py say of them."""

from isoforward.model import cost, footprint
from isoforward.plan.published import MODELS
from isoforward.plan.subject import Known, Serving, Setup

LLAMA = Known(MODELS["llama3-8b"])


def test_parts_of_a_peak_add_up_to_it_and_the_state_is_known_by_name() -> None:
    held = LLAMA.training(Setup(batch=4, length=512, precision="fp32"), fused_norm=False)
    peaks = footprint.training_peaks(LLAMA.model, batch=4, length=512)
    assert {phase: parts.total for phase, parts in held.items()} == peaks
    assert held["optimizer"]["optimizer"] == 8 * 8030261248
    assert held["forward"]["gradients"] == 0


def test_caches_are_128_kib_a_token_of_each_user() -> None:
    """2 x 32 layers x 8 heads x 128 x 2 bytes."""
    assert LLAMA.kv_bytes(Serving(users=3, prompt=90, new_tokens=10)) == 3 * 100 * 131072


def test_accumulating_computes_the_same_and_moves_the_weights_more_often() -> None:
    once, often = (LLAMA.step(Setup(batch=8, length=512, accumulate=n)) for n in (1, 8))
    assert once.flops == often.flops
    assert once.moved_bytes < often.moved_bytes


def test_a_token_of_each_user_reads_the_weights_once() -> None:
    one, many = (LLAMA.decode(Serving(users=n, prompt=100, new_tokens=10)) for n in (1, 64))
    assert many.flops == 64 * one.flops
    assert many.moved_bytes < 1.2 * one.moved_bytes
    assert one.flops == cost.decode_flops(LLAMA.model, batch=1, cached=105).total
