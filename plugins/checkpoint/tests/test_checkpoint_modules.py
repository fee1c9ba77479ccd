"""What a resume puts back beside the model, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import CheckpointError, Run, Span, hookimpl, option, plugin, state
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_detection.testing import TinyDetector, tiny_run


@plugin(resume_neutral=("*",))
class Beside:
    """Keeps two networks beside the model, and changes the weights of both in every iteration."""

    start: float = option(default=0.0, help="the weights at first")
    seen: list = state(factory=list)

    @hookimpl
    def prepare_model(self, run: Run) -> None:
        for name, saved in (("kept", True), ("lost", False)):
            network = torch.nn.Linear(2, 1)
            torch.nn.init.constant_(network.weight, self.start)
            run.add_module(name, network, trained=False, saved=saved)

    @hookimpl
    def before_train_iter(self, run: Run) -> None:
        self.seen.append([run.modules[name].weight[0, 0].item() for name in ("kept", "lost")])

    @hookimpl
    def after_train_iter(self, run: Run) -> None:
        for network in run.modules.values():
            with torch.no_grad():
                network.weight += 1


def run_of(folder: Path, until: str, beside: Beside, **more: Any) -> Run:
    checkpoint = Checkpoint(every=Span(2, "iters"), accept_changes=more.pop("accept_changes", False))
    plugins = {"model": TinyDetector(dropout=0), "beside": beside, "checkpoint": checkpoint}
    return tiny_run({**plugins, **more}, until=until, work_dir=folder)


def test_a_network_beside_the_model_comes_back_where_it_is_saved(tmp_path: Path):
    run_of(tmp_path, "2 iters", Beside())
    again = Beside(start=10.0)
    run_of(tmp_path, "4 iters", again)
    assert again.seen == [[2, 10], [3, 11]]


@plugin
class Counts:
    """Has a state."""

    count: int = state(default=5)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.count = saved["count"]


def test_a_plugin_without_a_state_in_the_checkpoint_starts_anew_where_changes_are_accepted(tmp_path: Path):
    run_of(tmp_path, "2 iters", Beside())
    with pytest.raises(CheckpointError, match=r"counts\.use: \(absent\) -> Counts"):
        run_of(tmp_path, "4 iters", Beside(), counts=Counts())
    counts = Counts()
    assert run_of(tmp_path, "4 iters", Beside(), counts=counts, accept_changes=True).iter == 4
    assert counts.count == 5
    counts = Counts()
    counts.count = 7
    run_of(tmp_path, "6 iters", Beside(), counts=counts)
    assert counts.count == 5, "as it was saved by then"
