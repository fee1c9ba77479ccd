"""The sinks for Weights & Biases and MLflow: metrics of a run at a service that compares runs."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from detkernel import Run, UserError, option, plugin, state
from detkernel.errors import printable, relative
from detkernel.files import read_regular, refuse_links, write_atomic

from detkernel_logging.sink import Entry, Sink, needed

if TYPE_CHECKING:
    from detkernel_logging.progress import Progress

IMAGES = (".png", ".jpg", ".jpeg")
_LARGEST = 2**16
"""Bytes of the file with a run's id."""
_PARAMETERS = 100
"""MLflow takes so many at a time."""


@plugin
class Tracker(Sink):
    """What both have in common: a run of theirs for a run of ours, which a resume continues."""

    files: list[str] = option(
        factory=list,
        help="files of the work dir that are kept with the run when it ends: names with * and ?, such as "
        "`checkpoints/best.pt` or `*.png`",
    )

    _run: Any = state(default=None)
    """Ours."""
    _known: set[str] = state(factory=set)
    """Metrics whose direction was said."""

    def _id_file(self, run: Run) -> Path:
        """Where the id of their run is kept; it lies in the work dir, so that a resume finds it."""
        return run.work_dir / f"{type(self).__name__.lower()}_run.json"

    def _continued(self, run: Run) -> dict[str, Any] | None:
        """What `_remember` kept, if this run is a resume. Raises `UserError` for a file that is not one of ours."""
        path = self._id_file(run)
        if run.mode != "train" or run.iter == 0 or not path.exists():
            return None
        try:
            kept = json.loads(read_regular(path, _LARGEST))
        except (OSError, ValueError) as error:
            raise UserError(f"{relative(path)} cannot be read: {error}; remove it to begin a new run there") from None
        if not isinstance(kept, dict) or not all(isinstance(value, str) for value in kept.values()) or "id" not in kept:
            raise UserError(f"{relative(path)} has no id of a run; remove it to begin a new one there")
        return kept

    def _remember(self, run: Run, **kept: str) -> None:
        if run.mode == "train":
            write_atomic(self._id_file(run), json.dumps(kept) + "\n", run.work_dir)

    def _chosen(self) -> Iterator[tuple[str, Path]]:
        """The files to keep, by their names in the work dir; nothing is followed out of it."""
        for pattern in self.files:
            for path in sorted(self._run.work_dir.glob(pattern)):
                inside = path.resolve().is_relative_to(self._run.work_dir.resolve())
                if inside and path.is_file():
                    yield path.relative_to(self._run.work_dir).as_posix(), path

    def __attrs_post_init__(self) -> None:
        for pattern in self.files:
            if Path(pattern).is_absolute() or ".." in Path(pattern).parts or not pattern:
                raise ValueError(f"files: expected names in the work dir, such as checkpoints/best.pt, got '{pattern}'")


def metrics_of(entry: Entry) -> dict[str, float]:
    """`train/loss`, `val/coco/bbox_mAP`, ...: the metrics of a line, or none."""
    if entry.metrics is None:
        return {}
    return {f"{entry.metrics.mode}/{printable(name)}": value for name, value in entry.metrics.values.items()}


