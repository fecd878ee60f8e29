"""W&B by the real client: what an offline run holds, read by wandb's own reader, and networks that do not answer."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from isoforward.base.config import TrackingConfig
from isoforward.base.errors import BadInput
from isoforward.show import wandb_tracker
from isoforward.show.wandb_tracker import WandbTracker, open_tracker
from tests.show.planted import PLANTED

SRC = Path(__file__).parents[2] / "src"
EXPECTED = Path(__file__).parent / "expected"
SECRETS = {"WANDB_API_KEY": "5ecre7" * 7, "HF_TOKEN": "hf_planted_token", "AWS_SECRET_ACCESS_KEY": "planted/aws+key"}


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Of the only run in `run_dir`, as wandb's own reader gives them."""
    (log,) = run_dir.glob("wandb/*run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    return [json.loads(line) for line in told.stdout.splitlines()]


def of(kind: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record[kind] for record in found if record["type"] == kind]


def merged(updates: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for update in updates for key, value in update.get("update", {}).items()}


@pytest.fixture(scope="module")
def no_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Gives the home directory."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:
            if name.startswith("WANDB_"):
                patch.delenv(name)
        for name in ("WANDB_ARTIFACT_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, "")  # so that they are taken back
        patch.setenv("HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory, no_key: Path) -> dict[str, Path]:
    """A training run and an inference run of one export, both offline."""
    root = tmp_path_factory.mktemp("runs")
    export = root / "export"
    export.mkdir()
    (export / "model.safetensors").write_bytes(b"weights")
    (export / "config.json").write_text("{}")
    (root / "report.html").write_text("<p>3.4x</p>")
    said: list[str] = []
    for job_type in ("train", "inference"):
        with open_tracker(
            TrackingConfig(tags=["nightly"]),
            run_dir=root / job_type,
            job_type=job_type,
            name=f"tiny {job_type}",
            group="fingerprint",
            resolved_config={"model": {"width": 128}},
            say=said.append,
        ) as tracker:
            for step in (0, 20, 40):
                tracker.live(step, {"phase/forward_share": 0.25 + step, "loss": 7.0 - step / 10})
            tracker.rows(PLANTED)
            tracker.report(root / "report.html")
            tracker.export(export, "f" * 64)
        assert tracker.url_or_sync.startswith(f"wandb sync {root}/{job_type}/wandb/offline-run-")
        assert tracker.url_or_sync.endswith(str(tracker.run_id))
    assert said == []
    return {job_type: root / job_type for job_type in ("train", "inference")}


@pytest.fixture(scope="module")
def read_back(lives: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    return {job_type: records(run_dir) for job_type, run_dir in lives.items()}


def test_both_lives_are_typed_named_tagged_and_share_a_group(read_back: dict[str, list[dict[str, Any]]]) -> None:
    for job_type, found in read_back.items():
        (run,) = of("run", found)
        assert (run["job_type"], run["run_group"]) == (job_type, "fingerprint")
        assert (run["project"], run["display_name"], run["tags"]) == ("isoforward", f"tiny {job_type}", ["nightly"])
        assert run["config"]["update"]["model"] == {"width": 128}


def test_live_metrics_have_the_training_step_as_their_x_axis(read_back: dict[str, list[dict[str, Any]]]) -> None:
    logged = [{**entry.get("item", entry)} for entry in of("history", read_back["train"])]
    shown = json.dumps(logged)
    assert re.search(r'"phase/forward_share": ?40.25', shown), shown
    assert re.search(r'"loss": ?5', shown) and re.search(r'"step": ?20', shown), shown
    metrics = of("metric", read_back["train"])
    assert any(one.get("name") == "step" for one in metrics)
    assert any(one.get("glob_name") == "*" and one.get("step_metric") == "step" for one in metrics)


def test_every_row_is_in_the_table(lives: dict[str, Path]) -> None:
    (path,) = lives["train"].glob("wandb/offline-run-*/files/media/table/rows_*.table.json")
    table = json.loads(path.read_text())
    assert len(table["data"]) == len(PLANTED.rows)
    decode = dict(zip(table["columns"], table["data"][10], strict=True))
    assert (decode["phase"], decode["value"], decode["provenance"]) == ("decode", 0.2, "measured")
    assert json.loads(decode["conditions"]) == {"tokens": 1}


def test_charts_are_logged_with_their_points(lives: dict[str, Path]) -> None:
    tables = {
        re.sub(r"_table_.*", "", path.name): json.loads(path.read_text())
        for path in lives["train"].glob("wandb/offline-run-*/files/media/table/charts/*")
    }
    assert sorted(tables) == ["cache", "ledger", "two_lives"]  # there are no rungs and no break-even in these rows
    assert tables["cache"]["data"] == [[64, "KV cache", 0.25], [64, "no cache", 0.75]]
    assert tables["ledger"]["data"] == [["training: optimizer state", 640]]
    shown = dict(tables["two_lives"]["data"])
    assert shown["inference: prefill"] == pytest.approx(0.1)
    assert shown["training: backward"] == pytest.approx(0.2)


def test_the_comparison_and_the_environment_are_in_the_run(read_back: dict[str, list[dict[str, Any]]]) -> None:
    held = merged(of("summary", read_back["train"]))
    assert held["training/time_ratio"] == pytest.approx(5.0)
    assert held["phase/backward/time_s"] == 2.0
    assert held["trusted"] is False
    config = merged(of("config", read_back["train"]))
    assert config["environments"] == {"here": {"cpu": "c"}}


def test_the_report_is_kept_in_the_run(lives: dict[str, Path]) -> None:
    (path,) = lives["train"].glob("wandb/offline-run-*/files/media/html/report_*.html")
    assert "<p>3.4x</p>" in path.read_text()


def test_the_export_is_logged_by_training_and_used_by_inference(read_back: dict[str, list[dict[str, Any]]]) -> None:
    logged, used = (
        next(one for one in of("artifact", read_back[job_type]) if one["type"] == "model")
        for job_type in ("train", "inference")
    )
    assert logged["name"] == used["name"] == "export-" + "f" * 16
    assert logged["digest"] == used["digest"]  # the server knows them for one artifact
    assert not logged.get("use_after_commit") and used["use_after_commit"]
    assert {entry["path"] for entry in logged["manifest"]["contents"]} == {"config.json", "model.safetensors"}
    assert json.loads(logged["metadata"])["fingerprint"] == "f" * 64


def test_artifacts_are_staged_in_the_run_directory(lives: dict[str, Path], no_key: Path) -> None:
    assert [*lives["train"].glob("wandb/staging/artifacts/staging/*")]
    assert not [*no_key.rglob("*")]


def test_a_tracker_that_fails_says_so_once_and_still_finishes(tmp_path: Path, no_key: Path) -> None:
    said: list[str] = []
    tracker = open_tracker(
        TrackingConfig(),
        run_dir=tmp_path,
        job_type="experiment",
        name="n",
        group=None,
        resolved_config={},
        say=said.append,
    )
    tracker.report(tmp_path / "absent.html")
    tracker.report(tmp_path / "absent.html")
    tracker.finish(exit_code=3)
    assert len(said) == 1 and "absent.html" in said[0]
    (exit,) = of("exit", records(tmp_path))
    assert exit["exit_code"] == 3


SCRIPT = """
import socket, sys, threading
from pathlib import Path
{before}
from isoforward.base.config import TrackingConfig
from isoforward.show.wandb_tracker import WandbTracker, open_tracker
config = TrackingConfig(mode={mode!r})
about = {{"run_dir": Path({run_dir!r}), "job_type": {job_type!r}, "name": "n", "group": "g"}}
tracker = open_tracker(config, **about, resolved_config={{}})
tracker.live(1, {{"loss": 1.0}})
{then}
tracker.finish()
print("trained", tracker.url_or_sync)
"""
SWALLOWING_HOST = """
import os
host = socket.create_server(("127.0.0.1", 0), backlog=64)
taken = []
threading.Thread(target=lambda: [taken.append(host.accept()) for _ in iter(int, 1)], daemon=True).start()
os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:%d" % host.getsockname()[1]
"""


def in_a_process(
    run_dir: Path, *, mode: str, job_type: str = "train", before: str = "", then: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """With stdin closed. The limit on its time is the bound that is promised."""
    script = SCRIPT.format(mode=mode, run_dir=str(run_dir), job_type=job_type, before=before, then=then)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", script],
        env=kept | {"PYTHONPATH": str(SRC), "HOME": str(run_dir.parent), "WANDB_INIT_TIMEOUT": "2"} | env,
        preexec_fn=lambda: os.close(0),
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_nothing_of_wandb_is_imported_unless_something_is_tracked(tmp_path: Path) -> None:
    nothing = "assert not [name for name in sys.modules if name.partition('.')[0].startswith('wandb')]"
    told = in_a_process(tmp_path / "run", mode="none", then=nothing)
    assert (told.returncode, told.stdout, told.stderr) == (0, "trained \n", "")
    assert not (tmp_path / "run").exists()


def test_a_host_that_swallows_packets_leaves_an_offline_run_and_no_secret(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    told = in_a_process(run_dir, mode="auto", before=SWALLOWING_HOST, **SECRETS)
    assert told.returncode == 0, told.stderr
    assert len(told.stderr.splitlines()) == 1 and "tracking offline" in told.stderr
    (offline,) = run_dir.glob("wandb/*run-*/run-*.wandb")
    assert told.stdout == f"trained wandb sync {offline.parent}\n"
    assert of("history", records(run_dir))
    held = b"".join(path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    assert held and not [name for name, value in SECRETS.items() if value.encode() in held]


def test_no_key_and_a_closed_stdin_is_offline_without_a_prompt(tmp_path: Path) -> None:
    told = in_a_process(tmp_path / "run", mode="wandb")
    assert told.returncode == 0, told.stderr
    assert len(told.stderr.splitlines()) == 1 and "no key" in told.stderr
    assert told.stdout.startswith(f"trained wandb sync {tmp_path}/run/wandb/offline-run-")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}  # nothing beside the run's own directory


def test_a_key_of_the_wrong_form_is_told_and_not_repeated(tmp_path: Path) -> None:
    told = in_a_process(tmp_path / "run", mode="auto", WANDB_API_KEY="short-secret")
    assert told.returncode == 0, told.stderr
    assert len(told.stderr.splitlines()) == 1 and "short-secret" not in told.stderr
    assert "wandb sync" in told.stdout


class StandIn(ThreadingHTTPServer):
    """As much of a W&B server as these runs ask for. It keeps what it was told; once `dead`, it answers no more."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.told: list[tuple[str, dict[str, Any]]] = []  # operation, variables
        self.put: dict[str, bytes] = {}
        self.streamed: list[str] = []
        self.dead = threading.Event()

    def variables(self, operation: str) -> list[dict[str, Any]]:
        return [variables for name, variables in self.told if name == operation]

    def answer(self, operation: str, told: dict[str, Any]) -> dict[str, Any]:
        self.told.append((operation, told))
        match operation:
            case "Viewer":
                return {"viewer": {"id": "V", "entity": "acme", "username": "u", "flags": "{}", "teams": {"edges": []}}}
            case "UpsertBucket":
                project = {"id": "P", "name": told["project"], "entity": {"id": "E", "name": "acme"}}
                bucket = {"id": "R", "name": told["name"], "displayName": "n", "config": "{}", "project": project}
                return {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in told["files"]]
                return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "CreateArtifact":
                made = {"id": told["input"]["artifactCollectionName"], "state": "PENDING"}
                return {"createArtifact": {"artifact": made | {"artifactSequence": {"latestArtifact": None}}}}
            case "CreateArtifactManifest":
                file = {"id": "F", "uploadUrl": f"{self.url}/manifest", "uploadHeaders": []}
                return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": file}}}
            case "CreateArtifactFiles":
                nodes = [
                    {
                        "node": {
                            "id": "F",
                            "name": file["name"],
                            "displayName": file["name"],
                            "uploadUrl": f"{self.url}/{file['name']}",
                            "uploadHeaders": [],
                            "storagePath": file["name"],
                            "artifact": {"id": file["artifactID"]},
                        }
                    }
                    for file in told["input"]["artifactFiles"]
                ]
                return {"createArtifactFiles": {"files": {"edges": nodes}}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": told["artifactID"], "digest": "d"}}}
            case "UseArtifact":
                return {"useArtifact": {"artifact": {"id": told["input"]["artifactID"]}}}
            case "GetProjects":
                page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
                return {"models": {"pageInfo": page, "edges": []}}
            case "UpsertView2" | "upsertView":
                return {"upsertView": {"view": {"id": "Vmlldzox", "name": "nw-abc-v"}, "inserted": True}}
        return {}


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *_: Any) -> None: ...

    def content(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def reply(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        self.server.put[self.path.lstrip("/")] = self.content()
        self.reply({})

    def do_GET(self) -> None:
        self.server.dead.set()
        self.reply({})

    def do_POST(self) -> None:
        content = self.content().decode()
        if self.server.dead.is_set():
            threading.Event().wait()
        if self.path != "/graphql":
            self.server.streamed.append(content)
            self.reply({})
            return
        asked = json.loads(content)
        operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
        assert operation is not None
        self.reply({"data": self.server.answer(operation[1], asked.get("variables") or {})})


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def at(server: StandIn) -> dict[str, str]:
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": SECRETS["WANDB_API_KEY"]}


@pytest.mark.parametrize("job_type, uses", [("train", 0), ("inference", 1)])
def test_an_online_run_commits_its_metrics_and_its_model(
    tmp_path: Path, stand_in: StandIn, job_type: str, uses: int
) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_bytes(b"weights")
    export = f"tracker.export(Path({str(tmp_path / 'export')!r}), 'f' * 64)"
    told = in_a_process(tmp_path / "run", mode="auto", job_type=job_type, then=export, **at(stand_in))
    assert (told.returncode, told.stderr) == (0, "")
    run = stand_in.variables("UpsertBucket")[0]
    assert told.stdout == f"trained {stand_in.url}/acme/isoforward/runs/{run['name']}\n"
    assert (run["groupName"], run["jobType"], run["host"]) == ("g", job_type, None)
    assert "wandb-history.jsonl" in "".join(stand_in.streamed)
    assert stand_in.put["model.safetensors"] == b"weights"
    name = "export-" + "f" * 16
    assert stand_in.variables("CommitArtifact") == [{"artifactID": name}]
    assert [used["input"]["artifactID"] for used in stand_in.variables("UseArtifact")] == [name] * uses


def test_a_network_lost_in_mid_run_changes_nothing_but_where_to_look(tmp_path: Path, stand_in: StandIn) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_bytes(b"weights")
    lose = f"import urllib.request; urllib.request.urlopen({stand_in.url!r}).read()"
    export = f"{lose}\ntracker.live(2, {{'loss': 0.5}})\ntracker.export(Path({str(tmp_path / 'export')!r}), 'f' * 64)"
    bounds = {"WANDB_HTTP_TIMEOUT": "2", "WANDB_FINISH_TIMEOUT": "2"}
    told = in_a_process(tmp_path / "run", mode="auto", then=export, **at(stand_in), **bounds)
    assert told.returncode == 0, told.stderr
    assert re.fullmatch(rf"trained wandb sync {tmp_path}/run/wandb/run-\S+\n", told.stdout)
    kept = json.dumps(of("history", records(tmp_path / "run")))
    assert re.search(r'"loss": ?0.5', kept), kept


def test_dashboards_are_saved_with_their_panels(tmp_path: Path, stand_in: StandIn) -> None:
    pytest.importorskip("wandb_workspaces")
    save = "[wandb_tracker.main([what, '--entity', 'acme', '--project', 'gpt']) for what in ('workspace', 'report')]"
    command = [sys.executable, "-c", f"from isoforward.show import wandb_tracker; print({save})"]
    env = {"PYTHONPATH": str(SRC), "HOME": str(tmp_path), "PATH": os.environ["PATH"]} | at(stand_in)
    told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    workspace, report, codes = told.stdout.splitlines()
    assert codes == "[0, 0]", told.stderr
    assert workspace.startswith(f"{stand_in.url}/acme/gpt?") and f"{stand_in.url}/acme/gpt/reports/" in report
    for operation in ("UpsertView2", "upsertView"):
        (saved,) = stand_in.variables(operation)
        assert (saved["entityName"], saved["projectName"]) == ("acme", "gpt")
        assert "charts/two_lives_table" in saved["spec"]


@pytest.mark.parametrize("what", ["workspace", "report"])
def test_a_missing_package_is_named_with_the_way_out(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert wandb_tracker.main([what, "--entity", "acme", "--project", "gpt"]) == BadInput.exit_code
    assert "pip install 'isoforward[wandb-workspaces]'" in capsys.readouterr().err


def test_dashboards_without_a_key_are_refused_without_a_prompt(
    no_key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    assert wandb_tracker.main(["workspace", "--entity", "acme", "--project", "gpt"]) == BadInput.exit_code
    assert "WANDB_API_KEY" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "mode", "written"),
    [
        ({"WANDB_MODE": "disabled"}, "auto", False),
        ({"WANDB_DISABLED": "true"}, "auto", False),
        ({"WANDB_MODE": "offline"}, "auto", True),
        ({"WANDB_MODE": "offline"}, "none", False),
        ({"WANDB_MODE": "disabled"}, "wandb", True),
    ],
)
def test_its_own_variables_switch_it_off_unless_a_key_was_typed(
    variables: dict[str, str], mode: str, written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))  # where no key is kept
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = TrackingConfig(mode=mode)
    about: dict[str, Any] = {"job_type": "train", "name": "n", "group": "g", "resolved_config": {}}
    with open_tracker(config, run_dir=tmp_path, **about, say=lambda line: None):
        pass
    assert bool(list(tmp_path.glob("wandb/*run-*"))) == written


def test_its_own_variables_beat_defaults_and_keys_beat_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    theirs = {"PROJECT": "mine", "ENTITY": "us", "RUN_GROUP": "their group", "NAME": "their name", "TAGS": "a,b"}
    for name, value in {**theirs, "MODE": "offline", "DIR": str(elsewhere), "CACHE_DIR": str(tmp_path / "c")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    about: dict[str, Any] = {"job_type": "train", "name": "n", "group": "g", "resolved_config": {}, "tags": ["train"]}
    typed = TrackingConfig(project="p", entity="e", group="k", tags=["t"])
    for config, expected in (
        (TrackingConfig(), ("mine", "us", "their group", "their name", {"a", "b", "train"})),
        (typed, ("p", "e", "k", "their name", {"t", "train"})),
    ):
        with open_tracker(config, run_dir=tmp_path / "run", **about) as tracker:
            assert isinstance(tracker, WandbTracker)
            run = tracker.run
            assert (run.project, run.entity, run.group, run.name, set(run.tags)) == expected
            assert run.settings.sync_dir.startswith(str(elsewhere))
    assert os.environ["WANDB_CACHE_DIR"] == str(tmp_path / "c")
