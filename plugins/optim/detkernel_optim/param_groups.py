"""Which parameter is trained with which learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import attrs
import torch
from detkernel import Run, wrong
from detkernel.errors import did_you_mean
from torch import Tensor, nn

if TYPE_CHECKING:
    from detkernel_optim.stepping import Group, LayerDecay, Stepping

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_SHOWN = 3


@attrs.define(eq=False)
class Groups:
    """The parameter groups of a model: those of equal settings are one group, since a step costs by the group."""

    base: float
    """The learning rate of what no option changes."""
    _found: dict[tuple[float, float], list[Tensor]] = attrs.field(init=False, factory=dict)
    _names: dict[float, str] = attrs.field(init=False, factory=dict)
    """Learning rate -> the pattern of the config that asks for it, empty where layers do."""

    def add(self, parameter: Tensor, lr: float, decay: float, pattern: str) -> None:
        self._found.setdefault((lr, decay), []).append(parameter)
        self._names.setdefault(lr, pattern)

    def settings(self) -> list[dict[str, Any]]:
        """What a torch optimizer is made of. A parameter that two modules share is there once."""
        taken: set[int] = set()
        made = []
        for (lr, decay), parameters in self._found.items():
            own = list({id(parameter): parameter for parameter in parameters if id(parameter) not in taken}.values())
            taken.update(map(id, own))
            if own:
                made.append({"params": own, "lr": lr, "weight_decay": decay})
        return made

    def rates(self, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The groups whose learning rates the log shows: name -> group, one for each distinct rate.

        `lr` is what no option changes, or else the highest. Rates by layer are many: the lowest stands for them.
        """
        trained = [group for group in groups if any(parameter.requires_grad for parameter in group["params"])] or groups
        distinct: dict[float, dict[str, Any]] = {}
        for group in trained:
            distinct.setdefault(group["lr"], group)
        base = self.base if self.base in distinct else max(distinct)
        shown = {"lr": distinct.pop(base)}
        layers = [lr for lr in distinct if not self._names[lr]]
        shown |= {f"lr_{self._names[lr]}": group for lr, group in distinct.items() if self._names[lr]}
        return shown | ({"lr_lowest": distinct[min(layers)]} if layers else {})


def parameter_groups(options: Stepping, run: Run, lr: float) -> Groups:
    """The groups of all parameters of the model, those that are frozen now included: they may be trained later."""
    networks: Mapping[str, nn.Module] = run.trained_networks
    groups, used = Groups(lr), _Used(options.groups)
    scales = _layer_scales(options.layer_decay, run.bare_model) if options.layer_decay is not None else {}
    named = (
        (f"{network}.{name}".strip("."), one) for network in networks for name, one in networks[network].named_modules()
    )
    for owner_name, owner in named:
        for leaf, parameter in owner.named_parameters(recurse=False):
            name = f"{owner_name}.{leaf}" if owner_name else leaf
            group = used.first(name, parameter)
            decay = _decay(options, owner, leaf)
            scale = scales.get(id(parameter), 1.0)
            mult = 1.0 if group is None else group.lr_mult
            pattern = group.match if group is not None and scale == 1 else ""
            decay_mult = 1.0 if group is None else group.weight_decay_mult
            groups.add(parameter, lr * mult * scale, decay * decay_mult, pattern)
    used.report(options, run)
    return groups


def _decay(options: Stepping, owner: nn.Module, leaf: str) -> float:
    if options.norm_weight_decay is not None and isinstance(owner, _NORMS):
        return options.norm_weight_decay
    if options.bias_weight_decay is not None and leaf == "bias":
        return options.bias_weight_decay
    return options.weight_decay


class _Used:
    """The patterns of `groups`, and what became of each."""

    def __init__(self, groups: list[Group]) -> None:
        self._groups = groups
        self._matched: dict[int, int] = dict.fromkeys(range(len(groups)), 0)
        self._applied: dict[int, int] = dict(self._matched)
        self._trained: dict[int, int] = dict(self._matched)
        self._names: list[str] = []

    def first(self, name: str, parameter: Tensor) -> Group | None:
        self._names.append(name)
        hits = [number for number, group in enumerate(self._groups) if fnmatchcase(name, group.match)]
        for number in hits:
            self._matched[number] += 1
        if not hits:
            return None
        self._applied[hits[0]] += 1
        self._trained[hits[0]] += parameter.requires_grad
        return self._groups[hits[0]]

    def report(self, options: Stepping, run: Run) -> None:
        """Raise ConfigError for a pattern without effect; say which have only frozen parameters."""
        for number, group in enumerate(self._groups):
            if not self._matched[number]:
                hint = did_you_mean(group.match, self._names) or f"; they are called such as {self._names[0]}"
                raise wrong(options, f"groups.{number}", f"no parameter's name matches '{group.match}'{hint}")
            if not self._applied[number]:
                raise wrong(
                    options,
                    f"groups.{number}",
                    f"'{group.match}' has no effect: the patterns before it match all of its {self._matched[number]} "
                    "parameters, and the first that matches counts; put it before them",
                )
            if not self._trained[number] and run.is_main:
                run.log.warning(
                    "optimizer.groups: all %d parameters that '%s' matches are frozen",
                    self._applied[number],
                    group.match,
                )


def _layer_scales(options: LayerDecay, model: nn.Module) -> Mapping[int, float]:
    """id of a parameter -> factor of its learning rate: `decay` in the last layer, its square in the one before."""
    named = list(model.named_modules())[1:]
    modules = {name: module for name, module in named if any(True for _ in module.parameters())}
    layers: list[nn.Module] = []
    for pattern in options.layers:
        found = [name for name in modules if _matches(name, pattern)]
        if not found:
            hint = did_you_mean(pattern, modules)
            hint = hint or f"; they are called such as {', '.join(list(modules)[:_SHOWN])}"
            raise wrong(options, "layers", f"no module with parameters is called '{pattern}'{hint}")
        layers += [modules[name] for name in found]
    scales: dict[int, float] = {}
    for depth, layer in enumerate(reversed(layers), start=1):
        for parameter in layer.parameters():
            scales.setdefault(id(parameter), options.decay**depth)
    return scales


def _matches(name: str, pattern: str) -> bool:
    """Part by part: a `*` stands for no dot."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def described(optimizer: torch.optim.Optimizer) -> str:
    """`lr 0.01, decay 0.05: 14 tensors; lr 0.001, decay 0: 60 tensors (frozen)`."""
    parts = []
    for group in optimizer.param_groups:
        frozen = " (frozen)" * all(not parameter.requires_grad for parameter in group["params"])
        decay = f", decay {group['weight_decay']:g}" if "weight_decay" in group else ""
        count = len(group["params"])
        parts.append(f"lr {group['lr']:.4g}{decay}: {count} tensor{'s' * (count != 1)}{frozen}")
    more = f"; and {len(parts) - 6} more" if len(parts) > 6 else ""
    return "; ".join(parts[:6]) + more
