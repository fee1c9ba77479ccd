"""Finding the checkpoint to go on from, and going on from it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from detkernel import CheckpointError, Run, Span, UserError, wrong
from detkernel.errors import printable, relative
from detkernel_detection.weights import classes_in, keypoints_in

from detkernel_checkpoint import checkpoint_file, finite
from detkernel_checkpoint.folder import Entry, Folder
from detkernel_checkpoint.provenance import differences, harmless, rounding, until_line

if TYPE_CHECKING:
    from detkernel_checkpoint.checkpoint import Checkpoint

_SHOWN = 30


@attrs.define
class Found:
    """A valid checkpoint."""

    path: Path
    content: dict[str, Any]

    @property
    def iteration(self) -> int:
        return int(self.content["position"]["iter"])

    def entry(self) -> Entry:
        return Entry(self.path, self.iteration, best=False)


def find(run: Run, folder: Folder, part: Checkpoint, own: bool, infinite: Collection[str] = ()) -> Found | None:
    """The checkpoint to resume: a given one, or the newest valid one in the folder, or None to start afresh.

    Where the folder is the run's `own`, which was started again, the newest is taken whatever `resume` says. One with
    weights that are not finite is not valid, but for the `infinite` ones. Raises UserError for a checkpoint that cannot
    be used, or a folder in which none can.
    """
    resume = part.resume
    if resume == "auto" or own:
        found = _newest(run, folder, infinite)
        if found is not None or resume == "auto":
            return found
    if resume == "never":
        return None
    path = Path(resume)
    if not os.path.lexists(path):
        near = folder.path / path.name
        hint = f", did you mean '{relative(near)}'?" if near.is_file() else ", and no such file"
        raise wrong(part, "resume", f"expected 'auto', 'never' or a checkpoint's path, got '{resume}'{hint}")
    return _valid(path, infinite)


def _valid(path: Path, infinite: Collection[str]) -> Found:
    content = checkpoint_file.read(path)
    try:
        finite.check(content, infinite)
    except finite.NonFiniteError as error:
        raise CheckpointError(f"{relative(path)}: {error}: nothing can go on from it") from None
    return Found(path, content)


def _newest(run: Run, folder: Folder, infinite: Collection[str]) -> Found | None:
    invalid: list[CheckpointError] = []
    for entry in folder.entries():
        try:
            found = _valid(entry.path, infinite)
        except checkpoint_file.OtherFormatError:
            raise
        except CheckpointError as error:
            invalid.append(error)
        else:
            for problem in invalid:
                run.log.warning("%s; an older one is taken", problem)
            return found
    if invalid:
        raise CheckpointError(
            f"{relative(folder.path)}: none of its {len(invalid)} checkpoints can be used; the newest: {invalid[0]}. "
            "To start afresh, give resume=never: they are set aside"
        )
    return None


def compare(run: Run, found: Found, provenance: Mapping[str, Any], key: str, accept: bool) -> None:
    """Raise CheckpointError if the checkpoint is another run's, with all that differs, unless that is accepted."""
    try:
        lines = differences(found.content["provenance"], provenance)
        bits = rounding(found.content["provenance"], provenance)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{relative(found.path)}: does not say what its run was made of: {error!r}") from None
    keypoints = getattr(run.bare_model, "keypoint_names", ())
    _refuse_other("keypoints", keypoints_in(found.content) or keypoints, keypoints, relative(found.path), key)
    longer = _longer(run, found, provenance)
    if longer is not None:
        lines.remove(longer)
        run.log.info(
            "%s: training goes on to the new end. What goes by the length of the run, such as a cosine or poly "
            "schedule, goes by the new length from here on: then the result is not that of a run of this length from "
            "its start",
            longer,
        )
    if bits:
        run.log.warning("the last bits may differ from those of a run that went on undisturbed: %s", "; ".join(bits))
    if not lines:
        return
    shown = [f"  {line}" for line in lines[:_SHOWN]] + [f"  and {len(lines) - _SHOWN} more"] * (len(lines) > _SHOWN)
    listed = "\n".join(shown)
    if accept:
        classes = classes_in(found.content)
        if classes is None:
            raise CheckpointError(f"{relative(found.path)}: does not say which classes its run had")
        _refuse_other("classes", classes, run.classes, relative(found.path), key)
        run.log.warning(
            "going on from %s, though this run differs from the one it is of:\n%s", relative(found.path), listed
        )
        return
    raise CheckpointError(
        f"{relative(found.path)} is of another run than this one:\n{listed}\n"
        "Going on from it would give neither the result of that run nor that of this one. Undo the changes, or say "
        f"what you want:\n  run.work_dir=...                start this run in another folder\n"
        f"  {key}.resume=never          start this run here; the checkpoints there are set aside\n"
        f"  {key}.accept_changes=true   go on from it nevertheless"
    )


