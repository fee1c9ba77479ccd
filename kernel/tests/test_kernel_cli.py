"""The command, as a user types it: what it prints, and the one clear message and status 2 for each mistake."""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import detkernel as package
import pytest
from detkernel.errors import did_you_mean

Plant = Callable[..., Path]
Write = Callable[[str, str], Path]
Result = subprocess.CompletedProcess[str]
Detkernel = Callable[..., Result]

TOY = '''
"""A detector of nothing at all, in plain Python."""

from __future__ import annotations

from detkernel import UserError, hookimpl, option, plugin


class Loader:
    class dataset:
        classes = ("cat", "dog")

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def batches(self, epoch, start=0):
        yield from range(start, self.length)


@plugin
class ToyData:
    """Numbers for images."""

    length: int = option(default=3, at_least=0, help="batches in an epoch")

    @hookimpl
    def build_loader(self, mode):
        return Loader(self.length)


@plugin
class ToyModel:
    """It guesses."""

    width: int = option(default=4, at_least=1, help="of the guess")

    @hookimpl
    def build_model(self, run):
        return "guess"

    @hookimpl
    def train_step(self, batch):
        return {"loss": 1.0 / (batch + 1)}

    @hookimpl
    def val_step(self, batch):
        return []

    @hookimpl
    def after_val_epoch(self, run):
        run.metrics["toy/ap"] = 0.25

    @hookimpl
    def summary(self):
        return {"parameters": f"{self.width}"}


@plugin
class ToyMood:
    """It ends a run in one way or another."""

    end: str = option(default="well", choices=("well", "stop", "user", "bug", "interrupt"), help="how")

    @hookimpl
    def after_train_iter(self, run):
        print(f"iteration {run.iter}")
        if run.iter == 2:
            getattr(self, f"_{self.end}")(run)

    def _well(self, run): ...

    def _stop(self, run):
        run.stop("enough", exit_status=75)

    def _user(self, run):
        raise UserError("images/7.png: cannot be decoded; remove it")

    def _bug(self, run):
        return {}["nothing"]

    def _interrupt(self, run):
        raise KeyboardInterrupt
'''
CONFIG = """
run: {until: 1 epoch, validate: every 1 epoch, work_dir: work}
model: {use: toy_model}
data: {use: toy_data}
toy_mood: {}
"""


@pytest.fixture(autouse=True)
def toy(plant: Plant, write: Write) -> None:
    names = {"toy_data": "toy_one:ToyData", "toy_model": "toy_one:ToyModel", "toy_mood": "toy_one:ToyMood"}
    plant("toy", {"toy_one.py": TOY}, plugins=names, version="0.5")
    write("c.yaml", CONFIG)


