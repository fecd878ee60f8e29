import contextlib
import io
import json
import os
import pickle
import resource
import signal
import struct
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from isoforward.base.errors import BadInput, Integrity, StorageFailed
from isoforward.formats.checkpoint_file import PIECE, load, newest_good, save, verify
from tests.kill import at_event, in_a_fork


def state_at(step: int) -> dict[str, Any]:
    weights = torch.randn(300, 10, generator=torch.Generator().manual_seed(step))
    return {"global_step": step, "state_dict": {"weight": weights}}


def same(left: object, right: object) -> bool:
    """Equal in type, structure and every bit."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and type(left) is type(right):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and (left == right or left != left)


DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
tensors = st.builds(
    lambda shape, dtype: torch.randn(shape).mul(50).to(getattr(torch, dtype)),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(DTYPES),
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"]))
keys = st.text(st.characters(exclude_categories=["Cs"])) | st.integers() | st.tuples(st.integers(), st.booleans())
states = st.recursive(
    plain | tensors,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys | st.just("$tensor"), inner),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "a/0", "$tuple", "__metadata__"]), states))
def test_what_comes_back_is_what_went_in(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "state.ckpt"
    save(path, state)
    assert same(load(path), state)


def test_an_optimizer_goes_on_from_a_file_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Dropout(0.5), torch.nn.Linear(5, 3))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = fresh()
    for _ in range(3):
        step(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    save(tmp_path / "state.ckpt", state)
    for _ in range(3):
        step(model, optimizer)
    resumed, its_optimizer = fresh()
    back = load(tmp_path / "state.ckpt")
    resumed.load_state_dict(back["model"])
    its_optimizer.load_state_dict(back["optimizer"])
    torch.set_rng_state(back["rng"])
    for _ in range(3):
        step(resumed, its_optimizer)
    assert same(dict(resumed.state_dict()), dict(model.state_dict()))
    assert same(its_optimizer.state_dict(), optimizer.state_dict())


def test_tied_tensors_are_written_once_and_come_back_tied(tmp_path: Path) -> None:
    weight = torch.randn(1000, 100)
    save(tmp_path / "state.ckpt", {"embedding": weight, "unembedding": weight, "transposed": weight.T})
    assert (tmp_path / "state.ckpt").stat().st_size < 2.1 * 400_000  # twice, since the transpose is another tensor
    back = load(tmp_path / "state.ckpt")
    assert back["embedding"] is back["unembedding"]
    assert torch.equal(back["transposed"], weight.T)


def test_other_tools_can_read_the_tensors(tmp_path: Path) -> None:
    save(tmp_path / "state.ckpt", state_at(5))
    assert torch.equal(load_file(tmp_path / "state.ckpt")["state_dict/weight"], state_at(5)["state_dict"]["weight"])


def test_only_the_keys_asked_for_are_loaded(tmp_path: Path) -> None:
    save(tmp_path / "state.ckpt", state_at(5) | {"optimizer": torch.zeros(9)})
    assert load(tmp_path / "state.ckpt", only=("global_step", "absent")) == {"global_step": 5}


def test_a_loaded_tensor_is_no_window_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.ckpt"
    save(path, {"weight": torch.zeros(1000)})
    weight = load(path)["weight"]
    with path.open("r+b") as file:
        file.seek(-400, io.SEEK_END)
        file.write(b"\xff" * 400)
    assert weight.eq(0).all()


@pytest.mark.parametrize(
    ("value", "name"), [(object(), "a/0, a object"), (torch.zeros(1, dtype=torch.complex64), "a/0, a tensor of torch")]
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path: Path, value: object, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        save(tmp_path / "state.ckpt", {"a": [value]})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, bytes]:
    """Several pieces, the last not full."""
    path = tmp_path / "state.ckpt"
    save(path, {"global_step": 1, "weight": torch.arange(PIECE // 2 + 5000), "bias": torch.ones(3)})
    assert path.stat().st_size > 2 * PIECE
    return path, path.read_bytes()


@pytest.mark.parametrize("sixteenth", range(16))
def test_a_truncated_file_is_refused(written: tuple[Path, bytes], sixteenth: int) -> None:
    path, content = written
    path.write_bytes(content[: len(content) * sixteenth // 16])
    with pytest.raises(Integrity, match=r"state\.ckpt"):
        load(path)


def test_a_longer_file_is_refused(written: tuple[Path, bytes]) -> None:
    path, content = written
    path.write_bytes(content + b"\0")
    with pytest.raises(Integrity, match=r"state\.ckpt"):
        verify(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_flipped_bit_anywhere_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.ckpt"
    save(path, state_at(1))
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    position = data.draw(st.integers(0, header - 1) | st.integers(header, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(Integrity, match=r"flipped\.ckpt"):
        load(path)


def test_pieces_that_change_places_are_noticed(written: tuple[Path, bytes]) -> None:
    path, content = written
    path.write_bytes(content[:PIECE] + content[2 * PIECE :] + content[PIECE : 2 * PIECE])
    with pytest.raises(Integrity):
        verify(path)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("write", "unpickle"),
    [
        (lambda path: path.write_bytes(pickle.dumps(Trap())), lambda path: pickle.loads(path.read_bytes())),
        (lambda path: torch.save(Trap(), path), lambda path: torch.load(io.BytesIO(path.read_bytes()))),
    ],
    ids=["pickle", "torch.save"],
)
def test_a_pickle_is_refused_and_never_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    write: Callable[[Path], object],
    unpickle: Callable[[Path], object],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / f"state{suffix}"
    write(path)
    with pytest.raises(BadInput, match="is a pickle, which can run code, and is never opened"):
        load(path)
    assert not Path("sprung").exists()
    unpickle(path)
    assert Path("sprung").exists()  # so the trap was a real one


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(Integrity, match="no training checkpoint"):
        load(tmp_path / "model.safetensors")


def test_what_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.ckpt"):
        with pytest.raises(BadInput, match=path.name):
            load(path)


def sealed(header: bytes, payload: bytes = b"") -> bytes:
    """What somebody who means harm can write: anything at all, under a digest that is right."""
    content = struct.pack("<Q", len(header)) + header + payload
    start = content.index(b"0" * 64)
    return content[:start] + blake3(content).hexdigest().encode() + content[start + 64 :]


def header_of(state: str, **entries: object) -> bytes:
    header = {"__metadata__": {"digest": "0" * 64, "state": state}, **entries}
    return json.dumps(header, separators=(",", ":")).encode()


def entry(shape: list[int], *offsets: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


def test_the_digest_is_the_one_that_is_documented(tmp_path: Path) -> None:
    path = tmp_path / "state.ckpt"
    path.write_bytes(sealed(header_of('{"weight":{"$tensor":"w"},"step":3}', w=entry([2], 0, 8)), bytes(8)))
    assert same(load(path), {"weight": torch.zeros(2), "step": 3})


HOSTILE = {
    "no state": sealed(b'{"__metadata__":{"digest":"' + b"0" * 64 + b'"}}'),
    "no object": sealed(header_of("[1]")),
    "no JSON": sealed(header_of("{")),
    "deep": sealed(header_of('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")),
    "an absent tensor": sealed(header_of('{"a":{"$tensor":"b"}}')),
    "unhashable keys": sealed(header_of('{"a":{"$dict":[[[],1]]}}')),
    "no pairs": sealed(header_of('{"a":{"$dict":[1]}}')),
    "no number": sealed(header_of('{"a":{"$float":"one"}}')),
    "trailing bytes": sealed(header_of("{}", w=entry([2], 0, 8)), bytes(9)),
    "missing bytes": sealed(header_of("{}", w=entry([2], 0, 8)), bytes(7)),
    "overlapping tensors": sealed(header_of("{}", v=entry([2], 0, 8), w=entry([2], 4, 12)), bytes(12)),
    "a shape that is not the size": sealed(header_of("{}", w=entry([3], 0, 8)), bytes(8)),
    "a shape beyond all memory": sealed(header_of("{}", w=entry([2**62, 4], 0, 0))),
    "a header beyond the file": sealed(header_of("{}"))[8:].join([struct.pack("<Q", 2**63), b""]),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_file_made_to_do_harm_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.ckpt"
    path.write_bytes(content)
    with pytest.raises(Integrity, match=r"state\.ckpt"):
        load(path)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["$tensor", "$tuple", "$dict", "$float", "a"]), inner, max_size=2)
        ),
    )
)
def test_any_skeleton_loads_or_is_refused(tmp_path_factory: pytest.TempPathFactory, skeleton: object) -> None:
    path = tmp_path_factory.getbasetemp() / "skeleton.ckpt"
    path.write_bytes(sealed(header_of(json.dumps({"a": skeleton}))))
    with contextlib.suppress(Integrity):
        assert list(load(path)) == ["a"]


def test_the_newest_is_that_of_the_highest_step_whatever_its_name_or_age(tmp_path: Path) -> None:
    for name, step in (("b.ckpt", 20), ("a.ckpt", 100), ("c.ckpt", 3)):
        save(tmp_path / name, state_at(step))
    assert newest_good(tmp_path) == tmp_path / "a.ckpt"


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-1], lambda content: content[8:]])
def test_damaged_ones_are_passed_over_with_a_warning(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    for step in (1, 2, 3):
        save(tmp_path / f"{step}.ckpt", state_at(step))
    (tmp_path / "3.ckpt").write_bytes(damage((tmp_path / "3.ckpt").read_bytes()))
    with pytest.warns(UserWarning, match=r"passed over.*3\.ckpt"):
        assert newest_good(tmp_path) == tmp_path / "2.ckpt"


def test_where_none_is_good_there_is_none(tmp_path: Path) -> None:
    assert newest_good(tmp_path) is None
    (tmp_path / "torn.ckpt").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="torn"):
        assert newest_good(tmp_path) is None


def test_a_kill_at_any_write_fsync_or_rename_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    found: list[int] = []
    while True:
        directory = tmp_path / str(len(found))
        save(directory / "1.ckpt", state_at(1))
        saving = partial(save, directory / "2.ckpt", state_at(2))
        killed = in_a_fork(at_event(len(found), saving)) == -signal.SIGKILL
        with warnings.catch_warnings(action="error"):  # nothing half-written bears the name of a checkpoint
            newest = newest_good(directory)
        assert newest is not None
        found.append(int(newest.stem))
        assert same(load(newest), state_at(found[-1]))
        if not killed:
            break
    before_the_rename = 2 + 2 + 2 + 2 + 1  # contents, fsync, digest, fsync, and the rename itself
    after_it = 1 + 2 + 1  # the rename, fsync of the directory, and at last no kill
    assert found == [1] * before_the_rename + [2] * after_it


def test_a_full_disk_keeps_the_earlier_checkpoint_and_leaves_no_temporary(tmp_path: Path) -> None:
    save(tmp_path / "1.ckpt", state_at(1))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(StorageFailed, match=r"2\.ckpt"):
            save(tmp_path / "2.ckpt", state_at(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["1.ckpt"]
    verify(tmp_path / "1.ckpt")


def test_a_save_does_not_hold_the_state_twice(tmp_path: Path) -> None:
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(reset, os.W_OK):
        pytest.skip("the peak of memory cannot be reset here")
    size = 200 * 2**20
    state = {"weight": torch.ones(size // 8), "other": torch.ones(size // 8)}
    reset.write_text("5")
    peak = [int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    save(tmp_path / "state.ckpt", state)
    peak += [int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    assert peak[1] - peak[0] < size / 4
