"""The command line. A user's mistake is one message on standard error and exit status 2, never a traceback."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from detkernel import __version__, launchers
from detkernel.errors import ConfigError, UserError, did_you_mean, printable, relative
from detkernel.plugin import declared
from detkernel.terminal import rows, shown, styled, wrapped

if TYPE_CHECKING:
    from detkernel.catalog import Catalog
    from detkernel.config import Config
    from detkernel.loop import Kernel


class _Commands(click.Group):
    """The kernel's commands, and those that installed distributions offer (entry points of `detkernel.commands`).

    Only the one that is called is imported: the help reads the first line about each from its source.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *(name for name in self._offered.entries if name not in self.commands)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in self.commands or name not in self._offered.entries:
            return super().get_command(ctx, name)
        command = self._offered.load_object(name)
        if not isinstance(command, click.Command):
            raise UserError(f"{self._offered.find(name).target} is not a command; decorate it with @click.command()")
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args and args[0] not in known:
            given, *others = args
            meant = next((name for name in _MEANT.get(given.lower(), "").split() if name in known), "")
            if given.endswith((".yaml", ".yml", ".pt")):
                meant, others = "run", args
            hint = f"; did you mean `detkernel {' '.join([meant, *others])}`?" if meant else did_you_mean(given, known)
            raise UserError(f"there is no command '{given}'{hint or '; `detkernel --help` lists all'}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections = {"Commands": [(name, _brief(command.help or "")) for name, command in self.commands.items()]}
        for name, offers in self._offered.entries.items():
            hidden = " (HIDDEN by the kernel's own)" if name in self.commands else ""
            conflict = " (CONFLICT: offered twice)" if len(offers) > 1 else ""
            for entry in offers:
                row = (name, f"{_brief(entry.describe()[1])}{hidden}{conflict}")
                sections.setdefault(f"Commands of {entry.distribution}", []).append(row)
        for title, found in sections.items():
            with formatter.section(title):
                formatter.write_dl(found)

    @cached_property
    def _offered(self) -> Catalog:
        from detkernel.catalog import Catalog

        return Catalog("command")


_MEANT = {
    **dict.fromkeys(("train", "fit", "start", "resume"), "run"),
    **dict.fromkeys(("val", "validate", "eval", "evaluate"), "test"),
    **dict.fromkeys(("infer", "inference", "detect", "demo"), "predict"),
    **dict.fromkeys(("list", "ls", "plugin", "models", "show"), "plugins"),
    **dict.fromkeys(("zoo", "configs", "recipe"), "recipes"),
    **dict.fromkeys(("lint", "dry-run"), "check"),
    **dict.fromkeys(("new", "create"), "init new-plugin"),
    **dict.fromkeys(("dump", "print-config"), "config"),
    **dict.fromkeys(("events", "hook"), "hooks"),
    **dict.fromkeys(("benchmark", "time"), "profile"),
    **dict.fromkeys(("visualize", "view", "data"), "browse"),
    **dict.fromkeys(("convert", "onnx"), "export"),
    "help": "--help",
}
"""Commands as other programs call them, and which one here does that, where it is installed."""


def _brief(text: str) -> str:
    """The first paragraph of a command's help, in at most 60 columns."""
    return textwrap.shorten(text.partition("\n\n")[0].removesuffix("."), 60, placeholder=" ...")


def _example(*commands: str) -> Any:
    """What ends a command's help: an example, or a few."""
    return {"epilog": "\b\nFor example:\n" + "\n".join(f"  detkernel {command}" for command in commands)}


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    **_example("recipes shapes", "run shapes.yaml"),
)
@click.version_option(__version__, prog_name="detkernel")
def cli() -> None:
    """Train object detectors. A minimal loop emits events; plugins, wired by a YAML config, do everything else."""


CONFIG = click.argument("config", metavar="CONFIG")
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


@cli.command(cls=launchers.LaunchedCommand, **_example("run config.yaml", "run config.yaml optimizer.lr=0.02"))
@CONFIG
@OVERRIDES
@click.option(
    "--trace",
    type=click.IntRange(min=1),
    metavar="N",
    help="print every event of the first N iterations, with its times",
)
def run(config: str, overrides: tuple[str, ...], trace: int | None) -> None:
    """Train, or go on with a run that was stopped.

    CONFIG is a YAML file, package:path for one that an installed package ships, the folder of a run, or a checkpoint.

    KEY=VALUE changes the config for this run: optimizer.lr=0.02 run.work_dir=runs/second
    """
    kernel = _launched(_load(config, overrides))
    if trace is not None:
        from detkernel.trace import Tracer

        Tracer(kernel.state, trace)
    state = kernel.run()
    if state.is_main:
        results = sorted(state.results.items(), key=lambda item: item[0] == "next")
        click.echo(rows((name, shown(text)) for name, text in results), nl=False, err=True)
    if state.exit_status:
        launchers.report(state.exit_status)
    sys.exit(state.exit_status)


