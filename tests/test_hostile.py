"""A checkpoint with a valid seal, but states that fit nothing: the run goes on, or ends with one clear error."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detkernel import ConfigError, Run, Span, UserError, hookimpl, plugin
from detkernel_checkpoint import checkpoint_file
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_data.loading.loader import Loader
from detkernel_detection.testing import TinyDataset, tiny_run
from detkernel_guards.early_stopping import EarlyStopping
from detkernel_logging.log import Log
from detkernel_optim.ema import Ema
from detkernel_optim.schedules import Cosine
from detkernel_optim.stepping import Adamw, Sgd, Stepping
from detkernel_runtime.device import Device
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about tensors that nobody would save
Content = dict[str, Any]


@plugin
class Draw:
    """Draws from NumPy's generator, and has a metric."""

    @hookimpl
    def before_train_iter(self, run: Run) -> None:
        np.random.rand()

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        run.metrics.publish("mAP", 0.1 * run.iter, better="higher")


def run(folder: Path, resume: Path | None = None, optimizer: Stepping | None = None, accept: bool = False) -> Run:
    plugins = {
        "device": Device(device="cpu", threads=1, precision="fp16"),
        "data": Loader(train=TinyDataset(size=16), val=TinyDataset(size=2), workers=0),
        "optimizer": optimizer or Adamw(lr=1e-3, accumulate=3, clip_norm=1),
        "schedule": Cosine(),
        "ema": Ema(),
        "draw": Draw(),
        "early_stopping": EarlyStopping(metric="mAP", patience=9),
        "log": Log(interval=5, sinks=[]),
        "checkpoint": Checkpoint(
            every=Span(7, "iters"), best="mAP", resume=str(resume or "auto"), accept_changes=accept, asynchronous=False
        ),
    }
    return tiny_run(plugins, until="8 iters", validate="2 iters", work_dir=folder)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Content:
    folder = tmp_path_factory.mktemp("valid")
    run(folder)
    return checkpoint_file.read(folder / "checkpoints/iter_7.pt")  # behind a step: fp16 leaves the first one out


def resume(content: Content, folder: Path, **more: Any) -> Run:
    checkpoint_file.write(folder / "hostile.pt", content)
    return run(folder, folder / "hostile.pt", **more)


def at(*path: Any) -> Callable[[Content, Any], None]:
    def put(content: Content, value: Any) -> None:
        *way, last = path
        for key in way:
            content = content[key]
        content[last] = value

    return put


MOMENTS = ("plugins", "optimizer", "optimizer", "state", 0)
GROUP = ("plugins", "optimizer", "optimizer", "param_groups", 0)
NUMPY = ("ranks", 0, "device", "numpy")
WEIGHTS = ("plugins", "ema", "averages", "0.0.weight")


@pytest.mark.parametrize(
    ("put", "value", "message"),
    [
        (at(*NUMPY, "position"), 10**9, "plugin 'device' does not fit: NumPy's generator has .* stands at 1000000000"),
        (at(*NUMPY, "words"), torch.zeros(3, dtype=torch.int64), "plugin 'device' does not fit: NumPy's generator"),
        (at(*MOMENTS, "exp_avg"), None, "could not step with its state from the checkpoint: "),
        (at(*MOMENTS, "exp_avg_sq"), torch.zeros(7), "could not step with its state from the checkpoint: "),
        (at(*MOMENTS), {}, None),
        (at(*MOMENTS, "exp_avg"), torch.zeros(2, 2).to_sparse(), "exp_avg: torch._utils._rebuild_sparse"),
        (at(*MOMENTS, "exp_avg"), torch.zeros(1).expand(9), None),  # written whole: it is no longer one
        (at(*GROUP, "betas"), "x", "plugin 'optimizer' does not fit: its 'betas' is 'x', expected such as "),
        (at(*GROUP, "weight_decay"), float("nan"), "its 'weight_decay' is nan"),
        (at("plugins", "optimizer", "scaler", "scale"), float("nan"), "its loss scale is nan"),
        (
            at("ranks", 0, "optimizer", "gradients"),
            {"0.0.weight": torch.zeros(1)},
            "a gradient of .1. for '0.0.weight'",
        ),
        (at("plugins", "optimizer", "kind"), "SGD", "it is of SGD, and this run steps with AdamW"),
        (at(*WEIGHTS), torch.zeros(1), "plugin 'ema' does not fit: its average of '0.0.weight' is torch.float32 .1."),
        (at("plugins", "ema", "steps"), 10**30, "it counts 1000000000000000000000000000000 steps"),
        (at("plugins", "early_stopping", "best"), [1], "plugin 'early_stopping' does not fit: "),
        (at("plugins", "checkpoint", "best_value"), "x", "plugin 'checkpoint' does not fit: could not convert"),
        (at("ranks", 0, "log", "sums"), [{"names": [1], "total": torch.zeros(1), "count": 1}], "plugin 'log' does not"),
        (at("position", "metrics"), {1: 1.0}, "its metrics are not numbers by name"),
        (at("position", "batch"), 0, "its position is none with 8 iterations an epoch"),
        (at("position", "iter"), 10**30, "its position is none"),
        (at("position", "iter"), True, "its position is none"),
        (at("plugins"), {1: 2}, "a state has no plugin's name"),
        (at("training_model"), {}, "does not fit this run's model: Error.* Missing key"),
    ],
)
def test_what_does_not_fit_is_one_error(
    put: Callable[[Content, Any], None], value: Any, message: str | None, valid: Content, tmp_path: Path
) -> None:
    content = copy.deepcopy(valid)
    put(content, value)
    if message is None:
        _outcome(content, tmp_path)
        return
    with pytest.raises(UserError, match=message) as caught:
        resume(content, tmp_path)
    assert "\n" not in str(caught.value)