def _refuse_other(what: str, old: Sequence[str], new: Sequence[str], where: str, key: str) -> None:
    """Weights can be taken by the names of classes; what an optimizer and averages hold of them goes by position."""
    if list(old) != list(new):
        raise CheckpointError(
            f"{where} is of the {what} {_named(old)}; the data has {_named(new)}. A run cannot go on with other "
            f"{what}, nor with these in another order. Start another with its weights, which are taken by name: "
            f"{key}.resume=never {key}.load_from={where}"
        )


def _named(classes: Sequence[str]) -> str:
    more = f" and {len(classes) - 8} more" if len(classes) > 8 else ""
    return ", ".join(printable(str(name)) for name in classes[:8]) + more


def _longer(run: Run, found: Found, provenance: Mapping[str, Any]) -> str | None:
    """The line about `run.until` where all that it says is that the run is to be longer than it was."""
    try:
        before, after = (side["config"]["run"]["until"] for side in (found.content["provenance"], provenance))
        old = Span.parse(before).iters(found.content["position"]["epoch_length"])
        longer = Span.parse(after).iters(run.epoch_length) > old
    except (TypeError, ValueError, LookupError, AttributeError):  # of the other run it says nothing of the kind
        return None
    return until_line(before, after) if longer else None


def compare_load_from(run: Run, found: Found, part: Checkpoint, key: str) -> None:
    """Raise UserError where `load_from` is given, but what there is to go on from did not begin with those weights."""
    if part.load_from is None:
        return
    config = found.content["provenance"].get("config")
    options = config.get(key) if isinstance(config, Mapping) else None
    before = options.get("load_from") if isinstance(options, Mapping) else None
    if isinstance(before, str) and Path(before) == part.load_from:
        run.log.info("%s: its weights were loaded when this run began", relative(part.load_from))
        return
    if not os.path.lexists(part.load_from):
        raise wrong(part, "load_from", f"'{part.load_from}': no such file")
    began = f"the weights of {printable(before)}" if isinstance(before, str) else "other weights"
    raise CheckpointError(
        f"load_from is {relative(part.load_from)}, but {relative(found.path)} is there to go on from, of a run that "
        f"began with {began}. Say what you want:\n"
        f"  run.work_dir=...            start with {relative(part.load_from)} in another folder\n"
        f"  {key}.resume=never     start with it here; the checkpoints there are set aside\n"
        f"  {key}.load_from=null   go on from {relative(found.path)}"
    )


