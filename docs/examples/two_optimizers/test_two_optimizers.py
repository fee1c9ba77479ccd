from detkernel import hookimpl, plugin
from detkernel_detection.testing import HookContract, tiny_run
from two_optimizers import TwoOptimizers


@plugin
class Before:
    """Keeps the weights of the start."""

    @hookimpl(trylast=True)
    def before_run(self, run):
        self.weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}


def test_each_part_moves_by_its_own_optimizer(tmp_path):
    before = Before()
    plugins = {"optimizer": TwoOptimizers(prefix="0", adamw_lr=1e-3, sgd_lr=1e-6), "before": before}
    run = tiny_run(plugins, until="1 iters", work_dir=tmp_path)
    moved = {name: (p - before.weights[name]).abs().max().item() for name, p in run.model.named_parameters()}
    assert 5e-4 < moved["0.0.weight"] < 2e-3  # AdamW's first step is lr in each coordinate
    assert 0 < moved["3.weight"] < 1e-4  # SGD's is lr times the gradient


class TestContract(HookContract):
    name = "optimizer"

    def plugin(self):
        return TwoOptimizers(prefix="0")
