"""Parameters that are not trained, and the running statistics that go with them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from detkernel import Run, Span, hookimpl, option, plugin, state, wrong
from detkernel.errors import did_you_mean


@plugin
class Frozen:
    """Keep parameters as they are, and by default the running statistics of norms that are all frozen, too.

    For the whole run or a part of it: what is frozen follows from the iteration alone, so a resumed run needs no state.
    """

    match: list[str] = option(help="names of parameters, with * and ? as in file names, such as `backbone.*`")
    start: Span | None = option(default=None, help="frozen from here on, such as '2 epochs'; null: from the beginning")
    until: Span | None = option(default=None, help="trained again from here on; null: frozen to the end")
    statistics: bool = option(
        default=True,
        help="also keep the running mean and variance of norms whose parameters are all frozen, which then normalise "
        "by them (evaluation mode); false: they go on following the data",
    )

    _names: frozenset[str] = state(default=frozenset())
    """Of what it freezes; other parameters that are not trained are not its own."""
    _norms: list[Any] = state(factory=list)
    _held: bool = state(default=False)

    def __attrs_post_init__(self) -> None:
        if not self.match:
            raise ValueError("match: expected at least one pattern, such as `backbone.*`")

    @hookimpl
    def prepare_model(self, run: Run) -> None:
        """Before the model is wrapped, and parameter groups are described."""
        names = [name for name, parameter in run.named_parameters() if parameter.requires_grad]
        known = [name for name, _ in run.named_parameters()]
        for pattern in self.match:
            if not any(fnmatchcase(name, pattern) for name in known):
                heads = ", ".join(sorted({name.partition(".")[0] for name in known}))
                hint = did_you_mean(pattern, known) or f"; the model has {heads}"
                raise wrong(self, "match", f"no parameter is called '{pattern}'{hint}")
        self._names = frozenset(name for name in names if self._matches(name))
        if run.trains:
            self._freeze(run, self._is_due(0, run))

    @hookimpl
    def before_run(self, run: Run) -> None:
        """Norms may have been converted since."""
        self._norms = list(self._own_norms(run)) if self.statistics else []

    @hookimpl
    def before_train_iter(self, run: Run) -> None:
        held = self._is_due(run.iter, run)
        self._freeze(run, held)
        for norm in self._norms if held or self._held else ():  # each time: whoever calls model.train() changes it
            norm.train(not held)
        self._held = held

    def _is_due(self, iteration: int, run: Run) -> bool:
        length = run.epoch_length
        begun = self.start is None or iteration >= self.start.iters(length)
        return begun and (self.until is None or iteration < self.until.iters(length))

    def _matches(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.match)

    def _freeze(self, run: Run, held: bool) -> None:
        for name, parameter in run.named_parameters():
            if name in self._names and parameter.requires_grad is held:
                parameter.requires_grad_(not held)

    def _own_norms(self, run: Run) -> Iterable[Any]:
        """Norms with statistics, all of whose parameters and buffers have names that match."""
        from torch.nn.modules.batchnorm import _NormBase

        for network, top in run.trained_networks.items():
            for name, module in top.named_modules(prefix=network):
                kept = [*module.state_dict()] if isinstance(module, _NormBase) else []
                if kept and all(self._matches(f"{name}.{key}" if name else key) for key in kept):
                    yield module