@plugin
class Wandb(Tracker):
    """Metrics, config and files for Weights & Biases, as `train/loss`, `val/coco/bbox_mAP`, ... over `iteration`.

    A resumed run goes on in the same run. `mode: offline` (or WANDB_MODE) keeps everything in `<work_dir>/wandb`, from
    where `wandb sync` sends it.
    """

    project: str = option(default="detkernel", help="the project")
    entity: str | None = option(default=None, help="the team or user; null: the one who is logged in")
    name: str | None = option(default=None, help="the run's name; null: that of the work dir")
    group: str | None = option(default=None, help="runs of one group are shown together")
    tags: list[str] = option(factory=list, help="words to find it by")
    mode: Literal["online", "offline", "disabled"] | None = option(
        default=None, help="null: WANDB_MODE says, or else online"
    )

    _theirs: Any = state(default=None)

    def check(self) -> None:
        needed(self, "wandb", "'detkernel-logging[wandb]'")

    def start(self, run: Run, progress: Progress) -> None:
        import wandb

        self._run, self._known = run, set()
        refuse_links(run.work_dir / "wandb", run.work_dir)
        run.work_dir.mkdir(parents=True, exist_ok=True)
        kept = self._continued(run) or {}
        try:
            self._theirs = wandb.init(
                project=kept.get("project", self.project),
                entity=self.entity,
                name=self.name or run.work_dir.name,
                group=self.group,
                tags=self.tags or None,
                mode=self.mode,
                dir=str(run.work_dir),
                id=kept.get("id"),
                resume="allow",
                job_type=run.mode,
                config=dict(run.config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise UserError(
                f"wandb: {error}; `wandb login` or WANDB_API_KEY says who you are, `mode: offline` asks nobody"
            ) from None
        self._theirs.define_metric("iteration", hidden=True)
        self._remember(run, id=self._theirs.id, project=self._theirs.project or self.project)

    def write(self, run: Run, entry: Entry) -> None:
        values = metrics_of(entry)
        if self._theirs is None or entry.metrics is None or not values:
            return
        with _as_os_error("wandb"):
            for name in values.keys() - self._known:
                better = run.metrics.better(name.partition("/")[2]) if not name.startswith("train/") else None
                summary = {"higher": "max", "lower": "min", None: "last"}[better]
                self._theirs.define_metric(name, step_metric="iteration", summary=summary)
                self._known.add(name)
            self._theirs.log({"iteration": entry.metrics.step, "epoch": entry.metrics.epoch, **values})

    def stop(self) -> None:
        if self._theirs is None:
            return
        theirs, self._theirs = self._theirs, None
        import wandb

        with _as_os_error("wandb"):
            for name, path in self._chosen():
                if path.suffix.lower() in IMAGES:
                    theirs.log({name: wandb.Image(str(path))})
                else:
                    copied = Path(theirs.dir) / name  # wandb would link to it, and say so
                    copied.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copied)
                    theirs.save(str(copied), base_path=theirs.dir, policy="now")
            theirs.finish(exit_code=0 if self._run.error is None else 1)


@plugin
class Mlflow(Tracker):
    """Metrics, config and files for MLflow, as `train/loss`, `val/coco/bbox_mAP`, ...

    A resumed run goes on in the same run. MLflow takes few signs in names: `coco/bbox_AR@100` is `coco/bbox_AR_100`.
    Whether a metric is better higher or lower is a tag, `better/NAME`.
    """

    experiment: str = option(default="detkernel", help="the experiment; it is made where it is not there")
    name: str | None = option(default=None, help="the run's name; null: that of the work dir")
    tracking_uri: str | None = option(
        default=None,
        help="a server, or such as sqlite:///mlflow.db; null: MLFLOW_TRACKING_URI, or else MLflow's default",
    )

    _client: Any = state(default=None)
    _id: str = state(default="")

    def check(self) -> None:
        needed(self, "mlflow", "'detkernel-logging[mlflow]'")

    def start(self, run: Run, progress: Progress) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._run, self._known = run, set()
        kept = self._continued(run)
        try:
            client = MlflowClient(tracking_uri=self.tracking_uri)
            if kept is not None:
                client.update_run(kept["id"], status="RUNNING")
                self._id = kept["id"]
            else:
                self._id = self._new(client, run)
        except MlflowException as error:
            advice = "" if kept is None else f"; remove {relative(self._id_file(run))} to begin a new run there"
            raise UserError(f"mlflow: {printable(str(error))}{advice}") from None
        self._client = client
        self._remember(run, id=self._id)

    def _new(self, client: Any, run: Run) -> str:
        found = client.get_experiment_by_name(self.experiment)
        number = client.create_experiment(self.experiment) if found is None else found.experiment_id
        tags = {"detkernel.mode": run.mode, "detkernel.work_dir": str(run.work_dir)}
        made: str = client.create_run(number, run_name=self.name or run.work_dir.name, tags=tags).info.run_id
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in flat(run.config)]
        for first in range(0, len(params), _PARAMETERS):
            client.log_batch(made, params=params[first : first + _PARAMETERS])
        return made

    def write(self, run: Run, entry: Entry) -> None:
        values = metrics_of(entry)
        if self._client is None or entry.metrics is None or not values:
            return
        from mlflow.entities import Metric, RunTag

        now, step = int(time.time() * 1000), entry.metrics.step
        metrics = [Metric(valid_name(name), value, now, step) for name, value in values.items()]
        tags = []
        for name in values.keys() - self._known:
            better = run.metrics.better(name.partition("/")[2]) if not name.startswith("train/") else None
            tags += [RunTag(f"better/{valid_name(name)}", better)] if better else []
            self._known.add(name)
        with _as_os_error("mlflow"):
            self._client.log_batch(self._id, metrics=metrics, tags=tags)

    def stop(self) -> None:
        if self._client is None:
            return
        client, self._client = self._client, None
        error = self._run.error
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        with _as_os_error("mlflow"):
            for name, path in self._chosen():
                folder = name.rpartition("/")[0]
                client.log_artifact(self._id, str(path), folder or None)
            client.set_terminated(self._id, status=status)


def valid_name(name: str) -> str:
    """A metric's name as MLflow takes it: `coco/bbox_AR@100` becomes `coco/bbox_AR_100`."""
    return re.sub(r"[^\w.\- :/]", "_", name)


def flat(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """A config as dotted names with texts: `optimizer.lr`, `0.01`. MLflow's limit is 6,000 characters a text."""
    for key, value in config.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield valid_name(name)[:250], text if len(text) <= 6000 else f"{text[:5997]}..."


@contextmanager
def _as_os_error(who: str) -> Iterator[None]:
    """A service that does not answer is reported once, and the run goes on: a sink says so by an `OSError`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{who}: {printable(str(error))}") from error
