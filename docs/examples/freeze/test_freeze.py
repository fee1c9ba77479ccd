import pytest
from detkernel import ConfigError, Span, hookimpl, plugin
from detkernel_detection.testing import HookContract, tiny_run
from freeze import Freeze


@plugin
class Weights:
    """Keeps a weight of each layer after every iteration."""

    @hookimpl
    def before_run(self, run):
        self.first = [run.model[0][0].weight.clone()]
        self.last = [run.model[3].weight.clone()]

    @hookimpl
    def after_train_iter(self, run):
        self.first.append(run.model[0][0].weight.detach().clone())
        self.last.append(run.model[3].weight.detach().clone())


def test_frozen_weights_stay_and_move_later(tmp_path):
    weights = Weights()
    tiny_run(
        {"freeze": Freeze(prefix="0", until=Span(3, "iters")), "weights": weights}, until="5 iters", work_dir=tmp_path
    )
    moved = [not a.equal(b) for a, b in zip(weights.first, weights.first[1:], strict=False)]
    assert moved == [False, False, False, True, True]
    assert all(not a.equal(b) for a, b in zip(weights.last, weights.last[1:], strict=False))


def test_a_prefix_that_nothing_has_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no parameter starts with 'neck'"):
        tiny_run({"freeze": Freeze(prefix="neck")}, work_dir=tmp_path)


class TestContract(HookContract):
    def plugin(self):
        return Freeze(prefix="0", until=Span(3, "iters"))
