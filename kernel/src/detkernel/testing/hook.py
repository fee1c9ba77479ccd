"""What a hook promises: exact resume stays exact."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detkernel.loop import Kernel
from detkernel.plugin import hookimpl, option, plugin, state
from detkernel.run import Run
from detkernel.testing.plain import plain_kernel

ITERS = 6


class HookContract:
    """A hook leaves exact resume exact, in a run of plain objects.

    `detkernel_detection.testing` has one of the same name, in which the hook sees a small detector, its batches and
    its detections.
    """

    name = "mine"
    """Its key in the config: `optimizer`, `data` or `model` where it takes the place of the plain one."""
    generator_names = "Python's"
    """Whose global generators `generators` gives."""

    def plugin(self) -> Any:
        """The plugin; called anew for every run."""
        raise NotImplementedError("return your plugin")

    def kernel(self, plugins: Mapping[str, object], **options: Any) -> Kernel:
        """The kernel of a run with these plugins."""
        return plain_kernel(plugins, **options)

    def seed(self) -> None:
        """Seed the generators that a plugin may draw from."""
        random.seed(0)

    def generators(self) -> Any:
        """The states of these generators."""
        return random.getstate()

    def restore(self, states: Any) -> None:
        """Put them back to where they were."""
        random.setstate(states)

    def test_resumes_exactly(self, tmp_path: Path) -> None:
        through = self._run(tmp_path / "through", None)
        for position in range(1, ITERS):
            resumed = self._run(tmp_path / str(position), through.kept[position])
            for name, value in through.kept[ITERS].items():
                assert _equal(value, resumed.kept[ITERS].get(name)), (
                    f"resumed at iteration {position}, the run ends with another {name} than the undisturbed one; what "
                    "a plugin remembers between iterations must be in its state_dict() and load_state_dict(), and its "
                    f"random numbers must come from {self.generator_names} global generator"
                )

    def test_saves_what_a_checkpoint_can_hold(self, tmp_path: Path) -> None:
        for kept in self._run(tmp_path, None).kept.values():
            _check_plain(kept.get(f"plugin {self.name}"), "state_dict()")

    def _run(self, folder: Path, resume: dict[str, Any] | None) -> _Keeper:
        self.seed()
        keeper = _Keeper(resume=resume, contract=self)
        plugins = {self.name: self.plugin(), "keeper": keeper}
        run = self.kernel(plugins, until=f"{ITERS} iters", validate="every 4 iters", work_dir=folder).run()
        assert run.iter == ITERS, (
            f"the run ended at iteration {run.iter} ({run.stop_reason}), but the contract resumes from each of {ITERS} "
            "iterations and compares the ends; in plugin(), choose options with which it does not stop so early"
        )
        return keeper


@plugin(priority="lowest")
class _Keeper:
    """Keeps the whole state after every iteration, in memory."""

    contract: Any = option(help="the contract, which knows the random generators")
    resume: Any = option(default=None, help="the state to start from")
    kept: dict[int, dict[str, Any]] = state(factory=dict)

    @hookimpl(trylast=True)
    def before_run(self, run: Run) -> None:
        if self.resume is None:
            return
        kept = copy.deepcopy(self.resume)
        run.load_state_dict(kept["position"])
        run.model.load_state_dict(kept["model"])
        for name, module in run.saved_networks.items():
            module.load_state_dict(kept[f"module {name}"])
        for name, part in run.bus.stateful():
            part.load_state_dict(kept[f"plugin {name}"])
            if hasattr(part, "load_rank_state_dict"):
                part.load_rank_state_dict(kept[f"rank {name}"])
        self.contract.restore(kept["random numbers"])

    @hookimpl(trylast=True)
    def after_train_iter(self, run: Run) -> None:
        kept: dict[str, Any] = {"position": run.state_dict(), "model": run.model.state_dict()}
        kept |= {f"module {name}": module.state_dict() for name, module in run.saved_networks.items()}
        kept |= {f"plugin {name}": part.state_dict() for name, part in run.bus.stateful()}
        kept |= {
            f"rank {name}": part.rank_state_dict()
            for name, part in run.bus.stateful()
            if hasattr(part, "rank_state_dict")
        }
        kept["random numbers"] = self.contract.generators()
        self.kept[run.iter] = copy.deepcopy(kept)


def _check_plain(value: Any, path: str) -> None:
    """What a checkpoint gives back."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            assert isinstance(key, (str, int)), _not_plain(f"the key {key!r} of {path}", key)
            _check_plain(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _check_plain(item, f"{path}[{number}]")
    elif not _is_array(value):
        assert value is None or isinstance(value, (str, int, float, bytes)), _not_plain(path, value)


def _not_plain(path: str, value: Any) -> str:
    return (
        f"{path} is {type(value).__qualname__}: a checkpoint holds only arrays and plain values (dict with text or "
        "integer keys, list, tuple, str, int, float, bool, None), since loading anything else could run code; a set "
        "becomes a sorted list, an object the dict of what it holds"
    )


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "detach")


def _equal(one: Any, other: Any) -> bool:
    """Whether two states are the same to the bit; a NaN equals a NaN."""
    if hasattr(one, "dtype") and hasattr(other, "dtype"):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other or (one != one and other != other))
