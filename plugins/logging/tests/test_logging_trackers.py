"""The sinks for Weights & Biases and MLflow, offline: what arrives there, a resume, and what is said when they fail.

Where the packages are not installed, only that message is tested; `tox -e trackers` has them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from detkernel import Run, UserError, hookimpl, plugin, state
from detkernel_detection.testing import tiny_run
from detkernel_logging.log import Log
from detkernel_logging.trackers import Mlflow, Wandb, flat, valid_name

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # those of other packages


@plugin(priority="high")
class Metric:
    """What an evaluator publishes, and a resume, as far as a sink can tell."""

    iter: int = state(default=0)
    fails: bool = state(default=False)

    @hookimpl(trylast=True)
    def before_run(self, run: Run) -> None:
        run.iter = run.batch = self.iter

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        run.metrics.publish("coco/bbox_AR@100", 0.25 + run.iter / 100, better="higher")
        run.metrics.publish("error", 1.0, better="lower")
        (run.work_dir / "sheet.png").write_bytes(PIXEL)
        (run.work_dir / "weights").mkdir(exist_ok=True)
        (run.work_dir / "weights" / "best.pt").write_bytes(b"weights")
        if self.fails:
            raise RuntimeError("as planned")


PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f64540"
    "0000000049454e44ae426082"
)


def trained(sink: Any, folder: Path, *, resumed_at: int = 0, fails: bool = False) -> Run:
    metric = Metric()
    metric.iter, metric.fails = resumed_at, fails
    return tiny_run({"log": Log(interval=2, sinks=[sink]), "metric": metric}, validate="4 iters", work_dir=folder)


@pytest.mark.parametrize(("cls", "name"), [(Wandb, "wandb"), (Mlflow, "mlflow")])
def test_a_package_that_is_missing_is_said_before_anything_runs_and_no_prediction_needs_it(
    cls: Any, name: str, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    message = rf"{name} is not installed: `pip install 'detkernel-logging\[{name}\]'`, or leave this sink out"
    log = Log(sinks=[cls()])
    with pytest.raises(UserError, match=message):
        tiny_run({"log": log}, work_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    log.setup(SimpleNamespace(mode="predict"))  # a prediction logs nothing, and needs neither
    log.after_run(SimpleNamespace(mode="predict"))


@pytest.mark.parametrize("pattern", ["/etc/passwd", "../other/*", ""])
def test_files_are_of_the_work_dir(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: True)
    for cls in (Wandb, Mlflow):
        with pytest.raises(ValueError, match="files: expected names in the work dir"):
            cls(files=[pattern])


def test_a_config_as_parameters_of_mlflow() -> None:
    config = {
        "run": {"until": "4 iters", "seed": 0},
        "data": {"sizes": [1, 2], "none": None},
        "empty": {},
        "a@b": "x" * 7000,
    }
    found = dict(flat(config))
    assert found.pop("a_b") == "x" * 5997 + "..."
    assert found == {
        "run.until": "4 iters", "run.seed": "0", "data.sizes": "[1, 2]", "data.none": "null", "empty": "{}"
    }  # fmt: skip
    assert valid_name("val/coco/bbox_AR@100") == "val/coco/bbox_AR_100"


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in the form of LevelDB's log: blocks of 32 KiB, seven bytes of wandb's own before them."""
    place, record = 7, b""
    while place + 7 <= len(data):
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""
        left = -place % 2**15
        place += left if left < 7 else 0


