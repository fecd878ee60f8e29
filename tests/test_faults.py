"""Rows of the table of faults that no other file shows, injected for real: a process, a signal, a small filesystem.

Training here is `tests.kill.tiny_run`, in this process or a fork of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from isoforward.app.train import train
from isoforward.base.config import TrackingConfig, TrainConfig
from isoforward.base.errors import BadInput, Integrity, NonFinite, Stopped, StorageFailed
from isoforward.base.hardware import cpu_model
from isoforward.base.storage import DONE
from isoforward.data.tokenizer import Tokenizer
from isoforward.formats import checkpoint_file
from isoforward.formats.export import export
from isoforward.model.gpt import GPT
from isoforward.model.steps import train_step
from isoforward.serve.inference import InferenceModule
from isoforward.train import lightning_module
from isoforward.train.stopping import to_resume
from tests import kill
from tests.conftest import tiny
from tests.kill import in_a_fork, same, tiny_run
from tests.loaded import loaded_python

ROOT = Path(__file__).parents[1]
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
MS_RDONLY = 1
SECRETS = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "planted0", "HF_TOKEN": "hf_planted0123456789abcdefghijklmnop"}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


Steps = dict[int, tuple[bytes, float]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """What each step was fed, and its loss."""
    steps: Steps = {}
    real = train_step

    def noting(model: GPT, optimizer: Any, tokens: torch.Tensor, targets: torch.Tensor, **how: Any) -> Any:
        loss, norm = real(model, optimizer, tokens, targets, **how)
        steps[len(steps)] = (tokens.numpy().tobytes(), loss.item())
        return loss, norm

    monkeypatch.setattr(lightning_module, "train_step", noting)
    return steps


def ended(run: Path) -> dict[str, Any]:
    (last,) = run.glob("checkpoints/last-*.ckpt")
    return checkpoint_file.load(last, only=("global_step", "state_dict", "optimizer_states"))


def interrupting(monkeypatch: pytest.MonkeyPatch, where: str, when: int) -> None:
    """SIGINT in the `when`-th call of a part of training."""
    calls = iter(range(1_000_000))

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **more: Any) -> Any:
            if next(calls) == when:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*given, **more)

        return called

    module = lightning_module.LitGPT
    part = {"batch": "training_step", "backward": "manual_backward", "validation": "validation_step"}[where]
    monkeypatch.setattr(module, part, before(getattr(module, part)))


@pytest.mark.parametrize(
    ("where", "when", "after"),
    [("batch", 0, 1), ("backward", 5, 3), ("validation", 0, 3), ("batch", 4, 5), ("batch", 5, 6)],
    ids=["at the first step", "in mid-accumulation", "in mid-validation", "in mid-epoch", "at the last step"],
)
def test_row_3_stopped_anywhere_batches_losses_weights_and_optimizer_go_on_bit_for_bit(
    where: str, when: int, after: int, tmp_path: Path, seen: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_run(tmp_path, "whole", max_steps=6, checkpoint_every=100))
    whole = dict(seen)
    seen.clear()
    with monkeypatch.context() as patch:
        interrupting(patch, where, when)
        with pytest.raises(Stopped) as stopped:
            train(tiny_run(tmp_path, "cut", max_steps=6, checkpoint_every=100))
    assert stopped.value.exit_code == 130
    assert ended(tmp_path / "runs" / "cut")["global_step"] == len(seen) == after
    before = signal.signal(signal.SIGINT, signal.default_int_handler) and signal.getsignal(signal.SIGINT)
    train(tiny_run(tmp_path, "cut", max_steps=6, checkpoint_every=100, resume=str(tmp_path / "runs" / "cut")))
    assert seen == whole
    assert signal.getsignal(signal.SIGINT) == before  # what comes after training can be interrupted as ever
    assert same(ended(tmp_path / "runs" / "cut"), ended(tmp_path / "runs" / "whole"))
    kept = [{path.name for path in tmp_path.glob(f"runs/{name}/checkpoints/*.ckpt")} for name in ("cut", "whole")]
    assert kept[0] == kept[1]  # the best of a run that was stopped is the best of all of it


@pytest.mark.parametrize("kills", [["--kills", "3", "--stride", "49", "--times", "3"]])
def test_rows_1_and_2_killed_at_a_write_an_fsync_a_rename_or_any_time(kills: list[str]) -> None:
    assert kill.main(kills) == 0


@pytest.mark.slow
def test_rows_1_and_2_killed_at_each_and_fifty_times() -> None:
    assert kill.main(["--kills", "50"]) == 0


def command(
    script: str, *arguments: str, where: Path, python: str = sys.executable, **env: str
) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(where / "cache"), **env}
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    asked = [python, str(ROOT / script), *arguments]
    return subprocess.Popen(asked, cwd=where, env=environment, start_new_session=True, **streams)


def overrides(config: TrainConfig) -> list[str]:
    """That give `config` again on a command line."""
    groups = {"model": config.model, "data": config.data, "trainer": config.trainer}
    keys = {
        "model": ("layers", "heads", "width", "context", "dropout"),
        "data": ("source", "path", "tokenizer", "batch", "length", "cache_dir"),
        "trainer": ("max_steps", "checkpoint_every", "validate_every", "validation_batches", "accumulate"),
    }
    typed = [f"{group}.{key}={getattr(groups[group], key)}" for group, names in keys.items() for key in names]
    return [*typed, "measure.enabled=false", "sample_prompt=To", "precision=fp32", f"run_dir={config.run_dir}"]


def test_row_5_interrupted_again_and_again_it_still_saves_and_does_not_hang(tmp_path: Path) -> None:
    """Every process of the terminal is, W&B's included."""
    config = tiny_run(tmp_path, max_steps=1_000_000, checkpoint_every=1_000_000)
    asked = [*overrides(config), "tracking.mode=wandb"]
    training = command("train.py", *asked, where=tmp_path, WANDB_MODE="offline", HOME=str(tmp_path))
    told = iter(training.stdout.readline, "")  # type: ignore[union-attr]
    while "step " not in next(told):
        pass
    while training.poll() is None:
        os.killpg(training.pid, signal.SIGINT)
        time.sleep(0.02)
    assert training.returncode == 130
    assert checkpoint_file.newest_good(Path(config.run_dir) / "checkpoints") is not None


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that never ends its text: as likely as any other are all tokens but the end."""
    tokenizer = Tokenizer.from_characters(["abc\x1b[2J"])
    model = GPT(tiny(vocab=tokenizer.vocabulary, context=4096, layers=1))
    with torch.no_grad():
        torch.nn.init.zeros_(model.norm.get_parameter("weight"))
        torch.nn.init.ones_(model.norm.get_parameter("bias"))
        model.embedding.weight.zero_()
        model.embedding.weight[tokenizer.end] = -10.0
    return export(model, tmp_path_factory.mktemp("talker") / "export", tokenizer=tokenizer)


@pytest.mark.parametrize("end", ["interrupt", "closed pipe"])
def test_row_6_text_so_far_is_out_and_no_traceback(end: str, talker: Path, tmp_path: Path) -> None:
    asked = [f"checkpoint={talker}", "prompt=abc", "max_new_tokens=4000", "cache=false"]
    writing = command("generate.py", *asked, where=tmp_path, python=loaded_python())
    begun = writing.stdout.read(40)  # type: ignore[union-attr]
    if end == "interrupt":
        writing.send_signal(signal.SIGINT)
    else:
        writing.stdout.close()  # type: ignore[union-attr]
        writing.stdout = None
    _, err = writing.communicate(timeout=60)
    assert begun.startswith("abc") and len(begun) == 40
    assert writing.returncode == 130
    assert "Traceback" not in err


def test_text_with_escapes_moves_no_terminal(talker: Path, tmp_path: Path) -> None:
    """A terminal is shown what a pipe gets as it is."""
    leader, follower = os.openpty()
    asked = [f"checkpoint={talker}", "prompt=abc\x1b[2J", "max_new_tokens=60", "seed=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [loaded_python(), str(ROOT / "generate.py"), *asked]
    subprocess.run(run, stdout=follower, stderr=subprocess.DEVNULL, env=environment, check=True, cwd=tmp_path)
    shown = os.read(leader, 10_000)
    assert shown.startswith(b"abc\\x1b[2J")
    assert b"\x1b" not in shown


def in_namespace(work: Callable[[], object], mounts: dict[Path, str] | None = None, *, network: bool = True) -> int:
    """The exit code of `work` in a fork that sees `mounts` (tmpfs by its options) and, without `network`, no other
    machine.
    """

    def apart() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        user, group = os.geteuid(), os.getegid()
        flags = CLONE_NEWNS | CLONE_NEWUSER | (0 if network else CLONE_NEWNET)
        if libc.unshare(flags):
            os._exit(77)
        for name, content in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(content)
        for place, options in (mounts or {}).items():
            flags = MS_RDONLY if options == "ro" else 0
            place.mkdir(exist_ok=True)
            if libc.mount(b"none", bytes(place), b"tmpfs", flags, None if flags else options.encode()):
                os._exit(77)
        work()

    code = in_a_fork(apart)
    if code == 77:
        pytest.skip("no namespace to mount a small filesystem in")
    return code


def test_row_7_where_no_checkpoint_fits_the_earlier_one_stays_and_no_temporary(tmp_path: Path) -> None:
    small = tmp_path / "runs"

    def fill() -> None:
        config = tiny_run(tmp_path)
        config = replace(config, model=replace(config.model, width=128))
        try:
            train(config)
        except StorageFailed as failure:
            assert "best-000002.ckpt could not be written: No space left on device" in str(failure)
            kept = small / "run" / "checkpoints"
            assert [path.name for path in kept.iterdir() if "ckpt" in path.name] == ["last-000001.ckpt"]
            checkpoint_file.verify(kept / "last-000001.ckpt")
            raise

    assert in_namespace(fill, {small: "size=4200k"}) == 5


def test_row_8_and_22_a_tiny_tmpdir_and_no_network_change_no_weight_and_no_secret_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B is asked for, with a key."""
    train(tiny_run(tmp_path, "plain"))
    config = replace(tiny_run(tmp_path, "tracked"), tracking=TrackingConfig(mode="wandb"))

    def tracked() -> None:
        os.environ |= {**SECRETS, "TMPDIR": str(tmp_path / "tmp"), "WANDB_INIT_TIMEOUT": "2", "HOME": str(tmp_path)}
        train(config)

    assert in_namespace(tracked, {tmp_path / "tmp": "size=16k"}, network=False) == 0
    assert same(ended(tmp_path / "runs" / "plain"), ended(tmp_path / "runs" / "tracked"))
    run = tmp_path / "runs" / "tracked"
    assert list(run.glob("wandb/offline-run-*"))
    held = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert not [path for path, text in held.items() for secret in SECRETS.values() if secret.encode() in text]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    run = tmp_path_factory.mktemp("two") / "runs" / "run"
    for step in (1, 2):
        checkpoint_file.save(
            run / "checkpoints" / f"last-{step:06d}.ckpt", {"global_step": step, "w": torch.ones(500, 3)}
        )
    return run, (run / "checkpoints" / "last-000002.ckpt").read_bytes()