@cli.command(
    cls=launchers.LaunchedCommand,
    **_example(
        "test runs/shapes", "test runs/shapes/checkpoints/best.pt", "test config.yaml checkpoint.load_from=model.pt"
    ),
)
@CONFIG
@OVERRIDES
def test(config: str, overrides: tuple[str, ...]) -> None:
    """Evaluate on the test data, or else the validation data.

    CONFIG is a checkpoint, the folder of a run, or a config with checkpoint.load_from=FILE.
    """
    kernel = _launched(_load(config, overrides))
    _require_weights(kernel.state.bus.plugins)
    state = kernel.test()
    for name, value in state.metrics.items() if state.is_main else ():
        click.echo(f"{printable(name)}: {value:.4f}")


def _require_weights(plugins: Mapping[str, object]) -> None:
    """Raise UserError where the parts say that none of them loads weights: random ones are not worth a test.

    A plugin says whether it does by `loads_weights`; one that has no such attribute may load some or not.
    """
    said = [getattr(plugin, "loads_weights", None) for plugin in plugins.values()]
    if False in said and True not in said:
        raise UserError(
            "there are no weights to test: the config has no `checkpoint: {}`, and its model loads none. Give a "
            "checkpoint in place of the config, or add `checkpoint: {}` to test the run of its work dir"
        )


@cli.command(**_example("check config.yaml", "check --fast config.yaml model.backbone.depth=18"))
@CONFIG
@OVERRIDES
@click.option("--fast", is_flag=True, help="do not read all of the data (what was found valid is remembered)")
def check(config: str, overrides: tuple[str, ...], fast: bool) -> None:
    """Everything but training: config, data, two steps, the cost.

    All data is read, and two batches go forward and backward; it says what the run will take, and what it will not
    leave.
    """
    loaded = _load(config, overrides)
    kernel = _kernel(loaded)
    costs = kernel.check(fast=fast)
    state = kernel.state
    classes = ", ".join(map(printable, state.classes[:12])) + (", ..." if len(state.classes) > 12 else "")
    lines = {
        "config": f"{config}: {len(loaded.plugins)} plugins, every option valid",
        "length": f"{loaded.options.until}, {state.max_iters} iterations, {state.epoch_length} an epoch",
        "classes": f"{len(state.classes)}: {classes}",
        **costs,
        **_missing(loaded.plugins, trained=state.optimizer is not None, validated=loaded.options.validate is not None),
    }
    click.echo(rows((name, shown(text)) for name, text in lines.items()), nl=False)
    click.echo("ready to run")


def _missing(plugins: Mapping[str, object], *, trained: bool, validated: bool) -> dict[str, str]:
    """What a run without some common plugins will not leave, for `detkernel check`."""
    names = {*plugins, *(type(part).__name__.lower() for part in plugins.values())}
    keys = {declared(part).key for part in plugins.values()}
    lacking = []
    if not trained:
        lacking.append("nothing is trained: no plugin makes an optimizer, such as `optimizer: {use: sgd, lr: 0.01}`")
    if "checkpoint" not in names:
        lacking.append("nothing is saved: the config has no `checkpoint: {}`")
    if "log" not in names:
        lacking.append("losses are not shown: the config has no `log: {}`")
    if "evaluation" not in names | keys:
        lacking.append("nothing is measured: the config has no `evaluation`, such as `evaluation: {use: NAME}`")
    elif not validated:
        lacking.append("nothing is measured: `run.validate` is null")
    return {"missing": "\n".join(lacking)} if lacking else {}


@cli.command("config", **_example("config config.yaml", "config config.yaml optimizer.lr=0.02"))
@CONFIG
@OVERRIDES
@click.option("--plain", is_flag=True, help="without the places")
def show_config(config: str, overrides: tuple[str, ...], plain: bool) -> None:
    """Show every value, with the file and line it comes from."""
    from detkernel.config.dump import dump

    loaded = _load(config, overrides, writes=False)
    places = _value_places(loaded)
    click.echo(dump(loaded.plain, (lambda _: "") if plain else (lambda path: places.get(path, "default"))), nl=False)


