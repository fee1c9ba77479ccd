"""The reference is made from the code: every event has its place, its arguments and an example that runs."""

from __future__ import annotations

import inspect
import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from detkernel import Kernel, Run, RunOptions, Span, hookimpl, plugin, state
from detkernel.bus import Bus
from detkernel.config.types import option_fields
from detkernel.hookspecs import Events
from detkernel.reference import event_list, event_page, loop_text, option_rows, plugin_page, signature
from detkernel.testing import PlainData, PlainModel, PlainStepping, Recorder

Plant = Callable[..., Path]
Write = Callable[[str, str], Path]
Detkernel = Callable[..., subprocess.CompletedProcess[str]]

EVENTS = Bus({}).event_names()


def example(event: str) -> str:
    """The example that ends an event's description."""
    return inspect.getdoc(getattr(Events, event)).rpartition("For example:\n\n")[2]


class MyLoader:
    def __init__(self, mode: str, seed: int) -> None:
        self.dataset = SimpleNamespace(classes=("cat",))

    def __len__(self) -> int:
        return 2

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        for number in range(start, 2):
            yield SimpleNamespace(images=[number], image_ids=[f"image {number}"], sizes=[(4, 4)])


class MyDetector:
    def __init__(self, num_classes: int) -> None:
        self.parameters = {name: SimpleNamespace(numel=lambda: 500_000, grad=2.0) for name in ("backbone.w", "head.w")}

    def named_parameters(self) -> Any:
        return self.parameters.items()

    def predict(self, batch: Any) -> list[Any]:
        return [[1, 2, 3] for _ in batch.images]


@plugin
class Steps:
    """What is trained."""

    seen: Any = state(factory=list)

    @hookimpl
    def train_step(self) -> dict[str, float]:
        return {"loss_bbox": 1.0, "loss_cls": 3.0}

    @hookimpl
    def after_train_iter(self, run: Run, batch: Any, losses: dict[str, float]) -> None:
        self.seen.append(losses)
        logits = SimpleNamespace(abs=lambda: SimpleNamespace(mean=lambda: 2.0))
        further = run.hook.after_forward(run=run, batch=batch, outputs={"logits": logits})
        assert further == [{"loss_logits": 0.02}]
        run.hook.after_backward(run=run)
        run.hook.before_optimizer_step(run=run)
        run.hook.after_optimizer_step(run=run)


@pytest.fixture
def examples() -> Any:
    """One plugin of all the examples."""
    body = "\n".join(f"{example(event)}\n" for event in EVENTS)
    source = f'@plugin\nclass Examples:\n    """All of them."""\n\n{body}'
    names = {"plugin": plugin, "hookimpl": hookimpl, "MyLoader": MyLoader, "MyDetector": MyDetector}
    exec(source, names)
    return names["Examples"]()


def kernel(folder: Path, **plugins: object) -> Kernel:
    return Kernel(plugins, RunOptions(until=Span(2, "epochs"), validate=Span(1, "epochs"), work_dir=folder))


