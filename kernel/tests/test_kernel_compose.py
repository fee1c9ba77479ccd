"""One config from several: base files, overrides from the command line, interpolation."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from detkernel import ConfigError, UserError
from detkernel.config import load
from detkernel.config.compose import compose

Write = Callable[[str, str], Path]


def plain(source: str, *overrides: str) -> Any:
    return compose(source, overrides).plain()


def refusal(source: str, *overrides: str) -> str:
    """The message for a config that cannot be composed: its first line."""
    with pytest.raises(UserError) as caught:
        compose(source, overrides)
    return str(caught.value).splitlines()[0]


def load_use(*overrides: str) -> object:
    """The name of the part `data.body`, whose options were given apart from it."""
    body = compose("c.yaml", overrides).child("data").child("body")
    return body.over.value


class TestBases:
    def test_a_base_is_relative_to_its_file(self, write: Write):
        write("shared/inner/a.yaml", "x: {one: 1}\n")
        write("shared/b.yaml", "base: inner/a.yaml\nx: {two: 2}\n")
        write("c.yaml", "base: shared/b.yaml\nx: {three: 3}\n")
        assert plain("c.yaml") == {"x": {"one": 1, "two": 2, "three": 3}}

    def test_of_several_the_later_wins(self, write: Write):
        write("a.yaml", "x: {v: a, only_a: 1}\n")
        write("b.yaml", "x: {v: b}\n")
        write("c.yaml", "base: [a.yaml, b.yaml]\ny: {}\n")
        assert plain("c.yaml") == {"x": {"v": "b", "only_a": 1}, "y": {}}

    def test_one_file_may_be_the_base_of_two(self, write: Write):
        write("root.yaml", "x: {v: 1}\n")
        write("a.yaml", "base: root.yaml\ny: {}\n")
        write("b.yaml", "base: root.yaml\nz: {}\n")
        write("c.yaml", "base: [a.yaml, b.yaml]\n")
        assert plain("c.yaml") == {"x": {"v": 1}, "y": {}, "z": {}}

    def test_an_absolute_path(self, write: Write):
        path = write("far/a.yaml", "x: {v: 1}\n")
        write("c.yaml", f"base: {path}\n")
        assert plain("c.yaml") == {"x": {"v": 1}}

    def test_no_base(self, write: Write):
        write("c.yaml", "base: null\nx: {}\n")
        assert plain("c.yaml") == {"x": {}}
        write("d.yaml", "base: []\nx: {}\n")
        assert plain("d.yaml") == {"x": {}}

    def test_a_file_of_an_installed_package(self, write: Write):
        write("site/some_configs/__init__.py", "raise RuntimeError('imported')\n")
        write("site/some_configs/base/a.yaml", "base: b.yaml\nx: {v: 1}\n")
        write("site/some_configs/base/b.yaml", "y: {}\n")
        write("c.yaml", "base: some_configs:base/a.yaml\n")
        assert plain("c.yaml") == {"y": {}, "x": {"v": 1}}
        assert plain("some_configs:base/a.yaml", "x.v=2") == {"y": {}, "x": {"v": 2}}

    def test_a_file_whose_name_has_a_colon(self, write: Write):
        write("a:b.yaml", "x: {}\n")
        assert plain("a:b.yaml") == {"x": {}}

    @pytest.mark.parametrize("package", ["no_such_package", "sys", "__main__"])
    def test_what_is_no_package(self, write: Write, package: str):
        write("c.yaml", f"base: {package}:a.yaml\n")
        assert refusal("c.yaml") == (f"c.yaml:1:7: base: '{package}:a.yaml': there is no installed package '{package}'")

    def test_a_missing_one_is_reported_where_it_is_named(self, write: Write):
        write("sub/runtime.yaml", "x: {}\n")
        write("c.yaml", "x: {}\nbase:\n  - sub/runtime.yaml\n  - sub/runtim.yaml\n")
        assert refusal("c.yaml") == "c.yaml:4:5: base: sub/runtim.yaml: no such file, did you mean 'sub/runtime.yaml'?"

    @pytest.mark.parametrize("name", ["x" * 300, "pkg:" + "x" * 300])
    def test_a_name_that_no_file_can_have(self, write: Write, name: str):
        write("c.yaml", f"base: {name}\n")
        assert refusal("c.yaml").startswith("c.yaml:1:7: base: ")

    def test_links_in_a_circle(self, write: Write, folder: Path):
        (folder / "loop.yaml").symlink_to("loop.yaml")
        write("c.yaml", "base: loop.yaml\n")
        assert refusal("c.yaml").startswith("c.yaml:1:7: base: loop.yaml: cannot be read: Too many levels of symbolic")

    def test_a_circle_is_shown(self, write: Write):
        write("a.yaml", "base: sub/b.yaml\n")
        write("sub/b.yaml", "base: ../a.yaml\n")
        assert refusal("a.yaml") == ("sub/b.yaml:1:7: base: a.yaml is its own base: a.yaml -> sub/b.yaml -> a.yaml")

    def test_bases_that_fan_out(self, write: Write):
        for number in range(40):
            write(f"{number}.yaml", f"base: [{number + 1}.yaml, {number + 1}.yaml, {number + 1}.yaml]\nx: {{a: 1}}\n")
        write("40.yaml", "y: {a: 1}\n")
        assert plain("0.yaml") == {"x": {"a": 1}, "y": {"a": 1}}
        write("many.yaml", f"base: [{'40.yaml, ' * 201}]\n")
        assert refusal("many.yaml").endswith("base: more than 200 of them, over all files")

    def test_a_long_chain_and_a_large_sum(self, write: Write):
        for number in range(202):
            write(f"{number}.yaml", f"base: {number + 1}.yaml\n")
        assert "more than 200" in refusal("0.yaml")
        for number in range(3):
            write(f"{number}.yaml", f"base: {number + 1}.yaml\n#{'x' * 400_000}\n")
        assert refusal("0.yaml").endswith(
            "base: 2.yaml: with it, the config and its bases have over 1000000 characters"
        )

    def test_what_is_not_a_file_is_not_waited_for(self, write: Write, folder: Path):
        os.mkfifo(folder / "pipe.yaml")
        (folder / "zero.yaml").symlink_to("/dev/zero")
        write("c.yaml", "base: pipe.yaml\n")
        assert refusal("c.yaml") == (
            "c.yaml:1:7: base: pipe.yaml: cannot be read: it is a named pipe, not a regular file"
        )
        assert refusal("pipe.yaml").endswith("named pipe, not a regular file")
        assert refusal("zero.yaml") == "/dev/zero: cannot be read: it is a device, not a regular file"

    def test_a_base_of_itself(self, write: Write):
        write("a.yaml", "base: a.yaml\n")
        assert refusal("a.yaml") == "a.yaml:1:7: base: a.yaml is its own base: a.yaml -> a.yaml"

    @pytest.mark.parametrize("text", ["base: 3", "base: {a: b}", "base: [a.yaml, [b.yaml]]"])
    def test_it_is_a_file_or_files(self, write: Write, text: str):
        write("a.yaml", "x: {}\n")
        write("c.yaml", text)
        assert refusal("c.yaml").endswith(": base: expected a file, or a list of files")

    def test_a_mistake_in_a_base_is_reported_there(self, write: Write):
        write("sub/a.yaml", "x: [\n")
        write("c.yaml", "base: sub/a.yaml\n")
        assert refusal("c.yaml").startswith("sub/a.yaml:2:1: not valid YAML")

    @pytest.mark.parametrize("text", ["- a\n", "just text\n", "3\n"])
    def test_a_config_is_a_map(self, write: Write, text: str):
        write("c.yaml", text)
        assert refusal("c.yaml") == "c.yaml:1:1: expected a map of plugins, such as `model: {use: NAME}`"


class TestMerging:
    @pytest.fixture(autouse=True)
    def _parent(self, write: Write) -> None:
        self.write = write
        write(
            "parent.yaml",
            """
            run: {until: 4 epochs, seed: 1}
            model:
              use: rcnn
              backbone: {use: resnet, depth: 50, norm: {kind: bn}}
              sizes: [1, 2, 3]
            resnet: {depth: 3}
            loop: [flip, {use: resize, side: 3}]
            body: resnet
            """,
        )

    def child(self, text: str) -> Any:
        self.write("child.yaml", f"base: parent.yaml\n{text}\n")
        return plain("child.yaml")

    def test_maps_merge_key_by_key(self):
        made = self.child("model: {backbone: {depth: 18, norm: {eps: 1}}}\nrun: {seed: 2}")
        assert made["model"]["backbone"] == {"use": "resnet", "depth": 18, "norm": {"kind": "bn", "eps": 1}}
        assert made["run"] == {"until": "4 epochs", "seed": 2}

    def test_lists_are_replaced_whole(self):
        assert self.child("model: {sizes: [9]}")["model"]["sizes"] == [9]

    def test_another_use_drops_the_options_of_the_old_one(self):
        assert self.child("model: {use: fcos, width: 3}")["model"] == {"use": "fcos", "width": 3}

    def test_the_same_use_keeps_them(self):
        assert self.child("model: {use: rcnn, width: 3}")["model"]["sizes"] == [1, 2, 3]

    def test_another_use_in_a_part_drops_its_options_only(self):
        made = self.child("model: {backbone: {use: vgg}}")["model"]
        assert made["backbone"] == {"use": "vgg"}
        assert made["sizes"] == [1, 2, 3]

    def test_a_key_that_is_its_own_use(self):
        assert self.child("resnet: {use: resnet, width: 1}")["resnet"] == {"use": "resnet", "depth": 3, "width": 1}
        assert self.child("resnet: {use: vgg, width: 1}")["resnet"] == {"use": "vgg", "width": 1}

    def test_a_name_alone_replaces_a_part(self):
        assert self.child("model: {backbone: vgg}")["model"]["backbone"] == "vgg"

    def test_null_removes_a_plugin_but_stays_a_value_below_it(self):
        made = self.child("resnet: null\nmodel: {sizes: null}")
        assert "resnet" not in made
        assert made["model"]["sizes"] is None

    def test_a_removed_plugin_can_come_back(self):
        self.write("middle.yaml", "base: parent.yaml\nresnet: null\n")
        self.write("child.yaml", "base: middle.yaml\nresnet: {width: 1}\n")
        assert plain("child.yaml")["resnet"] == {"width": 1}

    def test_the_order_is_the_parents_then_the_childs(self):
        assert list(self.child("extra: {}\nrun: {seed: 3}")) == ["run", "model", "resnet", "loop", "body", "extra"]


class TestOverrides:
    @pytest.fixture(autouse=True)
    def _config(self, write: Write) -> None:
        write(
            "c.yaml",
            """
            run: {until: 4 epochs}
            optimizer: {use: sgd, lr: 0.1}
            data: {steps: [{use: flip, prob: 1}, {use: resize, side: 3}], sizes: [[1, 2], [3, 4]]}
            """,
        )

    def test_values_are_read_as_yaml(self):
        made = plain("c.yaml", "optimizer.lr=1e-3", "run.work_dir=runs/a=b", "run.x='1'", "new.list=[1, {a: b}]")
        assert made["optimizer"] == {"use": "sgd", "lr": 0.001}
        assert made["run"] == {"until": "4 epochs", "work_dir": "runs/a=b", "x": "1"}
        assert made["new"] == {"list": [1, {"a": "b"}]}

    def test_a_number_is_a_position_in_a_list(self):
        made = plain("c.yaml", "data.steps.1.side=5", "data.sizes.-1.0=9", "data.steps.0={use: crop}")
        assert made["data"] == {"steps": [{"use": "crop"}, {"use": "resize", "side": 5}], "sizes": [[1, 2], [9, 4]]}

    @pytest.mark.parametrize("position", ["2", "-3", "x", "+1", "9" * 5000])
    def test_a_position_outside_the_list(self, position: str):
        assert refusal("c.yaml", f"data.steps.{position}.side=5") == (
            f"command line:1:1: data.steps: a list of 2; '{position}' is not a position in it"
        )

    @pytest.mark.parametrize(
        "chosen", ["optimizer.use=adam", "optimizer={use: adam}", "optimizer={use: adam, beta: 2}"]
    )
    def test_a_choice_and_its_options_in_any_order(self, chosen: str):
        wanted = plain("c.yaml", chosen, "optimizer.eps=1", "optimizer.lr=3")["optimizer"]
        assert wanted["use"] == "adam"
        assert (wanted["eps"], wanted["lr"]) == (1, 3)
        assert plain("c.yaml", "optimizer.eps=1", chosen, "optimizer.lr=3")["optimizer"] == wanted
        assert plain("c.yaml", "optimizer.eps=1", "run.seed=3", "optimizer.lr=3", chosen)["optimizer"] == wanted

    def test_a_part_in_any_order(self):
        wanted = {"use": "crop", "side": 9}
        assert plain("c.yaml", "data.steps.0.side=9", "data.steps.0.use=crop")["data"]["steps"][0] == wanted
        assert plain("c.yaml", "data.body.depth=18", "data.body=resnet")["data"]["body"] == {"depth": 18}
        assert load_use("data.body.depth=18", "data.body=resnet") == "resnet"

    def test_what_is_removed_or_replaced_last_is_gone(self):
        assert "optimizer" not in plain("c.yaml", "optimizer.eps=1", "optimizer=null")
        assert plain("c.yaml", "data.sizes.0=1", "data.sizes=[3]")["data"]["sizes"] == [3]
        assert plain("c.yaml", "run.x=1", "run.x=2")["run"]["x"] == 2

    @pytest.mark.parametrize("text", ["a." * 5000 + "b=1", "x=" + "[" * 60 + "]" * 60])
    def test_one_that_is_nested_without_end(self, text: str):
        assert "nested more than 50 deep" in refusal("c.yaml", text)

    @pytest.mark.parametrize("text", ["a\udcff.b=1", "a.b=\udcff", "run.x\x1b[2J=1 2 3: {"])
    def test_what_a_terminal_obeys_or_cannot_show(self, text: str):
        with pytest.raises(ConfigError) as caught:
            load("c.yaml", [text])
        assert all(char.isprintable() or char in "\n\t" for char in str(caught.value))

    def test_null_or_nothing_removes_a_plugin(self):
        assert "optimizer" not in plain("c.yaml", "optimizer=null")
        assert "optimizer" not in plain("c.yaml", "optimizer=")

    def test_another_use_drops_the_other_options(self):
        assert plain("c.yaml", "optimizer.use=adam")["optimizer"] == {"use": "adam"}
        assert plain("c.yaml", "optimizer.use=adam", "optimizer.eps=1")["optimizer"] == {"use": "adam", "eps": 1}
        assert plain("c.yaml", "data.steps.0.use=crop")["data"]["steps"][0] == {"use": "crop"}

    def test_later_ones_win(self):
        assert plain("c.yaml", "run.seed=1", "run.seed=2")["run"]["seed"] == 2

    def test_they_are_applied_before_interpolation(self):
        assert plain("c.yaml", "a.b=${run.seed}", "run.seed=7")["a"]["b"] == 7

    def test_values_know_that_they_come_from_the_command_line(self):
        root = compose("c.yaml", ["optimizer.lr=[1, 2]"])
        where = root.child("optimizer").child("lr").value[1].where
        assert (str(where), where.text) == ("command line:1:14", "optimizer.lr=[1, 2]")
        assert root.child("optimizer").child("use").where.file == "c.yaml"

    @pytest.mark.parametrize("argument", ["optimizer.lr", "=3", ".lr=3", "optimizer..lr=3", "optimizer.=3"])
    def test_what_is_no_override(self, argument: str):
        assert refusal("c.yaml", "run.seed=1", argument) == (
            "command line:1:1: argument 2: expected KEY=VALUE, such as optimizer.lr=0.02"
        )

    def test_a_value_that_is_no_yaml(self):
        message = refusal("c.yaml", "optimizer.lr=[1, 2")
        assert message.startswith("command line:1:19: optimizer.lr: not valid YAML: ")

    def test_a_base_is_for_files(self):
        assert refusal("c.yaml", "base=other.yaml") == (
            "command line:1:1: base: only a config file has bases; write a small one that names both"
        )


class TestNameAlone:
    """`flip` stands for `{use: flip}`, also when an option is put below it."""

    def test_an_override_below_it(self, write: Write):
        write("c.yaml", "data: {steps: [flip], body: resnet}\n")
        root = compose("c.yaml", ["data.steps.0.prob=1", "data.body.depth=18"])
        item, body = root.child("data").child("steps").value[0], root.child("data").child("body")
        assert (item.plain(), item.over.value) == ({"prob": 1}, "flip")
        assert (body.plain(), body.over.value) == ({"depth": 18}, "resnet")

    def test_a_child_below_it(self, write: Write):
        write("a.yaml", "data: {body: resnet}\n")
        write("b.yaml", "base: a.yaml\ndata: {body: {depth: 18}}\n")
        write("c.yaml", "base: b.yaml\ndata: {body: {norm: bn}}\n")
        body = compose("c.yaml").child("data").child("body")
        assert (body.plain(), body.over.value) == ({"depth": 18, "norm": "bn"}, "resnet")
        write("d.yaml", "base: b.yaml\ndata: {body: {use: resnet, norm: bn}}\n")
        assert plain("d.yaml")["data"]["body"] == {"depth": 18, "use": "resnet", "norm": "bn"}
        write("e.yaml", "base: b.yaml\ndata: {body: {use: vgg}}\n")
        assert plain("e.yaml")["data"]["body"] == {"use": "vgg"}


class TestInterpolation:
    def composed(self, write: Write, text: str) -> Any:
        write("c.yaml", text)
        return plain("c.yaml")

    def test_another_value_keeps_its_type_outside_quotes(self, write: Write):
        text = """
        run: {seed: 3}
        a:
          - ${run.seed}
          - '${run.seed}'
          - x${run.seed}y
        """
        assert self.composed(write, text)["a"] == [3, "3", "x3y"]

    def test_maps_lists_and_positions(self, write: Write):
        text = """
        x: {m: {k: [1, 2]}}
        a:
          - ${x.m}
          - ${x.m.k}
          - ${x.m.k.1}
        """
        assert self.composed(write, text)["a"] == [{"k": [1, 2]}, [1, 2], 2]

    def test_a_reference_to_a_reference(self, write: Write):
        text = """
        x:
          a: ${x.b}
          b: ${x.c}
          c: 1.5
        """
        assert self.composed(write, text)["x"]["a"] == 1.5

    def test_booleans_and_null_in_text(self, write: Write):
        assert self.composed(write, "x: {a: true, b: null, t: 'a=${x.a} b=${x.b}'}\n")["x"]["t"] == "a=true b="

    def test_a_dollar_more_is_the_text_itself(self, write: Write):
        made = self.composed(write, "x: {a: 1, b: '$${x.a}', c: 'a $${b} ${x.a} $c $$$${'}\n")
        assert made["x"] == {"a": 1, "b": "${x.a}", "c": "a ${b} 1 $c $$${"}

    def test_it_sees_the_composed_config(self, write: Write):
        write("a.yaml", "run: {seed: 1}\nx: {name: 'run-${run.seed}'}\n")
        assert self.composed(write, "base: a.yaml\nrun: {seed: 2}\n")["x"]["name"] == "run-2"

    def test_the_environment(self, write: Write, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("FOLDER", "/data")
        monkeypatch.setenv("COUNT", "1e-3")
        monkeypatch.delenv("NOTHING", raising=False)
        text = """
        x:
          - ${env:FOLDER}/voc
          - ${env:COUNT}
          - '${env:COUNT}'
          - ${env:NOTHING,5}
          - ${env:NOTHING, a, b}
          - '${env:NOTHING,}'
          - ${env:NOTHING,}
        """
        assert self.composed(write, text)["x"] == ["/data/voc", 0.001, "1e-3", 5, "a, b", "", None]

    def test_an_unset_variable(self, write: Write, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("NOTHING", raising=False)
        write("c.yaml", "x:\n  a: ${env:NOTHING}\n")
        assert refusal("c.yaml") == (
            "c.yaml:2:6: the environment variable NOTHING is not set; set it, or give a default: ${env:NOTHING,default}"
        )

    def test_a_variable_that_is_no_text(self, write: Write, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("BYTES", "\udcff")
        write("c.yaml", "x:\n  a: ${env:BYTES}\n")
        assert refusal("c.yaml") == "c.yaml:2:6: the environment variable BYTES is not UTF-8 text"

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("${run.sed}", "${run.sed}: there is no 'sed', did you mean 'seed'?"),
            ("${rum.seed}", "${rum.seed}: there is no 'rum', did you mean 'run'?"),
            ("${run.seed.x}", "${run.seed.x}: there is no 'x'"),
            ("${run.list.2}", "${run.list.2}: there is no '2'"),
            ("${run.list.-1}", "${run.list.-1}: there is no '-1'"),
            ("${}", "${}: there is no ''"),
            ("a ${run.list}", "${run.list} is a list, not text"),
            ("a ${run}", "${run} is a map, not text"),
            ("${x.a}", "${x.a} refers to itself: x.a -> x.a"),
            ("${run.seed", "a '${' without its '}'; write $${ for the text itself"),
            ("${run.${run.name}}", "a '${' without its '}'; write $${ for the text itself"),
            ("${x}", "${x} refers to itself: x -> x"),
        ],
    )
    def test_what_leads_nowhere(self, write: Write, value: str, message: str):
        write("c.yaml", f"run: {{seed: 1, list: [1, 2], name: seed}}\nx:\n  a: {value}\n")
        assert refusal("c.yaml").startswith(f"c.yaml:3:6: {message}")

    def test_a_circle(self, write: Write):
        write("c.yaml", "x: {a: '${x.b}', b: '${x.a}'}\n")
        assert "refers to itself: x.b -> x.a -> x.b" in refusal("c.yaml")

    def test_a_removed_plugin_cannot_be_referred_to(self, write: Write):
        write("c.yaml", "x: null\ny: {a: '${x.b}'}\n")
        assert "there is no 'x'" in refusal("c.yaml")

    def test_a_bomb(self, write: Write):
        rows = [f"a{n}: '{'${x.a' + str(n + 1) + '}'}{'${x.a' + str(n + 1) + '}'}'" for n in range(40)]
        write("c.yaml", "x:\n  " + "\n  ".join(rows) + "\n  a40: boom\n")
        assert "references to more than 100000 values, or 1000000 characters" in refusal("c.yaml")

    @pytest.mark.parametrize("form", ["[{0}, {0}]", "{{a: {0}, b: {0}}}"])
    def test_a_bomb_of_lists_and_maps(self, write: Write, form: str):
        rows = [f"a{n}:\n    - ${{x.a{n + 1}}}\n    - ${{x.a{n + 1}}}" for n in range(40)]
        write("c.yaml", "x:\n  " + "\n  ".join(rows) + "\n  a40: " + form.format("boom") + "\n")
        assert "references to more than 100000 values" in refusal("c.yaml")

    def test_references_that_nest_what_is_nested(self, write: Write):
        rows = [f"a{n}: {'[' * 40}1{']' * 40}" for n in range(3)]
        write("c.yaml", "x:\n  " + "\n  ".join(rows) + "\n  b:\n    - - - - - - - - - - - - - ${x.a0}\n")
        assert "nested more than 50 deep, once references" in refusal("c.yaml")

    @pytest.mark.parametrize(
        ("reference", "value"),
        [
            ("${run.seed}", 0),
            ("${run.work_dir}", "runs/default"),
            ("${sizes.side}", 64),
            ("${sizes.items}", [1, 2]),
            ("${sizes.items.1}", 2),
            ("${other.side}", 64),
            ("${outer.part.side}", 64),
        ],
    )
    def test_a_default_that_no_file_gives(
        self, write: Write, plant: Callable[..., Path], reference: str, value: object
    ):
        source = """
            from detkernel import plugin, option
            @plugin
            class Sizes:
                '''Has defaults.'''
                side: int = option(default=64, help="pixels")
                items: list[int] = option(factory=lambda: [1, 2], help="some")
        """
        plant("sizes", {"sizes.py": source}, plugins={"sizes": "sizes:Sizes"})
        text = "run: {until: 1 iters}\nsizes: {}\nother: {use: sizes}\nouter: {part: {use: sizes}}\nx:\n  a: "
        write("c.yaml", text + reference)
        assert plain("c.yaml")["x"]["a"] == value
        write("c.yaml", text + "${sizes.sid}")
        assert "there is no 'sid'" in refusal("c.yaml")

    def test_one_that_is_used_a_thousand_times_is_resolved_once(self, write: Write):
        write("c.yaml", "x: {a: 3}\ny:\n" + "  - ${x.a}\n" * 1000)
        assert plain("c.yaml")["y"] == [3] * 1000

    def test_a_long_chain(self, write: Write):
        rows = [f"a{n}: ${{x.a{n + 1}}}" for n in range(2000)]
        write("c.yaml", "x:\n  " + "\n  ".join(rows) + "\n  a2000: end\n")
        assert "more than 50 references that lead on to each other" in refusal("c.yaml")


def test_a_missing_config(folder: Path):
    assert refusal("c.yaml") == "c.yaml: no such file"


def test_several_problems_of_reading_are_one_at_a_time(write: Write):
    write("c.yaml", "a: 1\na: 2\nb: [\n")
    with pytest.raises(ConfigError) as caught:
        compose("c.yaml")
    assert len(caught.value.problems) == 1


class TestConfigsInOtherFiles:
    READER = """
        import json
        def read(path):
            return json.loads(path.read_text())["config"]
    """

    @pytest.fixture(autouse=True)
    def _reader(self, plant: Callable[..., Path]) -> None:
        plant("boxed", {"boxed.py": self.READER}, configs={"box": "boxed:read"})

    def test_one_is_read_as_a_file_would_be(self, write: Write):
        write("a.box", '{"config": {"x": {"name": "${y.z}", "n": 1e-3}, "y": {"z": null}}}')
        assert plain("a.box", "x.n=2") == {"x": {"name": "${y.z}", "n": 2}, "y": {"z": None}}
        write("c.yaml", "base: a.box\nx: {n: 3}\n")
        assert plain("c.yaml")["x"]["n"] == 3

    def test_it_refers_to_nothing_outside(self, write: Write):
        write("a.box", '{"config": {"base": "b.yaml"}}')
        assert refusal("a.box") == "a.box:1:7: base: a config inside another file is whole, it has no base"
        write("a.box", '{"config": {"x": {"name": "${env:HOME}"}}}')
        assert plain("a.box") == {"x": {"name": "${env:HOME}"}}

    @pytest.mark.parametrize("held", ["[1]", '{"x": ' * 60 + "1" + "}" * 60, '{"x": "\\u0000"}', "null", "3"])
    def test_what_is_no_config(self, write: Write, held: str):
        write("a.box", f'{{"config": {held}}}')
        assert refusal("a.box").startswith("a.box")

    def test_it_runs_no_code_from_a_file_unless_the_user_names_it(self, write: Write):
        source = """
            from detkernel import plugin
            print("it ran")
            @plugin
            class Mine:
                '''Runs when it is imported.'''
        """
        mine = write("mine.py", source)
        run = '"run": {"until": "1 iters"}'
        write("a.box", f'{{"config": {{{run}, "mine": {{"use": "{mine}:Mine"}}}}}}')
        with pytest.raises(ConfigError) as caught:
            load("a.box", ["run.work_dir=w"])
        [problem] = caught.value.problems
        assert problem.path == "mine.use"
        assert problem.message.endswith(f"where you trust that file, name it yourself: mine.use={mine}:Mine")
        assert list(load("a.box", ["run.work_dir=w", f"mine.use={mine}:Mine"]).plugins) == ["mine"]
        write("b.box", f'{{"config": {{{run}, "{mine}:Mine": {{}}}}}}')
        with pytest.raises(ConfigError, match="may not run code from a file"):
            load("b.box", ["run.work_dir=w"])

    WRITER = """
        from pathlib import Path
        from detkernel import plugin, option
        @plugin
        class Writer:
            '''Writes.'''
            save: Path | None = option(default=None, output=True, help="where it writes")
            more: list[str] = option(factory=list, output=True, help="where it writes, too")
            read: Path | None = option(default=None, help="where it reads")
    """

    @pytest.fixture
    def _writer(self, plant: Callable[..., Path]) -> None:
        plant("writer", {"writer.py": self.WRITER}, plugins={"writer": "writer:Writer"})

    def boxed(self, write: Write, path: str, options: str, work_dir: str = "w") -> None:
        config = f'"run": {{"until": "1 iters", "work_dir": "{work_dir}"}}, "writer": {{{options}}}'
        write(path, f'{{"config": {{{config}}}}}')

    @pytest.mark.usefixtures("_writer")
    @pytest.mark.parametrize("place", ["/etc/x", "~/.bashrc", "~root/x", "../x", "a/../../x", "..", "//x"])
    @pytest.mark.parametrize("form", ['"save": "{}"', '"more": ["a.json", "{}"]'])
    def test_it_writes_nowhere_but_below_the_work_dir_unless_the_user_names_it(
        self, write: Write, place: str, form: str
    ):
        self.boxed(write, "a.box", form.format(place))
        option = "more.1" if "more" in form else "save"
        with pytest.raises(ConfigError) as caught:
            load("a.box", ["run.work_dir=mine"])
        [problem] = caught.value.problems
        assert problem.path == f"writer.{option}"
        assert problem.message.endswith(f"name it yourself: writer.{option}={place}")
        trusted = load("a.box", ["run.work_dir=mine", f"writer.{option}={place}"])
        assert place.rpartition("/")[2] in str(trusted.plain["writer"])
        assert load("a.box", writes=False).plugins, "to look at it is safe"
        write("c.yaml", f"base: a.box\nrun: {{work_dir: mine}}\nwriter: {{{option.partition('.')[0]}: null}}\n")
        with pytest.raises(ConfigError) if "more" in form else nullcontext():  # a list is not null
            load("c.yaml")

    @pytest.mark.usefixtures("_writer")
    def test_it_may_write_below_the_work_dir_and_read_anywhere(self, write: Write):
        self.boxed(write, "a.box", '"save": "sub/found.json", "more": ["a..b", "x~"], "read": "/data/x"')
        assert load("a.box", ["run.work_dir=mine"]).plain["writer"]["save"] == "sub/found.json"

    @pytest.mark.usefixtures("_writer")
    def test_its_work_dir_is_taken_only_where_the_file_lies_in_it(self, write: Write, folder: Path):
        for path, work_dir in (("w/checkpoints/a.box", "w"), ("w/checkpoints/a.box", f"{folder}/w"), ("w/a.box", "w")):
            self.boxed(write, path, "", work_dir)
            with pytest.raises(ConfigError, match="does not lie in"):
                load(path)  # as for a home folder with a downloaded file in it
            write("w/config.yaml", "")
            assert str(load(path).options.work_dir) == work_dir
            (folder / "w/config.yaml").unlink()
        write("w/config.yaml", "")
        write("other/config.yaml", "")
        for path, work_dir in (("a.box", "w"), ("w/a.box", "other"), ("w/a.box", "w/checkpoints"), ("a.box", "~")):
            self.boxed(write, path, "", work_dir)
            with pytest.raises(
                ConfigError, match=r"say where the results of this run go: run.work_dir=FOLDER"
            ) as caught:
                load(path)
            assert [problem.path for problem in caught.value.problems] == ["run.work_dir"]
            assert str(load(path, ["run.work_dir=mine"]).options.work_dir) == "mine"
        self.boxed(write, "w/checkpoints/a.box", "", "moved")
        with pytest.raises(ConfigError, match=r"run\.work_dir=FOLDER, or run\.work_dir=w to go on where it lies"):
            load("w/checkpoints/a.box")
        write("none.box", '{"config": {"run": {"until": "1 iters"}}}')
        with pytest.raises(ConfigError, match=r"run\.work_dir=FOLDER"):
            load("none.box")

    @pytest.mark.parametrize("suffix", ["yaml", "yml", "YAML"])
    def test_no_distribution_reads_yaml_in_the_place_of_the_kernel(
        self, plant: Callable[..., Path], write: Write, suffix: str
    ):
        plant("taker", {"taker.py": self.READER}, configs={suffix: "taker:read"})
        write(f"c.{suffix}", "x: {a: 1}\n")
        assert plain(f"c.{suffix}") == {"x": {"a": 1}}

    def test_shared_lists_have_an_end(self, plant: Callable[..., Path], write: Write):
        source = """
            def read(path):
                x = [1] if path.stem == "lists" else {"a": "x" * 1000}
                for _ in range(40):
                    x = [x, x] if path.stem == "lists" else {"a": x, "b": x}
                return {"x": x}
        """
        plant("dag", {"dag.py": source}, configs={"dag": "dag:read"})
        for name in ("lists.dag", "maps.dag"):
            write(name, "")
            assert "what it holds is not a config: more than 100000 values, or 1000000 characters" in refusal(name)
