"""Optimizer stepping: backward, clipping, accumulation, precision and the step, in `after_train_iter`."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from detkernel import Run, hookimpl, hookspec, option, plugin, state
from detkernel.detection import Detections, Losses

if TYPE_CHECKING:
    from torch import Tensor


class OptimizerEvents:
    """Events around a step, for every plugin that wants to see or change gradients."""

    @hookspec
    def before_optimizer_step(self, run: Run) -> None:
        """Gradients are complete and unscaled, and not clipped yet; the optimizer has not stepped."""

    @hookspec
    def after_optimizer_step(self, run: Run) -> None:
        """The optimizer has stepped; the gradients are still there."""


@plugin
class Group:
    """Settings for the parameters that a pattern matches."""

    match: str = option(help="parameter names, with * and ? as in file names, such as `backbone.*`")
    lr_mult: float = option(default=1.0, at_least=0, help="factor of the learning rate; 0 freezes")
    weight_decay_mult: float = option(default=1.0, at_least=0, help="factor of the weight decay")


@plugin
class Stepping:
    """What all stepping plugins share."""

    key = "optimizer"
    priority = "above_normal"
    events: ClassVar[type] = OptimizerEvents

    lr: float = option(above=0, help="learning rate, before the schedule")
    weight_decay: float = option(default=0.0, at_least=0, help="weight decay")
    groups: list[Group] = option(
        factory=list,
        help="other learning rates or decays, for parameters by name; the first pattern that matches counts",
    )
    norm_weight_decay: float | None = option(
        default=None, at_least=0, help="weight decay of normalisation layers; null: as all others"
    )
    bias_weight_decay: float | None = option(
        default=None, at_least=0, help="weight decay of biases; null: as all others"
    )
    clip_norm: float | None = option(default=None, above=0, help="largest norm of all gradients together; null: any")
    clip_value: float | None = option(default=None, above=0, help="largest absolute value of a gradient; null: any")
    accumulate: int = option(default=1, at_least=1, help="iterations whose gradients are averaged for a step")
    precision: Literal["fp32", "bf16", "fp16"] = option(
        default="fp32", help="what forward computes in where that is safe (autocast); fp16 with loss scaling"
    )

    _run: Any = state(default=None)
    _scaler: Any = state(default=None)
    _norm: Tensor | None = state(default=None)
    _made: list[dict[str, Any]] = state(factory=list)
    """The settings of the parameter groups as the config has them, before anybody changed one."""
    _resumed: bool = state(default=False)
    """Whether no step has been taken since the state came out of a checkpoint."""

    @hookimpl
    def before_run(self, run: Run) -> None:
        from detkernel_optim import _stepping

        self._run = run
        run.optimizer = self._make(_stepping.parameter_groups(self, run.bare_model))
        for group in run.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._made, self._resumed = _stepping.group_settings(run.optimizer), False
        self._scaler = _stepping.scaler(self.precision, run.device)
        run.scalars["lr"] = lambda: float(run.optimizer.param_groups[0]["lr"])
        if self.clip_norm is not None:
            run.scalars["grad_norm"] = lambda: float("nan") if self._norm is None else float(self._norm)

    @hookimpl(wrapper=True)
    def train_step(self, run: Run) -> Generator[None, Losses, Losses]:
        if self.precision == "fp32":
            return (yield)
        from detkernel_optim import _stepping

        with _stepping.autocast(self.precision, run.device):
            return (yield)

    @hookimpl(wrapper=True)
    def val_step(self, run: Run) -> Generator[None, Sequence[Detections], Sequence[Detections]]:
        if self.precision == "fp32":
            return (yield)
        from detkernel_optim import _stepping

        with _stepping.autocast(self.precision, run.device):
            return (yield)

    @hookimpl
    def after_train_iter(self, run: Run, losses: Losses) -> None:
        from detkernel_optim import _stepping

        loss = _stepping.total(losses)
        if self.accumulate > 1:
            loss = loss / self.accumulate
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        if run.iter % self.accumulate == 0 or run.iter >= run.max_iters:
            self._step(run)

    @hookimpl
    def summary(self, run: Run) -> Mapping[str, str]:
        groups = len(run.optimizer.param_groups)
        name, many = type(run.optimizer).__name__, f"{groups} parameter group{'s' * (groups > 1)}"
        return {"optimizer": f"{name}, lr {self.lr:g}, {many}, {self.precision}"}

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, the loss scale, gradients in accumulation, and the norm at the last step."""
        run = self._run
        partial = run.iter % self.accumulate != 0
        gradients = {name: p.grad for name, p in run.bare_model.named_parameters() if p.grad is not None}
        return {
            "kind": type(run.optimizer).__name__,
            "optimizer": run.optimizer.state_dict(),
            "made": self._made,
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "gradients": gradients if partial else {},
            "grad_norm": self._norm,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moments, counts and what the run itself changed in the parameter groups; what the config now says, holds."""
        from detkernel_optim import _restore

        _restore.optimizer(self._run.optimizer, state, self._made)
        _restore.scaler(self._scaler, state["scaler"])
        _restore.gradients(self._run.bare_model, state["gradients"])
        self._norm = _restore.norm(state["grad_norm"])
        self._resumed = True

    def _step(self, run: Run) -> None:
        from detkernel_optim import _stepping

        if self._scaler is not None:
            self._scaler.unscale_(run.optimizer)
        run.bus.publish("before_optimizer_step", run=run)
        self._norm = _stepping.clip(run.optimizer, self.clip_norm, self.clip_value)
        try:
            if self._scaler is None:
                run.optimizer.step()
            else:
                self._scaler.step(run.optimizer)
                self._scaler.update()
        except Exception as error:
            raise _stepping.misfit(error) if self._resumed else error from None
        self._resumed = False
        run.bus.publish("after_optimizer_step", run=run)
        run.optimizer.zero_grad(set_to_none=True)

    def _make(self, groups: list[dict[str, Any]]) -> Any:
        """The torch optimizer, for parameter groups with `lr` and `weight_decay` filled in."""
        raise NotImplementedError


@plugin
class Sgd(Stepping):
    """Stochastic gradient descent with momentum."""

    momentum: float = option(default=0.9, at_least=0, below=1, help="momentum")
    nesterov: bool = option(default=False, help="Nesterov's momentum")

    def __attrs_post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: needs a momentum above 0")

    def _make(self, groups: list[dict[str, Any]]) -> Any:
        from torch.optim import SGD

        return SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


@plugin
class Adam(Stepping):
    """Adam (Kingma and Ba 2015); its weight decay is an L2 penalty."""

    betas: tuple[float, float] = option(default=(0.9, 0.999), at_least=0, below=1, help="of the two moments")
    eps: float = option(default=1e-8, above=0, help="what the denominator gains")

    def _make(self, groups: list[dict[str, Any]]) -> Any:
        from torch.optim import Adam

        return Adam(groups, lr=self.lr, betas=self.betas, eps=self.eps)


@plugin
class Adamw(Stepping):
    """AdamW (Loshchilov and Hutter 2019): Adam with decoupled weight decay."""

    weight_decay: float = option(default=0.01, at_least=0, help="weight decay")
    betas: tuple[float, float] = option(default=(0.9, 0.999), at_least=0, below=1, help="of the two moments")
    eps: float = option(default=1e-8, above=0, help="what the denominator gains")

    def _make(self, groups: list[dict[str, Any]]) -> Any:
        from torch.optim import AdamW

        return AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)


@plugin
class TorchOptimizer(Stepping):
    """Any optimizer of torch.optim, by name, such as `{use: torch_optimizer, name: RAdam, lr: 1e-3}`."""

    name: str = option(help="the class in torch.optim")
    args: dict[str, Any] = option(factory=dict, help="its other arguments, by name")

    @hookimpl
    def setup(self, run: Run) -> None:
        """Before any data is read."""
        from detkernel_optim import _stepping

        _stepping.optimizer_class(self, self.name, self.args)

    def _make(self, groups: list[dict[str, Any]]) -> Any:
        from detkernel_optim import _stepping

        return _stepping.by_name(self, groups)