@cli.command(**_example("plugins", "plugins optimizer", "plugins fcos"))
@click.argument("words", nargs=-1, metavar="[[show] NAME | KIND]")
def plugins(words: tuple[str, ...]) -> None:
    """List what is installed, or show one plugin's options."""
    from detkernel.listing import kinds, plugin_list

    name = " ".join(words[words[:1] == ("show",) :])
    if words and not name:
        raise click.UsageError("Missing argument 'NAME': plugins show NAME")
    if not words:
        click.echo(plugin_list(), nl=False)
    elif words[0] != "show" and name in kinds():
        click.echo(plugin_list(name), nl=False)
    else:
        click.echo(_plugin_page(name), nl=False)


def _plugin_page(name: str) -> str:
    """The options of a plugin: type, default, meaning."""
    from detkernel.catalog import Catalog
    from detkernel.reference import plugin_page

    catalog = Catalog()
    commands = Catalog("command").entries
    if name in commands and name not in catalog.entries:
        owner = commands[name][0].distribution
        raise UserError(f"'{name}' is a command of {owner}, not a plugin; `detkernel {name} --help` says what it does")
    cls = catalog.load(name)
    return plugin_page(name, cls, catalog.find(name) if name in catalog.entries else None)


@cli.command(**_example("recipes", "recipes shapes", "recipes coco_fcos_r50_1x mine.yaml"))
@click.argument("name", required=False)
@click.argument("target", required=False, type=click.Path(path_type=Path))
def recipes(name: str | None, target: Path | None) -> None:
    """List the recipes that are installed, or copy one.

    NAME is copied to TARGET, a new file or a folder; to NAME.yaml in this folder where none is given.
    """
    from detkernel import recipes as installed

    if name is None:
        click.echo(installed.recipe_list(), nl=False)
        return
    with _writing(target or Path(name)):
        path = installed.copy(name, target)
    click.echo(f"wrote {relative(path)}\nnext: detkernel check {relative(path)}")


@cli.command(**_example("hooks", "hooks after_train_iter", "hooks config.yaml"))
@click.argument("words", nargs=-1, metavar="[EVENT] [CONFIG [KEY=VALUE]...]")
def hooks(words: tuple[str, ...]) -> None:
    """List every event as it fires, and who runs at it.

    All of them or one EVENT; with CONFIG, who runs at each, in which order.
    """
    from detkernel.bus import Bus, no_event
    from detkernel.reference import event_list, event_page

    event = words[0] if words and words[0].isidentifier() and not Path(words[0]).exists() else ""
    config, *overrides = words[bool(event) :] or [""]
    if config:
        loaded = _load(config, tuple(overrides), writes=False)
        bus = Bus(loaded.plugins, loaded.priorities)
        if event and event not in bus.event_names():
            raise UserError(f"{config}: '{event}' is {no_event(event, bus.event_names())}")
        text = event_page(event, bus) if event else event_list(bus, with_plugins=True)
    elif event:
        text = _event_alone(event)
    else:
        text = event_list(Bus({}), with_plugins=False)
    click.echo(text, nl=False)


@cli.command(**_example("schema -o schema.json"))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="write to a file")
def schema(output: Path | None) -> None:
    """JSON Schema of a config, for completion in editors.

    Draft 7, of all plugins that are installed. An editor finds it by the first line of a config:
    # yaml-language-server: $schema=schema.json
    """
    from detkernel.catalog import Catalog
    from detkernel.config.schema import config_schema
    from detkernel.files import write_atomic

    made = config_schema(Catalog())
    if "$comment" in made:
        click.echo(made["$comment"], err=True)
    text = json.dumps(made, indent=1) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        with _writing(output):
            write_atomic(output, text)


class _Kind(click.ParamType):  # type: ignore[type-arg]  # no generic before click 8.5
    """A kind of plugin to start: those that are installed are listed in the help."""

    name = "kind"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        from detkernel.scaffold import kinds

        return f"[{'|'.join(kinds())}]"