def offline_records(folder: Path, runs: int = 1) -> list[tuple[str, dict[str, Any]]]:
    """What `wandb sync` would send, of all runs in a work dir: the run's id, and a line of its history.

    wandb's own process writes it, on a busy machine after the run has ended: waits until each has its last validation.
    """
    deadline = time.monotonic() + 60
    while True:
        found = written_records(folder)
        complete = sum("val/coco/bbox_AR@100" in line for _, line in found) >= runs
        if complete or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def written_records(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        name = path.stem.removeprefix("run-")
        for data in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                line = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                found.append((name, line))
    return found


@needs_wandb
def test_wandb_offline_and_a_resume_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    files = ["weights/*.pt", "*.png"]
    trained(Wandb(files=files), tmp_path)
    kept = json.loads((tmp_path / "wandb_run.json").read_text())
    records = offline_records(tmp_path)
    assert {name for name, _ in records} == {kept["id"]}
    losses = {line["iteration"]: line["train/loss"] for _, line in records if "train/loss" in line}
    assert sorted(losses) == [2, 4]
    [validated] = [line for _, line in records if "val/coco/bbox_AR@100" in line]
    assert (validated["val/coco/bbox_AR@100"], validated["iteration"], validated["epoch"]) == (0.29, 4, 1)
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    assert [path.name.startswith("sheet.png") for path in (run / "files" / "media" / "images").iterdir()] == [True]
    assert (run / "files" / "weights" / "best.pt").read_bytes() == b"weights"

    trained(Wandb(), tmp_path, resumed_at=2)
    assert json.loads((tmp_path / "wandb_run.json").read_text()) == kept
    assert {name for name, _ in offline_records(tmp_path, runs=2)} == {kept["id"]}
    trained(Wandb(), tmp_path)  # not a resume
    assert json.loads((tmp_path / "wandb_run.json").read_text()) != kept


@needs_wandb
def test_wandb_without_an_account_is_said_at_once(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom detkernel_detection.testing import tiny_run\n"
        "from detkernel_logging.log import Log\nfrom detkernel_logging.trackers import Wandb\n"
        "tiny_run({'log': Log(sinks=[Wandb(mode='online')])}, work_dir=Path('work'))"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**env, "HOME": str(tmp_path)},
        check=False,
    )  # fmt: skip
    assert "UserError: wandb: No API key configured" in result.stderr
    assert "`mode: offline` asks nobody" in result.stderr


@needs_mlflow
def test_mlflow_and_a_resume_goes_on_in_the_same_run(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client, work = MlflowClient(tracking_uri=uri), tmp_path / "work"
    if client.get_experiment_by_name("mine") is None:
        client.create_experiment("mine", artifact_location=str(tmp_path / "artifacts"))
    sink = {"experiment": "mine", "tracking_uri": uri, "files": ["weights/*.pt", "*.png"]}
    trained(Mlflow(**sink), work)
    kept = json.loads((work / "mlflow_run.json").read_text())
    run = client.get_run(kept["id"])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "work")
    assert run.data.metrics["val/coco/bbox_AR_100"] == 0.29
    assert run.data.tags["better/val/coco/bbox_AR_100"] == "higher"
    assert run.data.tags["better/val/error"] == "lower"
    assert [one.step for one in client.get_metric_history(kept["id"], "train/loss")] == [2, 4]
    assert [one.path for one in client.list_artifacts(kept["id"])] == ["sheet.png", "weights"]

    with pytest.raises(RuntimeError, match="as planned"):
        trained(Mlflow(**sink), work, resumed_at=2, fails=True)
    assert json.loads((work / "mlflow_run.json").read_text()) == kept
    assert client.get_run(kept["id"]).info.status == "FAILED"
    assert [one.step for one in client.get_metric_history(kept["id"], "train/loss")] == [2, 4, 4]
    (work / "mlflow_run.json").write_text('{"id": "nobody"}')
    with pytest.raises(UserError, match=r"nobody.* not found; remove .*mlflow_run\.json to begin a new run there"):
        trained(Mlflow(**sink), work, resumed_at=2)
    (work / "mlflow_run.json").write_text("[")
    with pytest.raises(UserError, match=r"mlflow_run\.json cannot be read"):
        trained(Mlflow(**sink), work, resumed_at=2)


@needs_mlflow
def test_a_service_that_fails_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = Mlflow(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    start = type(sink).start

    def broken(self: Any, run: Run, progress: Any) -> None:
        start(self, run, progress)
        self._client.log_batch = lambda *_, **__: 1 / 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mlflow, "start", broken)
        assert trained(sink, tmp_path / "work").iter == 4
    said = [message for message in caplog.messages if "cannot write" in message]
    assert said == ["log.sinks (mlflow) cannot write: mlflow: division by zero; the run goes on without"]