def test_what_fits_goes_on(valid: Content, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    resumed = resume(valid, tmp_path)
    for name, weight in whole.bare_model.state_dict().items():
        assert torch.equal(resumed.bare_model.state_dict()[name], weight)


def test_what_the_config_now_says_of_the_optimizer_holds(
    valid: Content, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = Adamw(lr=5e-2, weight_decay=0.5, accumulate=3, clip_norm=1)
    group = resume(valid, tmp_path, optimizer=changed, accept=True).optimizer.param_groups[0]
    assert (group["initial_lr"], group["weight_decay"]) == (5e-2, 0.5)
    assert group["lr"] < 5e-2  # by the schedule
    other = Sgd(lr=1e-3, accumulate=3, clip_norm=1)
    with pytest.raises(UserError, match="of another run than this one"):
        resume(valid, tmp_path, optimizer=other)
    afresh = resume(valid, tmp_path, optimizer=other, accept=True).optimizer
    assert type(afresh).__name__ == "SGD"
    assert afresh.param_groups[0]["initial_lr"] == 1e-3
    assert "it is of AdamW, and this run steps with SGD; it starts anew" in caplog.text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
    | st.sampled_from([
        torch.zeros(()), torch.ones(3), torch.zeros(0), torch.tensor(float("nan")),
        torch.zeros(2, 2, dtype=torch.int64),
        torch.ones(2, dtype=torch.complex64), torch.ones(2, 2).to_sparse(), torch.zeros(1).expand(4),
        torch.zeros(16, 3, 3, 3), torch.tensor([2**40]),
    ]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return [place for key, value in items for place in [(*path, key), *places(value, (*path, key))]]


def _outcome(content: Content, folder: Path) -> None:
    with suppress(UserError):
        resume(content, folder)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Nothing is logged, until the test is over."""
    log = logging.getLogger("detkernel")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


@settings(
    max_examples=int(os.environ.get("DETKERNEL_FUZZ", "40")),
    derandomize="DETKERNEL_FUZZ" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_any_value_anywhere(
    valid: Content, quiet: None, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = copy.deepcopy(valid)
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from(places(content)))
        holder: Any = content
        for key in way:
            holder = holder[key]
        if not isinstance(holder, (dict, list)):
            continue
        if data.draw(st.integers(0, 3)) == 0 and isinstance(holder, dict):
            del holder[last]
        else:
            holder[last] = data.draw(VALUES)
    _outcome(content, tmp_path_factory.mktemp("any"))


@pytest.mark.parametrize("save", ["/tmp/found.json", "~/.bashrc", "../found.json"])
def test_what_a_checkpoint_says_is_written_below_the_users_work_dir_or_nowhere(
    valid: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: str
) -> None:
    from detkernel.config import load

    monkeypatch.chdir(tmp_path)
    config = {
        "run": {"until": "8 iters", "work_dir": str(tmp_path / "home")},
        "evaluation": {"use": "coco_map", "save": save},
        "checkpoint": {},
    }
    content = {**valid, "provenance": {**valid["provenance"], "config": config}}
    checkpoint_file.write(tmp_path / "home.pt", content)
    with pytest.raises(ConfigError) as caught:
        load("home.pt")
    assert [problem.path for problem in caught.value.problems] == ["run.work_dir", "evaluation.save"]
    named = load("home.pt", ["run.work_dir=mine", "evaluation.save=found.json"])
    assert named.plain["checkpoint"]["resume"] == str(tmp_path / "home.pt")
