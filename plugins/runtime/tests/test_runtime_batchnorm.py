"""Batch norm over all processes: alone it is torch's own; together it is tested with the processes."""

import copy
import pickle

import pytest
import torch
from detkernel_runtime.parallel.sync_batchnorm import over_all_processes
from torch import nn


class Alone:
    """A group of one process."""

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm1d(4, affine=False), (3, 4, 5)),
        (nn.BatchNorm2d(4, momentum=None), (3, 4, 5, 6)),
        (nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 5, 6)),
        (nn.BatchNorm3d(4, momentum=0.3), (2, 4, 3, 2, 3)),
    ],
)
def test_alone_it_is_torchs_own(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype):
    torch.manual_seed(0)
    own, group = copy.deepcopy(layer).to(dtype), Alone()
    ours = over_all_processes(nn.Sequential(copy.deepcopy(layer)).to(dtype), group)  # type: ignore[arg-type]
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {}
    for _ in range(3):
        x = torch.randn(shape, dtype=dtype) * 3 + 1
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        torch.testing.assert_close(ours(one), own(other), **close)
        ours(one).square().sum().backward(), own(other).square().sum().backward()
        torch.testing.assert_close(one.grad, other.grad, **(close or {"rtol": 1e-3, "atol": 1e-4}))
    torch.testing.assert_close(ours[0].state_dict(), own.state_dict(), **close)
    ours.eval(), own.eval()
    torch.testing.assert_close(ours(x), own(x), **close)


def test_a_model_with_it_can_be_copied_and_pickled():
    model = over_all_processes(nn.Sequential(nn.BatchNorm2d(3)), Alone())  # type: ignore[arg-type]
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(again.state_dict()) == list(nn.Sequential(nn.BatchNorm2d(3)).state_dict())