def message(result: Result) -> str:
    """The one message of a user's mistake: status 2, nothing but `error: ...` (a config's line and caret follow)."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1
    assert result.stderr.startswith("error: ")
    return result.stderr.splitlines()[0].removeprefix("error: ")


class TestRun:
    def test_it_trains(self, detkernel: Detkernel, folder: Path):
        result = detkernel("run", "c.yaml")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == "iteration 1\niteration 2\niteration 3\n"
        written = (folder / "work" / "config.yaml").read_text()
        assert written.startswith("# detkernel-kernel 0.1.0\n# toy 0.5\nrun:\n")

    def test_what_it_writes_is_the_same_run(self, detkernel: Detkernel, folder: Path):
        detkernel("run", "c.yaml", "model.width=9")
        before = (folder / "work" / "config.yaml").read_text()
        (folder / "other").mkdir()
        (folder / "other" / "again.yaml").write_text(before)
        assert detkernel("run", "other/again.yaml").returncode == 0
        assert (folder / "work" / "config.yaml").read_text() == before

    def test_overrides(self, detkernel: Detkernel):
        result = detkernel(
            "run", "c.yaml", "run.until=4 iters", "data.length=2", "toy_mood=null", "second.use=toy_mood"
        )
        assert (result.returncode, result.stdout.count("iteration")) == (0, 4)

    def test_the_status_that_a_plugin_gives(self, detkernel: Detkernel):
        result = detkernel("run", "c.yaml", "toy_mood.end=stop")
        assert (result.returncode, result.stdout, result.stderr) == (75, "iteration 1\niteration 2\n", "")

    def test_a_users_mistake_in_the_middle(self, detkernel: Detkernel):
        result = detkernel("run", "c.yaml", "toy_mood.end=user")
        assert message(result) == "images/7.png: cannot be decoded; remove it"

    def test_a_bug_is_a_traceback_that_names_plugin_event_and_iteration(self, detkernel: Detkernel):
        result = detkernel("run", "c.yaml", "toy_mood.end=bug")
        assert result.returncode == 1
        assert result.stderr.startswith("Traceback")
        assert result.stderr.splitlines()[-2:] == [
            "KeyError: 'nothing'",
            "raised in plugin 'toy_mood' (toy_one:ToyMood), event after_train_iter, iteration 2",
        ]

    def test_an_interrupt(self, detkernel: Detkernel):
        result = detkernel("run", "c.yaml", "toy_mood.end=interrupt")
        assert (result.returncode, result.stderr) == (130, "\ninterrupted\n")

    def test_a_trace(self, detkernel: Detkernel, folder: Path):
        result = detkernel("run", "--trace", "2", "c.yaml")
        assert result.returncode == 0
        assert result.stdout.count("iteration") == 3
        names = [line.split()[0] for line in result.stderr.splitlines()]
        assert names[0] == "trace:"
        assert [name for name in names if name.startswith("train_")] == ["train_step"] * 2
        lines = (folder / "work" / "trace.jsonl").read_text().splitlines()
        assert {json.loads(line)["plugin"] for line in lines} == {"", "model", "data", "toy_mood"}

    @pytest.mark.parametrize("count", ["0", "-1", "many"])
    def test_a_trace_of_nothing(self, detkernel: Detkernel, count: str):
        result = detkernel("run", "--trace", count, "c.yaml")
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert "Invalid value for '--trace'" in result.stderr

    def test_a_work_dir_that_is_a_file(self, detkernel: Detkernel):
        result = detkernel("run", "c.yaml", "run.work_dir=c.yaml")
        assert message(result).startswith("run.work_dir: c.yaml cannot be written: ")

    def test_an_empty_data_set(self, detkernel: Detkernel):
        result = detkernel("run", "c.yaml", "data.length=0")
        assert message(result).startswith("the loader for 'train' has no batches: its data set is empty")


class TestMistakes:
    @pytest.mark.parametrize("command", ["test", "check", "config", "hooks"])
    def test_each_command_that_takes_a_config_says_the_same_of_it(self, detkernel: Detkernel, command: str):
        wanted = "command line:1:1: model.with: there is no option 'with', did you mean 'width'?"
        assert message(detkernel(command, "c.yaml", "model.with=3")) == wanted

    @pytest.mark.parametrize(
        ("arguments", "wanted"),
        [
            (["d.yaml"], "d.yaml: no such file; its folder has c.yaml"),
            (["site"], "site: is a folder, expected a config file"),
            (["nowhere:c.yaml"], "'nowhere:c.yaml': there is no installed package 'nowhere'"),
            (["c.yaml", "width"], "command line:1:1: argument 1: expected KEY=VALUE, such as optimizer.lr=0.02"),
            (["c.yaml", "model.width=x"], "command line:1:13: model.width: expected a whole number, got the text 'x'"),
            (
                ["c.yaml", "model.with=3"],
                "command line:1:1: model.with: there is no option 'with', did you mean 'width'?",
            ),
            (["c.yaml", "run=null"], "c.yaml:1:1: run: missing: how long to train, such as `run: {until: 12 epochs}`"),
        ],
    )
    def test_in_a_config(self, detkernel: Detkernel, arguments: list[str], wanted: str):
        assert message(detkernel("run", *arguments)).startswith(wanted)

    def test_several_are_counted(self, detkernel: Detkernel, write: Write):
        write("d.yaml", CONFIG.replace("{use: toy_model}", "{use: toy_modle}") + "x: 3\ny: {}\n")
        result = detkernel("run", "d.yaml")
        assert result.returncode == 2
        assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
            "error: d.yaml:2:14: model.use: there is no plugin 'toy_modle', did you mean 'toy_model'?; "
            "`detkernel plugins` lists what is installed",
            "error: d.yaml:5:4: x: expected a map of options, got the number 3; write `x: {}` for none",
            *[
                line
                for line in result.stderr.splitlines()
                if line.startswith("error: d.yaml:6:4: y: there is no plugin")
            ],
        ]
        assert result.stderr.splitlines()[-1] == "3 problems; nothing was run"
        assert "    model: {use: toy_modle}\n                 ^\n" in result.stderr

    def test_in_the_choice_of_plugins(self, detkernel: Detkernel):
        assert message(detkernel("run", "c.yaml", "model=null")).startswith(
            "no active plugin provides build_model; active are data, toy_mood. Add one to the config, such as `model: {"
        )
        assert message(detkernel("check", "c.yaml", "model2={use: toy_model}")) == (
            "command line:1:8: 2 plugins build the model: 'model' and 'model2'; keep one and remove the other with "
            "`model2: null`"
        )

    def test_a_config_that_is_no_yaml(self, detkernel: Detkernel, write: Write):
        write("d.yaml", "run: [\n")
        assert message(detkernel("run", "d.yaml")).startswith("d.yaml:2:1: not valid YAML: ")

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a: \x00"])
    def test_a_config_that_is_no_text(self, detkernel: Detkernel, folder: Path, content: bytes):
        (folder / "d.yaml").write_bytes(content)
        assert message(detkernel("run", "d.yaml")).startswith("d.yaml:")

    def test_an_argument_that_is_no_text(self, detkernel: Detkernel):
        assert message(detkernel("run", "c.yaml", "model.width=\udcff")).endswith("may not stand in a config")
        assert "no such file" in message(detkernel("run", "\udcff.yaml"))

    @pytest.mark.parametrize(
        ("arguments", "wanted"),
        [
            (["rum", "c.yaml"], "there is no command 'rum', did you mean 'run'?"),
            (["qqqq"], "there is no command 'qqqq'"),
            (["train", "c.yaml", "a=1"], "there is no command 'train'; did you mean `detkernel run c.yaml a=1`?"),
            (["c.yaml", "a=1"], "there is no command 'c.yaml'; did you mean `detkernel run c.yaml a=1`?"),
            (["plugins", "toy_modle"], "there is no plugin 'toy_modle', did you mean 'toy_model'?"),
            (["plugins", "show", "toy_modle"], "there is no plugin 'toy_modle', did you mean 'toy_model'?"),
            (["new-plugin", "12"], "'12': expected a name of letters, digits and dashes, such as my-plugin"),
        ],
    )
    def test_in_a_name(self, detkernel: Detkernel, arguments: list[str], wanted: str):
        assert message(detkernel(*arguments)).startswith(wanted)

    @pytest.mark.parametrize("arguments", [["run"], ["run", "--fast", "c.yaml"], ["plugins", "show"]])
    def test_in_the_usage(self, detkernel: Detkernel, arguments: list[str]):
        result = detkernel(*arguments)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert result.stderr.count("Error: ") == 1
        assert result.stderr.startswith("Usage: ")


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("prob", ["probability", "size"], ", did you mean 'probability'?"),
        ("Prob", ["Probability", "size"], ", did you mean 'Probability'?"),
        ("step", ["stop", "steps_per_epoch"], ", did you mean 'steps_per_epoch'?"),
        ("pr", ["probability"], " (expected one of: probability)"),
        ("prob", ["probability_low", "probability_high"], " (expected one of: probability_high, probability_low)"),
    ],
)
def test_the_beginning_of_a_name_is_enough(name: str, known: list[str], hint: str):
    assert did_you_mean(name, known) == hint


class TestOtherCommands:
    def test_check(self, detkernel: Detkernel, folder: Path):
        result = detkernel("check", "c.yaml")
        assert (result.returncode, result.stderr) == (0, "")
        assert [" ".join(line.split()) for line in result.stdout.splitlines()] == [
            *("iteration 1", "iteration 2"),
            "config c.yaml: 3 plugins, every option valid",
            "length 1 epoch, 3 iterations, 3 an epoch",
            "classes 2: cat, dog",
            "parameters 4",
            "missing nothing is trained: no plugin makes an optimizer, such as `optimizer: {use: sgd, lr: 0.01}`",
            "nothing is saved: the config has no `checkpoint: {}`",
            "losses are not shown: the config has no `log: {}`",
            "nothing is measured: the config has no `evaluation`, such as `evaluation: {use: NAME}`",
            "ready to run",
        ]
        assert not (folder / "work").exists()

    def test_test(self, detkernel: Detkernel):
        result = detkernel("test", "c.yaml")
        assert (result.returncode, result.stdout, result.stderr) == (0, "toy/ap: 0.2500\n", "")

    def test_a_test_of_random_weights_is_refused(self, detkernel: Detkernel, write: Write):
        text = (
            "from detkernel import plugin\nfrom toy_one import ToyModel\n\n\n"
            '@plugin\nclass Own(ToyModel):\n    """Own."""\n\n    loads_weights = {}\n'
        )
        for answer, refused in (("False", True), ("True", False)):
            write("own.py", text.format(answer))
            result = detkernel("test", "c.yaml", "model={use: ./own.py:Own}")
            told = result.stderr.startswith("error: there are no weights to test: the config has no `checkpoint: {}`")
            assert (result.returncode, told) == (2 * refused, refused)

    def test_config(self, detkernel: Detkernel, write: Write):
        write("d.yaml", "base: c.yaml\nmodel: {width: 7}\n")
        result = detkernel("config", "d.yaml", "data.length=5")
        assert (result.returncode, result.stderr) == (0, "")
        rows = dict(re.findall(r"^ *(\w+: .*?) +# (.*)$", result.stdout, re.MULTILINE))
        assert rows["width: 7"] == "d.yaml:2"
        assert rows["use: toy_model"] == "c.yaml:2"
        assert rows["length: 5"] == "command line:1"
        assert rows["seed: 0"] == "default"
        assert rows["use: toy_mood"] == "default"

    def test_a_plain_config_is_one(self, detkernel: Detkernel, write: Write):
        text = detkernel("config", "--plain", "c.yaml", "data.length=5").stdout
        write("d.yaml", text)
        assert detkernel("config", "--plain", "d.yaml").stdout == text
        assert detkernel("config", "d.yaml").returncode == 0

    def test_plugins(self, detkernel: Detkernel):
        result = detkernel("plugins")
        assert (result.returncode, result.stderr) == (0, "")
        listed = "hook, of toy 0.5\n  toy_data   Numbers for images.\n  toy_model  It guesses.\n"
        assert listed in result.stdout
        assert listed in detkernel("plugins", "hook").stdout
        page = detkernel("plugins", "toy_data")
        assert (page.returncode, page.stderr) == (0, "")
        assert page.stdout == detkernel("plugins", "show", "toy_data").stdout
        assert "  length: int = 3\n      batches in an epoch (at least 0)\n" in page.stdout

    def test_no_plugins(self, detkernel: Detkernel, folder: Path):
        for path in (folder / "site").glob("*.dist-info"):
            (path / "entry_points.txt").unlink()
        result = detkernel("plugins")
        assert result.returncode == 0
        if "detkernel-" not in result.stdout:  # the kernel is alone
            assert result.stdout == "no plugins are installed; `pip install detkernel` brings the standard ones\n"

    def test_help(self, detkernel: Detkernel):
        result = detkernel("--help")
        assert (result.returncode, result.stderr) == (0, "")
        for command in ("run", "test", "check", "config", "plugins", "hooks", "schema", "new-plugin"):
            line = next(line for line in result.stdout.splitlines() if line.startswith(f"  {command} "))
            assert len(line.split()) > 3
            page = detkernel(command, "-h")
            assert (page.returncode, page.stderr) == (0, "")
            assert page.stdout.startswith(f"Usage: python -m detkernel {command}")

    def test_version(self, detkernel: Detkernel):
        assert detkernel("--version").stdout == f"detkernel, version {package.__version__}\n"

    def test_nothing_at_all_shows_the_help(self, detkernel: Detkernel):
        result = detkernel()
        assert result.returncode == 2
        assert "Commands:" in result.stdout + result.stderr

    def test_a_reader_that_goes_away(self, folder: Path):
        command = f"{sys.executable} -m detkernel hooks | head -1; exit ${{PIPESTATUS[0]}}"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=folder)
        assert result.stderr == ""
        assert result.returncode in (0, 141)

    @pytest.mark.parametrize(
        ("redirected", "status", "said"),
        [
            ("hooks >/dev/full", 1, "error: standard output cannot be written: No space left on device\n"),
            ("config none.yaml 2>/dev/full", 2, ""),
            ("config none.yaml >&- 2>&- <&-", 2, ""),
            ("hooks >&-", 0, ""),
        ],
    )
    def test_output_that_nobody_takes(self, folder: Path, redirected: str, status: int, said: str):
        command = f"{sys.executable} -m detkernel {redirected}"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=folder)
        assert (result.returncode, result.stderr) == (status, said)

    def test_names_of_files_are_shown_escaped(self, detkernel: Detkernel, folder: Path):
        for name in ("a\nb.yaml", "\udcff.yaml", "\x1b[31m.yaml"):
            (folder / name).write_text("run: {until: 1 iters}\nx: {}\n")
        result = detkernel("config", "\x1b[2J.yaml")
        listed = "\\udcff.yaml, \\x1b[31m.yaml, a\\nb.yaml, c.yaml"
        assert result.stderr == f"error: \\x1b[2J.yaml: no such file; its folder has {listed}\n"
        assert detkernel("hooks", "\udcff.yaml").stderr.startswith("error: \\udcff.yaml:2:4: x: there is no plugin 'x'")


class TestOfferedCommands:
    def test_one_is_listed_without_import_and_runs(self, detkernel: Detkernel, plant: Plant):
        source = (
            'import click\n@click.command()\n@click.argument("x")\ndef hello(x):\n    """Say hello."""\n    print(x)\n'
        )
        plant("greets", {"greets_one.py": source}, commands={"hello": "greets_one:hello"})
        plant("boom", {"boom_one.py": "raise RuntimeError('imported')\n"}, commands={"boom": "boom_one:boom"})
        listed = detkernel("--help")
        assert (listed.returncode, listed.stderr) == (0, "")
        rows = [" ".join(line.split()) for line in listed.stdout.splitlines()]
        assert rows[rows.index("Commands of greets:") + 1] == "hello Say hello"
        assert rows[rows.index("Commands of boom:") + 1] == "boom"
        result = detkernel("hello", "you")
        assert (result.returncode, result.stdout, result.stderr) == (0, "you\n", "")
        assert detkernel("hello").returncode == 2
        assert message(detkernel("hallo")).startswith("there is no command 'hallo', did you mean 'hello'?")

    def test_its_users_mistakes_are_told_like_the_kernels(self, detkernel: Detkernel, plant: Plant):
        source = (
            "import click\nfrom detkernel import UserError\n@click.command()\ndef sad():\n"
            "    'Say no.'\n    raise UserError('no')\n"
        )
        plant("sad", {"sad_one.py": source}, commands={"sad": "sad_one:sad"})
        assert message(detkernel("sad")) == "no"

    @pytest.mark.parametrize(
        ("source", "wanted"),
        [
            (
                "import no_such_thing\n",
                "command 'bad' of bad-one 1.0 cannot be imported: No module named 'no_such_thing'",
            ),
            ("", "command 'bad' of bad-one 1.0: its module bad_one has no 'bad'"),
            ("bad = 3\n", "bad_one:bad is not a command; decorate it with @click.command()"),
        ],
    )
    def test_one_that_cannot_be_loaded(self, detkernel: Detkernel, plant: Plant, source: str, wanted: str):
        plant("bad-one", {"bad_one.py": source}, commands={"bad": "bad_one:bad"})
        assert message(detkernel("bad")).startswith(wanted)
        assert detkernel("--help").returncode == 0

    def test_one_name_from_two_distributions(self, detkernel: Detkernel, plant: Plant):
        plant("one-shop", {}, commands={"shop": "one_shop:shop"})
        plant("two-shop", {}, commands={"shop": "two_shop:shop"})
        found = message(detkernel("shop"))
        assert found.startswith("'shop' is offered by ")
        assert "one-shop 1.0" in found
        assert "two-shop 1.0" in found
        assert detkernel("--help").stdout.count("(CONFLICT: offered twice)") == 2

    def test_the_kernels_own_cannot_be_replaced(self, detkernel: Detkernel, plant: Plant):
        plant("thief", {}, commands={"run": "thief_one:run"})
        assert detkernel("run", "c.yaml").returncode == 0
        assert "(HIDDEN by the kernel's own)" in " ".join(detkernel("--help").stdout.split())


class TestImports:
    def imported(self, code: str, folder: Path) -> set[str]:
        """The top-level modules that some code imports, beyond what the interpreter starts with."""
        shown = f"import sys; sys.path.insert(0, 'site'); before = set(sys.modules); {code}\n"
        shown += "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}), file=sys.stderr)"
        result = subprocess.run(
            [sys.executable, "-c", shown], capture_output=True, text=True, check=False, cwd=folder, timeout=120
        )
        assert result.returncode == 0, result.stderr
        return set(result.stderr.split())

    def test_no_module_of_the_kernel_imports_torch_or_numpy(self, folder: Path):
        names = [info.name for info in pkgutil.walk_packages(package.__path__, "detkernel.")]
        names = [name for name in names if name != "detkernel.__main__"]
        assert {"detkernel.cli", "detkernel.config.schema", "detkernel.testing.hook"} < set(names)
        imported = self.imported(f"import importlib; [importlib.import_module(name) for name in {names}]", folder)
        assert "yaml" in imported
        assert not imported & {"torch", "numpy", "torchvision", "rich", "PIL"}

    @pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["run", "--help"]])
    def test_help_and_list_import_nothing_heavy(self, folder: Path, arguments: list[str]):
        imported = self.imported(f"from detkernel.cli import cli; cli({arguments}, standalone_mode=False)", folder)
        assert {"click", "detkernel"} <= imported
        assert not imported & {"torch", "numpy", "torchvision", "rich", "PIL", "yaml", "cattr", "cattrs", "toy_one"}

    def test_they_take_no_longer_than_a_few_empty_interpreters(self, folder: Path):
        """A third of a second on an idle machine; measured in CPU time against Python's own start, for a busy one."""

        def seconds(*command: str) -> float:
            code = (
                "import resource, subprocess, sys\n"
                "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
                "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
                "print(used.ru_utime + used.ru_stime)"
            )
            return min(
                float(subprocess.check_output([sys.executable, "-c", code, *command], cwd=folder)) for _ in range(3)
            )

        begin = time.monotonic()
        empty = seconds(sys.executable, "-c", "import importlib.metadata, argparse, dataclasses, inspect, ast")
        for arguments in (["--help"], ["plugins"]):
            assert seconds(sys.executable, "-m", "detkernel", *arguments) < 12 * empty
        assert time.monotonic() - begin < 60
