"""Optimizer stepping: backward, clipping, accumulation, loss scaling and the step, in `after_train_iter`."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from detkernel import Run, UserError, hookimpl, option, plugin, state, wrong
from detkernel_detection import Batch, Losses

if TYPE_CHECKING:
    from torch import Tensor

    from detkernel_optim.gradients import Norms
    from detkernel_optim.loss_terms import Totals

_MOST_SKIPPED = 50
"""Steps left out one after the other, before a run is said to learn nothing."""


@plugin
class Group:
    """Settings for the parameters that a pattern matches."""

    match: str = option(help="parameter names, with * and ? as in file names, such as `backbone.*`")
    lr_mult: float = option(default=1.0, at_least=0, help="factor of the learning rate; 0 freezes")
    weight_decay_mult: float = option(default=1.0, at_least=0, help="factor of the weight decay")


@plugin
class LayerDecay:
    """Learning rates that fall from the head to the input, layer by layer (Clark et al. 2020, ELECTRA)."""

    decay: float = option(above=0, at_most=1, help="factor from one layer to the one before it")
    layers: list[str] = option(
        factory=lambda: ["backbone.body.*"],
        help="the layers from the input on, by the names of their modules; a * stands for no dot. All others keep `lr`",
    )


@plugin(key="optimizer", priority="above_normal")
class Stepping:
    """What all stepping plugins share."""

    lr: float = option(above=0, help="learning rate, before the schedule")
    base_batch_size: int | None = option(
        default=None,
        was="base_batch",
        at_least=1,
        help="images a step that `lr` is meant for: it is multiplied by the images a step of this run (batch size x "
        "processes x `accumulate`) over this; null: `lr` as it is",
    )
    weight_decay: float = option(default=0.0, at_least=0, help="weight decay")
    groups: list[Group] = option(
        factory=list,
        help="other learning rates or decays, for parameters by name; the first pattern that matches counts",
    )
    layer_decay: LayerDecay | None = option(default=None, help="lower learning rates towards the input; null: none")
    norm_weight_decay: float | None = option(
        default=None, at_least=0, help="weight decay of normalisation layers; null: as all others"
    )
    bias_weight_decay: float | None = option(
        default=None, at_least=0, help="weight decay of biases; null: as all others"
    )
    clip_norm: float | None = option(default=None, above=0, help="largest norm of all gradients together; null: any")
    clip_value: float | None = option(default=None, above=0, help="largest absolute value of a gradient; null: any")
    accumulate: int = option(
        default=1,
        at_least=1,
        help="iterations whose gradients are averaged for a step; they may lie on both sides of an epoch's end, and "
        "the last step of the run has those that are left",
    )
    invalid_gradients: Literal["stop", "skip"] = option(
        default="stop",
        help="what to do when the norm of the gradients is not finite: stop the run, or leave that step out and count "
        "it (which waits for the device at every step). It is always left out under fp16 (`device.precision`), whose "
        "loss scale is found that way",
    )

    _run: Any = state(default=None)
    _scaler: Any = state(default=None)
    _norm: Tensor | None = state(default=None)
    _norms: Norms = state()
    _totals: Totals = state()
    _window: int = state(default=0)
    """Iterations whose gradients wait for a step."""
    _skipped: int = state(default=0)
    _skipped_last: int = state(default=0)
    """Steps left out, in the whole run and since the last that was taken."""
    _made: list[dict[str, Any]] = state(factory=list)
    """The settings of the parameter groups as the config has them, before anybody changed one."""
    _resumed: bool = state(default=False)
    """Whether no step has been taken since the state came out of a checkpoint."""

    @hookimpl
    def before_run(self, run: Run) -> None:
        from detkernel_optim import gradients, loss_terms, optimizer_settings, param_groups

        self._run = run
        if not run.trains:
            return
        groups = param_groups.parameter_groups(self, run, self._rate(run))
        if not any(parameter.requires_grad for _, parameter in run.named_parameters()):
            raise UserError("every parameter of the model is frozen: there is nothing to train")
        run.optimizer = self._make(groups.settings())
        for group in run.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._made, self._resumed = optimizer_settings.group_settings(run.optimizer), False
        self._scaler = optimizer_settings.scaler(run.precision, run.device)
        self._norms, self._totals = gradients.Norms(), loss_terms.Totals()
        self._window = self._skipped = self._skipped_last = 0
        places = {id(group): place for place, group in enumerate(run.optimizer.param_groups)}
        for name, group in groups.rates(run.optimizer.param_groups).items():
            run.scalars[name] = partial(_rate_at, run, places[id(group)])
        if self.clip_norm is not None:
            run.scalars["grad_norm"] = lambda: float("nan") if self._norm is None else float(self._norm)
        if self.invalid_gradients == "skip" or self._scaler is not None:
            run.scalars["skipped_steps"] = lambda: float(self._skipped)

    @hookimpl(wrapper=True)
    def train_step(self, run: Run) -> Generator[None, Losses, Losses]:
        from detkernel_optim import loss_terms

        with self._local(run, run.iter + 1):
            losses = yield
        return self._totals.without(run, loss_terms.scalars(losses, run.device))

    @hookimpl
    def after_train_iter(self, run: Run, batch: Batch, losses: Losses) -> None:
        from detkernel_optim import loss_terms

        loss = loss_terms.total(run, losses)
        with self._local(run, run.iter):
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        run.hook.after_backward(run=run)
        complete = self._completes(run, run.iter)
        self._window += 1
        if complete:
            self._step(run, batch, losses)

    @hookimpl
    def before_val_epoch(self, run: Run) -> None:
        if run.trains:
            self._norms.look()

    @hookimpl(optionalhook=True)
    def before_save(self) -> None:
        self._norms.look()

    @hookimpl(optionalhook=True)
    def after_log_line(self) -> None:
        self._norms.look()

    @hookimpl
    def summary(self, run: Run) -> Mapping[str, str]:
        from detkernel_optim import param_groups

        name = type(run.optimizer).__name__
        scaled = f" ({self.lr:g} for {self.base_batch_size} images a step)" if self.base_batch_size is not None else ""
        text = f"{name}, lr {self._rate(run):g}{scaled}"
        return {"optimizer": text, "parameter groups": param_groups.described(run.optimizer)}

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, the loss scale, where in an accumulation this is, and the norm at the last step."""
        run = self._run
        return {
            "kind": type(run.optimizer).__name__,
            "optimizer": run.optimizer.state_dict(),
            "made": self._made,
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "window": self._window,
            "processes": run.world_size,
            "grad_norm": self._norm,
            "skipped": [self._skipped, self._skipped_last],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moments, counts and what the run itself changed in the parameter groups; what the config now says, holds."""
        from detkernel_optim import restoring

        restoring.optimizer(self._run.optimizer, state, self._made)
        restoring.scaler(self._scaler, state["scaler"])
        self._window = restoring.count(state["window"])
        if self._window and state["processes"] != self._run.world_size:
            self._run.log.warning(
                "optimizer: the gradients of %d iterations, accumulated by %d processes, are dropped: there are %d now",
                *(self._window, state["processes"], self._run.world_size),
            )
            self._window = 0
        self._norm = restoring.norm(state["grad_norm"])
        self._skipped, self._skipped_last = map(restoring.count, state["skipped"])
        self._resumed = True

    def rank_state_dict(self) -> dict[str, Any]:
        """Gradients in the midst of an accumulation: each process has its own, until a step averages them."""
        if self._window == 0:
            return {}
        device = "cpu" if self._run.world_size > 1 else None
        named = self._run.named_parameters()
        return {"gradients": {name: p.grad.to(device) for name, p in named if p.grad is not None}}

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        from detkernel_optim import restoring

        if self._window:
            restoring.gradients(self._run, state["gradients"])

    def _rate(self, run: Run) -> float:
        """`lr`, for the images a step that this run has."""
        if self.base_batch_size is None:
            return self.lr
        batch_size = getattr(run.loaders["train"], "batch_size", None)
        if batch_size is None:
            loader = type(run.loaders["train"]).__name__
            raise wrong(self, "base_batch_size", f"the train loader, {loader}, does not say its `batch_size`")
        return self.lr * float(batch_size) * run.world_size * self.accumulate / self.base_batch_size

    def _completes(self, run: Run, iteration: int) -> bool:
        """Whether there is a step behind an iteration, counted from 1."""
        return self._window + 1 >= self.accumulate or iteration >= run.max_iters

    def _local(self, run: Run, iteration: int) -> AbstractContextManager[None]:
        """Around forward and backward: only those before a step exchange gradients with the other processes.

        A static graph is one in which every iteration does.
        """
        model = run.model
        if self._completes(run, iteration) or not hasattr(model, "no_sync") or getattr(model, "static_graph", False):
            return nullcontext()
        context: AbstractContextManager[None] = run.model.no_sync()
        return context

    def _step(self, run: Run, batch: Batch, losses: Losses) -> None:
        from detkernel_optim import gradients, optimizer_settings

        if self._window > 1:
            gradients.average(run.optimizer, self._window)
        self._window = 0
        if self._scaler is not None:
            self._scaler.unscale_(run.optimizer)
        run.hook.before_optimizer_step(run=run)
        norm = gradients.norm(run.optimizer)
        taken = self._is_fit(run, batch, losses, norm)
        if taken:
            self._norm = norm
            gradients.clip(run.optimizer, norm, self.clip_norm, self.clip_value)
            try:
                run.optimizer.step()
            except Exception as error:
                raise optimizer_settings.misfit(error) if self._resumed else error from None
            self._resumed = False
        if self._scaler is not None:
            self._scaler.update()
        if taken:
            run.hook.after_optimizer_step(run=run)
        run.optimizer.zero_grad(set_to_none=True)
        if run.iter >= run.max_iters:
            self._norms.look()

    def _is_fit(self, run: Run, batch: Batch, losses: Losses, norm: Tensor) -> bool:
        """Whether to step with gradients of this norm. Where the answer need not be known at once and the device would
        have to be waited for, it is asked later."""
        from detkernel_optim import gradients

        skips = self.invalid_gradients == "skip" or self._scaler is not None
        if not skips and norm.device.type != "cpu":
            self._norms.add(run.iter, norm)
            return True
        if bool(norm.isfinite()):
            self._skipped_last = 0
            return True
        if not skips:
            raise gradients.invalid(run, batch, losses, norm)
        self._skipped, self._skipped_last = self._skipped + 1, self._skipped_last + 1
        if self._skipped_last >= _MOST_SKIPPED:
            error = gradients.invalid(run, batch, losses, norm)
            raise UserError(f"the last {self._skipped_last} steps were left out: nothing is learned any more. {error}")
        if self._scaler is None and self._skipped_last == 1 and run.is_main:
            run.log.warning(
                "iteration %d: the norm of the gradients is %s; this step is left out (%d so far)",
                *(run.iter, float(norm), self._skipped),
            )
        return False

    def _make(self, groups: list[dict[str, Any]]) -> Any:
        """The torch optimizer, for parameter groups with `lr` and `weight_decay` filled in."""
        raise NotImplementedError


def _rate_at(run: Run, place: int) -> float:
    """The learning rate of a parameter group; by its place, since a resume puts other dicts there."""
    return float(run.optimizer.param_groups[place]["lr"])


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

        return SGD(groups, momentum=self.momentum, nesterov=self.nesterov)


@plugin
class Adam(Stepping):
    """Adam (Kingma and Ba 2015); its weight decay is an L2 penalty."""

    betas: tuple[float, float] = option(default=(0.9, 0.999), at_least=0, below=1, help="of the two moments")
    eps: float = option(default=1e-8, above=0, help="what the denominator gains")

    def _make(self, groups: list[dict[str, Any]]) -> Any:
        from torch.optim import Adam

        return Adam(groups, betas=self.betas, eps=self.eps)


@plugin
class Adamw(Stepping):
    """AdamW (Loshchilov and Hutter 2019): Adam with decoupled weight decay."""

    weight_decay: float = option(default=0.01, at_least=0, help="weight decay")
    betas: tuple[float, float] = option(default=(0.9, 0.999), at_least=0, below=1, help="of the two moments")
    eps: float = option(default=1e-8, above=0, help="what the denominator gains")

    def _make(self, groups: list[dict[str, Any]]) -> Any:
        from torch.optim import AdamW

        return AdamW(groups, betas=self.betas, eps=self.eps)


@plugin
class TorchOptimizer(Stepping):
    """Any optimizer of torch.optim, by name, such as `{use: torch_optimizer, name: RAdam, lr: 1e-3}`."""

    name: str = option(help="the class in torch.optim")
    args: dict[str, Any] = option(factory=dict, help="its other arguments, by name")

    @hookimpl
    def setup(self, run: Run) -> None:
        """Before any data is read."""
        from detkernel_optim import optimizer_settings

        optimizer_settings.optimizer_class(self, self.name, self.args)

    def _make(self, groups: list[dict[str, Any]]) -> Any:
        from detkernel_optim import optimizer_settings

        return optimizer_settings.by_name(self, groups)
