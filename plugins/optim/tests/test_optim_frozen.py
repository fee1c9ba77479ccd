"""Freezing: weights and statistics, for a part of a run."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from detkernel import ConfigError, Span, hookimpl, option, plugin, state
from detkernel_detection.testing import HookContract, tiny_run
from detkernel_optim.ema import Ema
from detkernel_optim.frozen import Frozen
from detkernel_optim.stepping import Sgd


@plugin
class Watch:
    """Keeps what the first layers are after every iteration, and sets modes around validations as `device` does."""

    weights: list = state(factory=list)
    means: list = state(factory=list)
    thaw: bool = option(default=False, help="freezes a bias of its own")

    @hookimpl
    def prepare_model(self, run):
        if self.thaw:
            run.model[0][1].bias.requires_grad_(False)

    @hookimpl(trylast=True)
    def before_val_epoch(self, run):
        run.model.eval()

    @hookimpl
    def after_val_epoch(self, run):
        run.model.train()

    @hookimpl
    def before_run(self, run):
        self._keep(run)

    @hookimpl(trylast=True)
    def after_train_iter(self, run):
        self._keep(run)

    def _keep(self, run):
        self.weights.append(run.model[0][0].weight.detach().clone())
        self.means.append(run.model[0][1].running_mean.clone())


def moved(tensors: list[torch.Tensor]) -> list[bool]:
    return [not torch.equal(a, b) for a, b in pairwise(tensors)]


def watched(folder: Any, frozen: Frozen, **more: Any) -> tuple[Any, Watch]:
    watch = Watch()
    plugins = {"frozen": frozen, "optimizer": Sgd(lr=0.1), "ema": Ema(decay=0.5, ramp=0), "watch": watch, **more}
    run = tiny_run(plugins, until="4 iters", validate="1 iter", work_dir=folder)
    return run, watch


def test_what_is_frozen_stays_with_its_statistics_through_validations(tmp_path):
    run, watch = watched(tmp_path, Frozen(match=["0.*"]))
    assert moved(watch.weights) == moved(watch.means) == [False] * 4
    assert run.model.training
    assert run.model[0][1].num_batches_tracked == 0


def test_statistics_move_if_they_are_let(tmp_path):
    _, watch = watched(tmp_path, Frozen(match=["0.*"], statistics=False))
    assert (moved(watch.weights), moved(watch.means)) == ([False] * 4, [True] * 4)


def test_the_statistics_of_a_norm_that_is_trained_in_part_move(tmp_path):
    run, watch = watched(tmp_path, Frozen(match=["0.0.*", "0.1.weight"]))
    assert (moved(watch.weights), moved(watch.means)) == ([False] * 4, [True] * 4)
    assert run.model[0][1].bias.requires_grad


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"until": Span(2, "iters")}, [False, False, True, True]),
        ({"start": Span(2, "iters")}, [True, True, False, False]),
        ({"start": Span(1, "iters"), "until": Span(3, "iters")}, [True, False, False, True]),
    ],
)
def test_freezing_for_a_part_of_the_run(options, expected, tmp_path):
    _, watch = watched(tmp_path, Frozen(match=["0.*"], **options))
    assert moved(watch.weights) == moved(watch.means) == expected


def test_the_wrapper_for_several_processes_learns_of_it_before_the_step(tmp_path):
    flags = []

    @plugin
    class Wrapper:
        """Looks where `device` wraps the model anew."""

        @hookimpl(trylast=True)
        def prepare_model(self, run):
            flags.append(run.model[0][0].weight.requires_grad)

        @hookimpl(trylast=True)
        def before_train_iter(self, run):
            flags.append(run.model[0][0].weight.requires_grad)

    watched(tmp_path, Frozen(match=["0.*"], until=Span(2, "iters")), wrapper=Wrapper())
    assert flags == [False, False, False, True, True]


def test_what_others_have_frozen_is_not_thawed(tmp_path):
    watch = Watch(thaw=True)
    plugins = {"watch": watch, "frozen": Frozen(match=["0.*"], until=Span(1, "iters")), "optimizer": Sgd(lr=0.1)}
    run = tiny_run(plugins, until="2 iters", work_dir=tmp_path)
    assert not run.model[0][1].bias.requires_grad
    assert run.model[0][0].weight.requires_grad


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"match: no parameter is called 'backbone\.\*'"):
        tiny_run({"frozen": Frozen(match=["backbone.*"])}, work_dir=tmp_path)
    with pytest.raises(ValueError, match="match: expected at least one pattern"):
        Frozen(match=[])


class TestContract(HookContract):
    def plugin(self):
        return Frozen(match=["0.*"], until=Span(3, "iters"))