class TestExamples:
    @pytest.mark.parametrize("event", EVENTS)
    def test_each_answers_its_event(self, event: str):
        assert f"def {event}(self" in example(event)
        assert example(event).startswith("    @hookimpl")

    def test_a_run_of_them_all(self, examples: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.DEBUG, "detkernel")
        steps, recorder = Steps(), Recorder()
        made = kernel(tmp_path, steps=steps, examples=examples)
        recorder.attach(made.state.bus)
        run = made.run()
        assert steps.seen == [{"loss_bbox": 0.5, "loss_cls": 3.0}] * 4
        assert run.metrics == {"mine/found": 6.0}
        assert run.scalars["progress"]() == 1.0
        assert [item.requires_grad for item in run.model.parameters.values()] == [False, True]
        assert [item.grad for item in run.model.parameters.values()] == pytest.approx([2e-4, 2.0])
        said = [record.getMessage() for record in caplog.records]
        assert {"2 parameters have a gradient", "stepped in iteration 1"} < set(said)
        assert said[0] == f"seed 0, results in {tmp_path}"
        assert {"epoch 1 of 2", "sizes [(4, 4)]"} < set(said)
        assert any("image_ids=['image 0']" in text for text in said)
        assert "the losses are loss_bbox, loss_cls" in said
        assert said[-1] == "4 iterations, complete"
        assert set(recorder.names()) == set(EVENTS) - {"on_error", "summary"}

    def test_a_failing_run_and_a_check(self, examples: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        @plugin
        class Fails:
            """It fails."""

            @hookimpl
            def after_train_iter(self) -> None:
                raise ArithmeticError("torn")

        caplog.set_level(logging.DEBUG, "detkernel")
        with pytest.raises(ArithmeticError):
            kernel(tmp_path, steps=Steps(), examples=examples, fails=Fails()).run()
        said = [record.getMessage() for record in caplog.records]
        assert said[-2:] == ["failed in iteration 1: torn", "1 iterations, failed"]
        assert kernel(tmp_path, steps=Steps(), examples=examples).check() == {"parameters": "1.0 M"}


class TestEvents:
    @pytest.mark.parametrize("event", EVENTS)
    def test_each_is_documented_and_has_its_place_in_the_loop(self, event: str):
        spec = Bus({}).spec(event)
        description = inspect.getdoc(spec).partition("For example:")[0]
        assert len(description) > 15
        assert loop_text().count(f" {event}(") == 1
        found = inspect.signature(spec)
        assert found.return_annotation is not inspect.Signature.empty
        annotations = [item.annotation for name, item in found.parameters.items() if name != "self"]
        assert annotations
        assert inspect.Signature.empty not in annotations

    @pytest.mark.parametrize("event", EVENTS)
    def test_its_arguments_are_those_of_the_pseudo_code(self, event: str):
        arguments = ", ".join(name for name in inspect.signature(Bus({}).spec(event)).parameters if name != "self")
        assert f" {event}({arguments})" in loop_text()

    def test_all_are_listed_in_the_order_in_which_they_fire(self, detkernel: Detkernel):
        result = detkernel("hooks")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == event_list(Bus({}), with_plugins=False)
        entries = [line.partition("(")[0] for line in result.stdout.splitlines() if line[:1].isalpha()]
        assert entries == EVENTS

    @pytest.mark.parametrize("event", EVENTS)
    def test_one_alone(self, event: str):
        page = event_page(event)
        assert [line.split()[1].partition("(")[0] for line in page.splitlines() if line.startswith("->")] == [event]
        assert signature(Bus({}).spec(event)) in page
        assert f"        def {event}(self" in page

    def test_signatures(self):
        assert signature(Events.setup) == "setup(run: Run) -> None"
        assert signature(Events.build_loader) == (
            "build_loader(run: Run, mode: Mode) -> Loader | None, the first that is not None"
        )

    def test_the_command_for_one(self, detkernel: Detkernel):
        assert detkernel("hooks", "val_step").stdout == event_page("val_step")
        result = detkernel("hooks", "val_stepp")
        assert (result.returncode, result.stderr) == (
            2,
            "error: 'val_stepp' is neither a config nor an event, did you mean 'val_step'?\n",
        )

    def test_one_that_a_plugin_publishes(self, detkernel: Detkernel, plant: Plant, write: Write):
        plant("pub", {"pub_one.py": self.WHO}, plugins={"one_who": "pub_one:One", "two_who": "pub_one:Two"})
        result = detkernel("hooks", "ready")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == "ready(metrics: Any) -> Any\n    They are ready.\n\npublished by: one_who\n"
        write("c.yaml", "run: {until: 1 epoch}\n")
        result = detkernel("hooks", "ready", "c.yaml")
        assert (result.returncode, result.stderr) == (
            2,
            "error: c.yaml: 'ready' is an event that no active plugin publishes; "
            "add one of these to the config: one_who\n",
        )
        result = detkernel("hooks", "redy")
        assert result.stderr == "error: 'redy' is neither a config nor an event, did you mean 'ready'?\n"
        write("c.yaml", "run: {until: 1 epoch}\nsecond: {use: two_who}\none_who: {}\n")
        result = detkernel("hooks", "ready", "c.yaml")
        assert result.stdout.startswith(
            "ready(metrics: Any) -> Any\n    They are ready.\n\nready(metrics)\n   1. second "
        )

    def test_who_answers_one(self, detkernel: Detkernel, plant: Plant, write: Write):
        plant("who", {"who_one.py": self.WHO}, plugins={"one_who": "who_one:One", "two_who": "who_one:Two"})
        write("c.yaml", "run: {until: 1 epoch}\nsecond: {use: two_who}\none_who: {}\n")
        result = detkernel("hooks", "before_run", "c.yaml", "one_who.priority=low")
        assert (result.returncode, result.stderr) == (0, "")
        page, _, answers = result.stdout.rpartition("\nbefore_run(run)\n")
        assert page == event_page("before_run")
        assert [line.split()[1] for line in answers.splitlines()] == ["one_who", "second"]
        result = detkernel("hooks", "before_rum", "c.yaml")
        assert (result.returncode, result.stderr) == (
            2,
            "error: c.yaml: 'before_rum' is not an event, did you mean 'before_run'?; "
            "`detkernel hooks` lists them all\n",
        )

    WHO = '''
    from typing import ClassVar
    from detkernel import hookimpl, hookspec, plugin
    class Own:
        @hookspec
        def ready(self, metrics):
            """They are ready."""
    @plugin(events=Own)
    class One:
        """The first."""
        @hookimpl
        def before_run(self, run): ...
    @plugin
    class Two:
        """The second."""
        @hookimpl(trylast=True)
        def before_run(self): ...
        @hookimpl
        def ready(self, metrics): ...
    '''

    def test_who_runs_at_each(self, detkernel: Detkernel, plant: Plant, write: Write):
        plant("who", {"who_runs.py": self.WHO}, plugins={"one_who": "who_runs:One", "two_who": "who_runs:Two"})
        write("c.yaml", "run: {until: 1 epoch}\nsecond: {use: two_who, priority: high}\none_who: {}\n")
        result = detkernel("hooks", "c.yaml", "one_who.priority=low")
        assert (result.returncode, result.stderr) == (0, "")
        lines = result.stdout.splitlines()
        begin = lines.index("before_run(run)")
        assert [line.split() for line in lines[begin + 1 : begin + 3]] == [
            ["1.", "one_who", "low", "who_runs:One"],
            ["2.", "second", "high,", "last", "who_runs:Two"],
        ]
        assert lines[lines.index("setup(run)") + 1] == "   -"
        assert lines[-2:][0] == "ready(metrics)"
        assert lines[-1].split() == ["1.", "second", "high", "who_runs:Two"]


class TestPlugins:
    @pytest.mark.parametrize("cls", [RunOptions, PlainData, PlainModel, PlainStepping])
    def test_every_option_of_the_kernel_has_a_meaning(self, cls: type):
        for name, field in option_fields(cls).items():
            assert len(field.metadata["help"]) > 8, name
        rows = option_rows(cls)
        assert [row[0] for row in rows] == list(option_fields(cls))
        assert all(all(row) for row in rows)

    PAGE = '''
    from __future__ import annotations
    from typing import ClassVar, Literal
    from detkernel import Part, Span, hookimpl, hookspec, option, plugin

    class Body(Part):
        """A body."""

    class Own:
        @hookspec(firstresult=True)
        def ready(self, metrics: dict[str, float]) -> str:
            """They are ready."""

    @plugin
    class Group:
        """Options."""
        eps: float = option(default=1e-5, above=0, help="a small number")

    @plugin
    class Leg(Body):
        """A leg."""

    @plugin(priority="low", requires=("leg",), events=Own)
    class Walker:
        """It walks.

        And it runs.
        """
        kind: Literal["slow", "fast"] = option(help="how")
        every: Span = option(default=Span(2, "iters"), help="how often")
        body: Body | None = option(factory=Leg, help="on what")
        group: Group = option(factory=Group, help="more")
        steps: tuple[int, ...] = option(default=(1, 2), at_least=1, choices=(1, 2), help="how many")

        @hookimpl
        def after_run(self): ...
        @hookimpl
        def setup(self): ...
        @hookimpl
        def ready(self): ...
        @hookimpl(wrapper=True, specname="after_run")
        def _around(self):
            yield
    '''

    def test_a_page(self, detkernel: Detkernel, plant: Plant):
        plant("pages", {"pages.py": self.PAGE}, plugins={"walker": "pages:Walker", "leg": "pages:Leg"}, version="2.0")
        result = detkernel("plugins", "show", "walker")
        assert (result.returncode, result.stderr) == (0, "")
        assert [" ".join(line.split()) for line in result.stdout.splitlines()] == [
            "walker (pages:Walker, pages 2.0)",
            "",
            "It walks.",
            "",
            "And it runs.",
            "",
            "in a config: walker: {kind: ...}",
            "",
            *("kind: slow | fast, required", "how"),
            *("every: Span = 2 iters", "how often"),
            *("body: Body | null = {use: leg}", "on what"),
            *("group: Group = {eps: 1e-05}", "more"),
            *("group.eps: float = 1e-05", "a small number (more than 0)"),
            *("steps: tuple[int, ...] = [1, 2]", "how many (at least 1, one of 1, 2)"),
            "",
            "answers: setup, after_run, ready (priority low)",
            "",
            "requires the plugin 'leg'",
            "",
            "publishes ready(metrics: dict[str, float]) -> str, the first that is not None",
            "They are ready.",
        ]

    def test_a_page_of_a_part_and_of_a_local_file(self, detkernel: Detkernel, plant: Plant, write: Write):
        plant("pages", {"pages.py": self.PAGE}, plugins={"leg": "pages:Leg"})
        page = detkernel("plugins", "show", "leg").stdout
        assert "a body; in a config, where one is expected: {use: leg}" in page
        assert page.endswith("It has no options.\n")
        write("mine.py", self.PAGE)
        assert detkernel("plugins", "show", "mine.py:Leg").stdout.startswith("mine.py:Leg (mine.py:Leg)\n\nA leg.\n")
        page = detkernel("plugins", "show", "mine.py:Walker").stdout
        assert "in a config: mine: {use: mine.py:Walker, kind: ...}" in page

    def test_what_takes_the_place_of_others_has_their_key(self, detkernel: Detkernel, plant: Plant):
        page = self.PAGE.replace('priority="low"', 'priority="low", key="gait"')
        assert page != self.PAGE
        plant("pages", {"pages.py": page}, plugins={"walker": "pages:Walker", "leg": "pages:Leg"})
        assert "in a config: gait: {use: walker, kind: ...}" in detkernel("plugins", "show", "walker").stdout

    def test_an_unknown_one(self, detkernel: Detkernel):
        result = detkernel("plugins", "show", "nowhere")
        assert result.returncode == 2
        assert result.stderr.startswith("error: there is no plugin 'nowhere'")
        assert result.stderr.count("\n") == 1

    def test_a_command(self, detkernel: Detkernel, plant: Plant):
        plant("shop", {}, commands={"box-lister": "shop_one:lister"})
        result = detkernel("plugins", "show", "box-lister")
        assert (result.returncode, result.stderr) == (
            2,
            "error: 'box-lister' is a command of shop, not a plugin; `detkernel box-lister --help` says what it does\n",
        )

    def test_a_page_of_a_class(self):
        assert plugin_page("sgd", PlainStepping).startswith(
            "sgd (detkernel.testing.plain:PlainStepping)\n\nA step towards"
        )
