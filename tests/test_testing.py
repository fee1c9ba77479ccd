"""The kit for plugin authors, on the kernel's own tiny parts; and that each contract fails where it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import Run, hookimpl, plugin, state
from detkernel.detection import Dataset, Sample, Transform
from detkernel.testing import (
    DatasetContract,
    HookContract,
    ModelContract,
    Recorder,
    TinyDataset,
    TinyDetector,
    TransformContract,
    tiny_run,
)


@plugin
class Darken(Transform):
    """Halves the brightness of some pictures."""

    def __call__(self, sample: Sample) -> Sample:
        if torch.rand(()) < 0.5:
            sample.image = sample.image // 2
        return sample


@plugin
class CountsAndSaves:
    """Adds its count to a weight, and saves the count."""

    _count: int = state(default=0)

    @hookimpl
    def after_train_iter(self, run: Run) -> None:
        self._count += 1
        with torch.no_grad():
            next(run.model.parameters()).add_(self._count * 1e-3)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]


@plugin
class Forgets(CountsAndSaves):
    """As above, and forgets."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class TestModel(ModelContract):
    def plugin(self) -> Any:
        return TinyDetector(dropout=0.0)


class TestDataset(DatasetContract):
    def dataset(self) -> Dataset:
        return TinyDataset()


class TestTransform(TransformContract):
    def transform(self) -> Transform:
        return Darken()


class TestHook(HookContract):
    def plugin(self) -> Any:
        return CountsAndSaves()


def test_a_forgetful_hook_breaks_the_contract(tmp_path: Path) -> None:
    contract = HookContract()
    contract.plugin = Forgets  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="must be in its state_dict"):
        contract.test_resumes_exactly(tmp_path)


def test_the_recorder_sees_every_event_with_its_arguments(tmp_path: Path) -> None:
    recorder = Recorder()
    run = tiny_run(until="2 iters", work_dir=tmp_path, recorder=recorder)
    assert recorder.names("iter") == ["before_train_iter", "after_train_iter"] * 2
    assert recorder.of("train_step")[0].arguments["run"] is run
    assert recorder.names()[0] == "setup"
    assert recorder.names()[-1] == "after_run"