@cli.command("new-plugin", **_example("new-plugin my-plugin", "new-plugin my-data --kind dataset"))
@click.argument("name")
@click.option("--kind", type=_Kind(), default="hook", show_default=True, help="what it is")
def new_plugin(name: str, kind: str) -> None:
    """Start a plugin: a small, tested project in a folder NAME."""
    from detkernel import scaffold

    with _writing(Path(name)):
        written = scaffold.new_plugin(name, kind, Path())
    for path in written:
        click.echo(f"wrote {path}")
    click.echo(f"next: cd {written[0].parent} && pip install -e .[test] && pytest")


def _event_alone(event: str) -> str:
    """What an event is, the kernel's or one that an installed plugin publishes."""
    from detkernel.bus import Bus
    from detkernel.catalog import Catalog
    from detkernel.reference import event_page, published_page

    events = Bus({}).event_names()
    if event in events:
        return event_page(event)
    publishers = Catalog().publishers()
    if event in publishers:
        return published_page(event, publishers[event])
    raise UserError(f"'{event}' is neither a config nor an event{did_you_mean(event, [*events, *publishers])}")


def _load(config: str, overrides: tuple[str, ...], *, writes: bool = True) -> Config:
    from detkernel.config import load

    return load(config, overrides, writes=writes)


def _kernel(config: Config) -> Kernel:
    from detkernel.loop import Kernel

    return Kernel(
        config.plugins,
        config.options,
        priorities=config.priorities,
        config=config.plain,
        versions=config.versions,
    )


def _launched(config: Config) -> Kernel:
    """The kernel, in a process that is to run it; a launcher may have started several, and ends as they do."""
    launch = launchers.take_over()
    kernel = _kernel(config)
    kernel.state.launch, kernel.state.ends_process = launch, True
    return kernel


def _value_places(config: Config) -> dict[str, str]:
    """Dotted path -> `file:line` of every value that was written somewhere."""
    from detkernel.config.structure import places

    return {
        path: printable(f"{_brief_path(where.file)}:{where.line}" if where.text else where.file)
        for path, where in places(config.root)
    }


def _brief_path(file: str) -> str:
    """A file of an installed package, say, by its last two folders."""
    parts = Path(file).parts
    return file if len(file) <= 32 or len(parts) < 4 else str(Path("...", *parts[-3:]))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the system says against writing a file is the user's to fix."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{relative(path)}: cannot be written: {error.strerror}") from None


def rendered(error: UserError) -> str:
    """A user's mistake as it is printed on standard error."""
    problems: list[Any] = error.problems if isinstance(error, ConfigError) else [error]
    parts = [_problem(shown(problem)) for problem in problems]
    parts += [wrapped(shown(note)) for note in getattr(error, "__notes__", ())]
    if len(problems) > 1:
        parts.append(f"{len(problems)} problems; nothing was run")
    return ("\n\n" if len(problems) > 1 else "\n").join(parts)


def _problem(text: str) -> str:
    """A message behind `error:`; lines of it that are indented, such as those with a caret, stay where they are."""
    label = "error:"
    first, *others = text.split("\n")
    lines = [wrapped(first, "  ", f"{label} ").removeprefix(label)]
    lines += [wrapped(line, "" if line.startswith((" ", "\t")) else "  ") for line in others]
    return styled(label, fg="red", bold=True) + "\n".join(lines)


def main() -> None:
    """The entry point `detkernel`."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # processes to come, loader workers say: no imports from this folder
    _open_standard_streams()
    try:
        cli(standalone_mode=False)
    except UserError as error:
        _end(2, error, rendered(error))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more, while Python shuts down, would change the exit status
        notes = (wrapped(shown(note)) for note in getattr(error, "__notes__", ()))
        _end(130, error, "\n".join(["interrupted", *notes]))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if isinstance(error, OSError) and _of_output(error):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail at exit once more
            _end(1, error, f"error: standard output cannot be written: {error.strerror}")
        _end(1, error, shown("".join(traceback.format_exception(error)).rstrip()))


def _end(status: int, error: BaseException, text: str) -> NoReturn:
    """Print the text, unless this is one of several processes, whose launcher does."""
    if not launchers.report(status, error, text):
        try:
            click.echo(text, err=True)
        except OSError:  # nobody can be told; the status says it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what is left would fail at exit once more
    sys.exit(status)


def _open_standard_streams() -> None:
    """Where one is closed, the next file that is opened (a checkpoint, say) would get what is printed there."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free


def _of_output(error: OSError) -> bool:
    """Whether it was raised by what prints: the innermost frame is click's."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(Path(click.__file__).parent)
