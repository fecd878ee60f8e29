"""Files that lie about themselves are refused, by name and in bounded memory."""

import io
import json
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from isoforward.base.errors import BadInput, Integrity, Refusal
from isoforward.formats.loading import load
from tests.formats.exports import in_child, logits, reseal, trained


class Trap:
    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (self.sprung,)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt", "last.ckpt"])
def test_a_pickle_is_never_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    directory, sprung = tmp_path / "model", tmp_path / "sprung"
    directory.mkdir()
    torch.save({"x": Trap(sprung)}, directory / name)
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    for path in (directory, directory / name):
        with pytest.raises(BadInput, match=f"{name} is a pickle, which can run code, and is never opened; use safet"):
            load(path)
    assert not sprung.exists()
    torch.load(io.BytesIO((directory / name).read_bytes()), weights_only=False)
    assert sprung.exists()  # so the trap was a trap


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "pointer of Git LFS .*: git lfs pull"),
        (b'{\n  "architectures": []}', "is JSON and holds no weights; name its directory, "),
        (b"<!DOCTYPE html><html>", "is a web page and holds no weights"),
    ],
)
def test_what_is_found_in_place_of_weights_is_told_by_its_beginning(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_bytes(content)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(Refusal, match=message):
            load(path)


def header(tensors: dict[str, object], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]} | changes


HOSTILE = {
    "empty": b"",
    "header of 2^63 bytes": header({}, length=2**63),
    "header of 90 MB": header({}, length=90_000_000) + b" " * 90_000_000,
    "not JSON": struct.pack("<Q", 4) + b"\xff\xfe{]",
    "offsets overlap": header({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "offsets beyond the end": header({"a": entry(0, 8)}, bytes(4)),
    "offsets reversed": header({"a": entry(8, 0)}, bytes(8)),
    "trailing bytes": header({"a": entry(0, 8)}, bytes(9)),
    "hole": header({"a": entry(4, 8)}, bytes(8)),
    "shape that overflows": header({"a": entry(0, 4, shape=[2**63, 2**63])}, bytes(4)),
    "integers": header({"a": entry(0, 4, dtype="I32")}, bytes(4)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_safetensors_file_is_refused_in_bounded_memory(what: str, exported: Path) -> None:
    (exported / "model.safetensors").write_bytes(HOSTILE[what])
    reseal(exported)
    with pytest.raises(
        Integrity, match="claims a header" if "MB" in what or "2^63" in what else "not a safetensors|I32"
    ):
        load(exported)

    def load_in_little_memory() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        bound = pages * resource.getpagesize() + 64 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
        load(exported)

    assert in_child(load_in_little_memory) == 3


def test_missing_extra_and_misshapen_tensors_are_named(exported: Path) -> None:
    file = exported / "model.safetensors"
    tensors = load_file(file)
    name = "transformer.h.1.mlp.c_fc.weight"
    others = {key: tensor for key, tensor in tensors.items() if key != name}
    for forged, message in (
        (others, f"{name} is missing"),
        (tensors | {"transformer.h.7.x": torch.zeros(1)}, "transformer.h.7.x"),
        (tensors | {name: tensors[name].T.contiguous()}, rf"{name} is \(128, 32\), its config asks for \(32, 128\)"),
    ):
        save_file(forged, file)
        reseal(exported)
        with pytest.raises(Integrity, match=message):
            load(exported)


def sharded(directory: Path) -> dict[str, str]:
    """An export as two files with an index, without its manifest."""
    tensors = load_file(directory / "model.safetensors")
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, directory / shard)
    for name in ("model.safetensors", "manifest.json"):
        (directory / name).unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def test_shards_are_read_as_one(exported: Path) -> None:
    sharded(exported)
    assert torch.equal(logits(load(exported)), logits(trained()))


@pytest.mark.parametrize("shard", ["../model.safetensors", "model-00003-of-00003.safetensors", 3, None])
def test_an_index_cannot_lead_elsewhere(shard: object, exported: Path) -> None:
    shutil.copy(exported / "model.safetensors", exported.parent)
    places: dict[str, object] = dict(sharded(exported))
    places["transformer.wte.weight"] = shard
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(Integrity, match="index"):
        load(exported)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '"x"', "[" * 100_000, "\x00", '{"weight_map": []}', '{"weight_map": {}}' + " " * 5_000_000]
)
def test_text_that_is_not_what_it_should_be_is_refused(text: str, exported: Path) -> None:
    sharded(exported)
    for name in ("model.safetensors.index.json", "manifest.json"):
        (exported / name).write_text(text)
        with pytest.raises(Integrity, match=name):
            load(exported)
