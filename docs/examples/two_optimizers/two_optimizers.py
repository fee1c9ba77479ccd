"""A stepping of your own: the backbone by AdamW, the rest by SGD with momentum."""

from __future__ import annotations

from typing import Any

from detkernel import Run, hookimpl, option, plugin, state
from detkernel_detection import Losses


@plugin(key="optimizer", priority="above_normal")
class TwoOptimizers:
    """Step the parameters whose names start with a text by AdamW and the others by SGD."""

    prefix: str = option(default="backbone", help="the parameters' names start with it")
    adamw_lr: float = option(default=1e-4, above=0, help="learning rate of AdamW")
    sgd_lr: float = option(default=1e-2, above=0, help="learning rate of SGD")
    _both: list[Any] = state(factory=list)

    @hookimpl
    def before_run(self, run: Run) -> None:
        from torch.optim import SGD, AdamW

        named = [(name, p) for name, p in run.named_parameters() if p.requires_grad]
        inside = [p for name, p in named if name.startswith(self.prefix)]
        outside = [p for name, p in named if not name.startswith(self.prefix)]
        self._both = [AdamW(inside, lr=self.adamw_lr), SGD(outside, lr=self.sgd_lr, momentum=0.9)]
        run.scalars["lr"] = lambda: self.sgd_lr

    @hookimpl
    def after_train_iter(self, run: Run, losses: Losses) -> None:
        for optimizer in self._both:
            optimizer.zero_grad(set_to_none=True)
        total: Any = sum(value for name, value in losses.items() if "loss" in name)
        total.backward()
        run.hook.after_backward(run=run)
        run.hook.before_optimizer_step(run=run)
        for optimizer in self._both:
            optimizer.step()
        run.hook.after_optimizer_step(run=run)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self._both]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, kept in zip(self._both, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
