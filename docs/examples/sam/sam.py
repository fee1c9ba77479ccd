"""Sharpness-aware minimisation (Foret et al. 2021, https://arxiv.org/abs/2010.01412)."""

from __future__ import annotations

from typing import Any

from detkernel import Run, hookimpl, option, plugin, state
from detkernel_detection import Batch, Losses


@plugin(key="optimizer", priority="above_normal")
class Sam:
    """Step with the gradient of the worst weights nearby: each iteration goes forward and backward twice.

    With g the gradient at the weights w, SGD with momentum steps w by the gradient at w + rho * g / ||g|| (equation 2
    of the paper). The running statistics of batch norm take in both passes.
    """

    lr: float = option(above=0, help="learning rate, before the schedule")
    momentum: float = option(default=0.9, at_least=0, below=1, help="momentum")
    weight_decay: float = option(default=0.0, at_least=0, help="weight decay")
    rho: float = option(default=0.05, above=0, help="how far away the gradient is taken")
    _run: Any = state()

    @hookimpl
    def before_run(self, run: Run) -> None:
        from torch.optim import SGD

        self._run = run
        trained = [parameter for _, parameter in run.named_parameters() if parameter.requires_grad]
        run.optimizer = SGD(trained, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        run.scalars["lr"] = lambda: float(run.optimizer.param_groups[0]["lr"])

    @hookimpl
    def after_train_iter(self, run: Run, batch: Batch, losses: Losses) -> None:
        import torch

        self._backward(losses)
        with torch.no_grad():
            weights = [p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
            kept = [weight.clone() for weight in weights]
            norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights])
            for weight in weights:
                weight += self.rho / (norm + 1e-12) * weight.grad
        self._backward(run.hook.train_step(run=run, model=run.model, batch=batch))
        with torch.no_grad():
            torch._foreach_copy_(weights, kept)
        run.hook.after_backward(run=run)
        run.hook.before_optimizer_step(run=run)
        run.optimizer.step()
        run.hook.after_optimizer_step(run=run)

    def _backward(self, losses: Losses) -> None:
        self._run.optimizer.zero_grad(set_to_none=True)
        total: Any = sum(value for name, value in losses.items() if "loss" in name)
        total.backward()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._run.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._run.optimizer.load_state_dict(state["optimizer"])