@pytest.mark.parametrize("sixteenth", range(16))
def test_row_9_a_truncated_checkpoint_is_3_when_named_and_passed_over_with_a_warning_else(
    sixteenth: int, two_checkpoints: tuple[Path, bytes], tmp_path: Path
) -> None:
    run, content = two_checkpoints
    newest = run / "checkpoints" / "last-000002.ckpt"
    newest.write_bytes(content[: len(content) * sixteenth // 16])
    config = tiny_run(tmp_path)

    def resumed(wanted: str) -> Path | None:
        asked = replace(config, run_dir=str(run), trainer=replace(config.trainer, resume=wanted))
        return to_resume(asked, Console(quiet=True))

    with pytest.raises(Integrity, match=newest.name) as refused:
        resumed(str(newest))
    assert refused.value.exit_code == 3
    for wanted in ("auto", str(run)):
        with pytest.warns(UserWarning, match=newest.name):
            assert resumed(wanted) == run / "checkpoints" / "last-000001.ckpt"


@pytest.mark.parametrize("what", ["weights", "loss"])
def test_row_14_what_is_not_finite_ends_training_before_the_update(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train_step
    steps, before = [0], list[torch.Tensor]()

    def planted(model: GPT, optimizer: Any, tokens: torch.Tensor, targets: torch.Tensor, **how: Any) -> Any:
        if how["phase"] and steps[0] == 2:
            with torch.no_grad():
                if what == "weights":
                    model.embedding.weight[3] = torch.inf
                else:
                    how["backward"] = lambda loss, backward=how["backward"]: backward(loss * torch.nan)
            before[:] = [parameter.detach().clone() for parameter in model.parameters()]
            try:
                return real(model, optimizer, tokens, targets, **how)
            finally:
                left = list(model.parameters())
                assert all(map(torch.equal, before, left))
        steps[0] += 1
        return real(model, optimizer, tokens, targets, **how)

    monkeypatch.setattr(lightning_module, "train_step", planted)
    with pytest.raises(NonFinite, match="step 2 is not finite") as refused:
        train(tiny_run(tmp_path, dropout=0.0))
    assert refused.value.exit_code == 4
    assert ended(tmp_path / "runs" / "run")["global_step"] == 2


def test_row_15_a_run_does_not_go_on_with_other_tokens(tmp_path: Path) -> None:
    """A text of as many characters, one of them another: the vocabulary keeps its size."""
    train(tiny_run(tmp_path))
    (tmp_path / "text.txt").write_text(kill.TEXT.replace("q", "Q"))
    (tmp_path / "runs" / "run" / DONE).unlink()
    with pytest.raises(Integrity, match=r"tokenizer\.json is not the tokenizer of this data"):
        train(tiny_run(tmp_path, resume=str(tmp_path / "runs" / "run")))


def test_row_15_a_tokenizer_too_large_for_the_model_is_refused_before_training(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    with pytest.raises(BadInput, match=r"model\.vocab=5 is smaller than the tokenizer's"):
        train(replace(config, model=replace(config.model, vocab=5)))
    assert not (tmp_path / "runs").exists()


def test_row_18_prompts_of_any_length_have_a_declared_answer() -> None:
    model = InferenceModule(GPT(tiny(vocab=5)), Tokenizer.from_characters(["abcd"]))
    assert len(str(model.generate("a" * 32))) == 1  # as long as the context: one more token, from its last position
    for many in (33, 10 * 2**20):
        with pytest.raises(BadInput, match=f"the prompt has {many} tokens and the model's context holds 32"):
            model.generate("a" * many)
    assert model.generate("", max_new_tokens=3) == model.generate("", max_new_tokens=3, cache=False)  # a new document
    assert model.generate("a" * 32, max_new_tokens=0) == ""


@pytest.mark.parametrize(
    "huge",
    [
        {"model": {"width": 2**21, "heads": 2**15}},
        {"model": {"layers": 2**21}},
        {"model": {"vocab": 2**21, "width": 2**15}},
        {"data": {"batch": 2**21}, "model": {"vocab": 2**21}},
    ],
    ids=["width", "layers", "vocabulary", "batch"],
)
def test_row_20_a_model_beyond_all_memory_is_refused_before_it_is_made(
    huge: dict[str, dict[str, int]], tmp_path: Path
) -> None:
    config = tiny_run(tmp_path)
    with pytest.raises(BadInput, match="here are"):
        train(replace(config, **{part: replace(getattr(config, part), **more) for part, more in huge.items()}))
    assert not (tmp_path / "runs").exists()


def test_row_21_an_output_that_is_a_file_ends_with_5_before_the_first_step(tmp_path: Path, seen: Steps) -> None:
    (tmp_path / "runs").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for run_dir in (tmp_path / "file", tmp_path / "runs" / "run"):
        with pytest.raises(StorageFailed, match="cannot be written") as refused:
            train(replace(tiny_run(tmp_path), run_dir=str(run_dir)))
        assert refused.value.exit_code == 5
    assert (tmp_path / "file").read_text() == "mine" and not seen


def test_row_21_a_read_only_output_ends_with_5(tmp_path: Path) -> None:
    def refused() -> None:
        with pytest.raises(StorageFailed, match="Read-only file system"):
            train(tiny_run(tmp_path))

    assert in_namespace(refused, {tmp_path / "runs": "ro"}) == 0


def test_row_23_of_two_runs_into_one_directory_the_second_refuses(tmp_path: Path) -> None:
    tiny_run(tmp_path)  # writes the text
    children = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            os._exit(in_a_fork(lambda: train(tiny_run(tmp_path))))
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0, 2]
    assert (tmp_path / "runs" / "run" / DONE).exists()


@pytest.mark.parametrize("change", ["workers", "progress", "tracking"])
def test_row_27_neither_workers_nor_what_is_shown_changes_a_bit(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, "one")
    train(config)
    if change == "workers":
        config = replace(config, data=replace(config.data, workers=2))
    elif change == "progress":
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    else:
        config = replace(config, tracking=TrackingConfig(mode="wandb"))
        monkeypatch.setenv("WANDB_MODE", "offline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that forking beside threads may hang
        train(replace(config, run_dir=str(tmp_path / "runs" / "other")))
    assert same(ended(tmp_path / "runs" / "one"), ended(tmp_path / "runs" / "other"))


def test_a_tiny_run_ends_with_the_weights_that_this_platform_is_known_to_give(tmp_path: Path) -> None:
    """Without dropout, so that the digest is that of the arithmetic and of the batches."""
    train(tiny_run(tmp_path, dropout=0.0))
    found = json.loads((tmp_path / "runs" / "run" / "export" / "manifest.json").read_text())["fingerprint"]
    kept = json.loads((Path(__file__).parent / "digests.json").read_text())
    maker = cpu_model().partition(" ")[0]  # MKL has other kernels for other makers
    platform = f"{maker} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    if platform not in kept:
        pytest.skip(f"no digest of {platform} is recorded; here it is {found}")
    assert found == kept[platform]