def compare_states(run: Run, found: Found, provenance: Mapping[str, Any], accept: bool) -> None:
    """Raise CheckpointError for a state that is missing, or that nobody takes, unless such differences are accepted, or
    no result follows from that plugin."""
    where, fine = relative(found.path), harmless(found.content["provenance"], provenance)
    names = {name for name, _ in run.bus.stateful()}
    ranks = found.content["ranks"]
    modules, saved = set(found.content["modules"]), set(run.saved_modules)
    for name in sorted(saved - modules):
        _differ(run, accept, f"{where} has no weights of the module '{name}'", "it starts anew")
    if modules - saved:
        names_left = printable(", ".join(sorted(modules - saved)))
        _differ(
            run, accept, f"{where} has weights of modules that no active plugin adds: {names_left}", "they are dropped"
        )
    held = {*found.content["plugins"], *(ranks[run.rank] if run.rank < len(ranks) else ())}
    for name in sorted(names - held):
        _differ(run, accept or name in fine, f"{where} has no state of plugin '{name}'", "it starts anew")
    left = sorted(held - names)
    if left:
        taken = f"{where} has states that no active plugin takes: {printable(', '.join(left))}"
        _differ(run, accept or fine.issuperset(left), taken, "they are dropped")


def apply(run: Run, found: Found, accept: bool) -> None:
    """Put the model, every plugin and the position where the checkpoint has them."""
    content, where = found.content, relative(found.path)
    weights = content["model"] if content.get("training_model") is None else content["training_model"]
    position, length = content["position"], content["position"]["epoch_length"] if accept else run.epoch_length
    if position["iter"] != position["epoch"] * length + position["batch"] or position["batch"] > length:
        raise CheckpointError(f"{where}: its position is none with {length} iterations an epoch: {position}")
    position = _moved(run, position)
    states, modules = dict(content["plugins"]), content["modules"]
    per_rank = content["ranks"][run.rank] if run.rank < len(content["ranks"]) else {}
    try:
        run.bare_model.load_state_dict(weights)
        for name, module in run.saved_networks.items():
            if name in modules:
                module.load_state_dict(modules[name])
        run.load_state_dict(position)
    except Exception as error:  # torch, and what a damaged position provokes
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{where}: does not fit this run's model: {reason}. To begin with those of its weights that fit, give "
            f"resume=never load_from={where} allow_mismatch=true"
        ) from None
    plugins = sorted(run.bus.stateful(), key=lambda item: item[0] in per_rank)  # random numbers come last
    for name, plugin in plugins:
        own, state = per_rank.get(name), states.pop(name, None)
        if own is None and state is None:
            continue
        try:
            if hasattr(plugin, "load_rank_state_dict"):
                plugin.load_state_dict(state)
                plugin.load_rank_state_dict(own or {})
            else:
                plugin.load_state_dict(state if own is None else own)
        except UserError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            message = f"{where}: the state of plugin '{name}' does not fit: {reason}"
            if not accept:
                raise CheckpointError(message) from error
            run.log.warning("%s; it starts anew", message)
    run.log.info("going on from %s: epoch %d, iteration %d", where, run.epoch + 1, run.iter)


def _moved(run: Run, position: dict[str, Any]) -> dict[str, Any]:
    """A position in epochs of another length, as after a change of the data or of the number of processes.

    A run of so many epochs keeps its epoch and the share of it that is done; one of so many iterations keeps these.
    """
    now, then = run.epoch_length, position["epoch_length"]
    if now == then:
        return position
    moved = dict(position)
    if run.options.until.unit == "epochs":
        moved["batch"] = position["batch"] * now // then
        moved["iter"] = position["epoch"] * now + moved["batch"]
    else:
        moved["epoch"], moved["batch"] = divmod(position["iter"], now)
    if position["validated"] == position["iter"]:
        moved["validated"] = moved["iter"]
    elif moved["iter"] != position["iter"]:
        moved["validated"] = 0
    run.log.warning(
        "an epoch has %d iterations, and had %d: iteration %d is now iteration %d, in epoch %d",
        *(now, then, position["iter"], moved["iter"], moved["epoch"] + 1),
    )
    return moved


def _differ(run: Run, fine: bool, what: str, then: str) -> None:
    """Plugins of the same names, in other versions: what they keep is not what they kept."""
    if not fine:
        raise CheckpointError(
            f"{what}: it was written by another version of that plugin, or was changed. Install the one that wrote it, "
            f"or go on with `accept_changes: true`: {then}"
        )
    run.log.warning("%s; %s", what, then)
