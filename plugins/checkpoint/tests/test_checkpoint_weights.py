"""Weights from a file: `load_from`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detkernel import CheckpointError, Run, hookimpl, plugin
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_checkpoint.embedded import config
from detkernel_detection.testing import TinyData, TinyDataset, TinyDetector, tiny_kernel, tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tiny_run({"checkpoint": Checkpoint()}, work_dir=folder)
    return folder / "checkpoints" / "iter_4.pt"


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def loaded(
    path: Path, tmp_path: Path, allow: bool = False, load_from_classes: object = None, **plugins: object
) -> dict[str, torch.Tensor]:
    """The model's weights right after loading."""
    found = {}

    @plugin
    class Look:
        """Looks at the model."""

        @hookimpl
        def before_run(self, run: Run) -> None:
            found.update({name: tensor.clone() for name, tensor in run.model.state_dict().items()})
            assert run.iter == 0
            run.stop("seen")

    checkpoint = Checkpoint(load_from=path, allow_mismatch=allow, load_from_classes=load_from_classes, resume="never")
    plugins = {"checkpoint": checkpoint, "look": Look(), **plugins}
    tiny_run(plugins, until="1 iter", seed=5, work_dir=tmp_path / "run")
    return found


@pytest.mark.parametrize("form", ["checkpoint", "plain", "state_dict", "wrapped"])
def test_weights_are_loaded_without_the_position(trained: Path, tmp_path: Path, form: str):
    wanted = weights(trained)
    contents = {
        "plain": wanted,
        "state_dict": {"state_dict": wanted, "meta": {"epoch": 3}},
        "wrapped": {f"module.{name}": tensor for name, tensor in wanted.items()},
    }
    path = trained
    if form != "checkpoint":
        path = tmp_path / "weights.pth"
        torch.save(contents[form], path)
    found = loaded(path, tmp_path, load_from_classes=None if path == trained else "same_order")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_does_not_fit_is_listed(trained: Path, tmp_path: Path):
    changed = weights(trained)
    changed["0.0.weight"] = torch.zeros(9, 3, 3, 3)
    changed["extra"] = torch.zeros(1)
    del changed["3.bias"]
    torch.save({"model": changed, "classes": ["red", "green", "blue"]}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError) as caught:
        loaded(tmp_path / "other.pth", tmp_path)
    text = str(caught.value)
    assert "other.pth: 7 of the model's 9 tensors fit; to load those that fit, set allow_mismatch: true" in text
    assert "  1 of another shape: 0.0.weight [9, 3, 3, 3], expected [8, 3, 3, 3]" in text
    assert "  1 missing: 3.bias" in text
    assert "  1 unexpected: extra" in text


def test_what_fits_is_loaded_when_told(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    changed = {**weights(trained), "0.0.weight": torch.zeros(9, 3, 3, 3)}
    torch.save({"model": changed, "classes": ["red", "green", "blue"]}, tmp_path / "other.pth")
    with caplog.at_level("INFO", "detkernel"):
        found = loaded(tmp_path / "other.pth", tmp_path, allow=True)
    assert torch.equal(found["0.1.weight"], changed["0.1.weight"])
    assert "loaded 8 of 9 tensors from" in caplog.text
    assert "1 of another shape: 0.0.weight" in caplog.text


def test_weights_of_which_none_fits_are_refused_always(tmp_path: Path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="0 of the model's 9 tensors fit; none fits"):
        loaded(tmp_path / "a.pth", tmp_path, allow=True)


@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": 1}}, {}])
def test_a_file_without_weights_is_refused(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: no weights: expected a dict of tensors"):
        loaded(tmp_path / "a.pth", tmp_path)


def test_a_run_that_is_resumed_does_not_load_them_again(trained: Path, tmp_path: Path):
    for _ in range(2):
        run = tiny_run({"checkpoint": Checkpoint(load_from=trained)}, until="8 iters", work_dir=tmp_path)
    trained.rename(trained.with_name("moved.pt"))
    try:
        run = tiny_run({"checkpoint": Checkpoint(load_from=trained)}, until="8 iters", work_dir=tmp_path)
    finally:
        trained.with_name("moved.pt").rename(trained)
    assert run.iter == 8


def data_of(*names: str) -> TinyData:
    """Tiny data whose classes have other names or another order."""

    class Named(TinyDataset):
        def load(self) -> None:
            super().load()
            self.classes = names

    return TinyData(dataset=Named())


def rows(weights: dict[str, torch.Tensor], number: int) -> list[float]:
    """The outputs of TinyDetector for a class: behind the four of the box."""
    return [*weights["3.weight"][4 + number].tolist(), weights["3.bias"][4 + number].item()]


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize(
    "names", [("blue", "red", "green"), ("green",), ("red", "violet", "blue", "green"), ("violet", "rose", "grey")]
)
def test_class_outputs_are_taken_by_name_whatever_their_number_and_order(
    trained: Path, tmp_path: Path, names: tuple[str, ...], allow: bool, caplog: pytest.LogCaptureFixture
):
    """The names of `trained` are red, green, blue."""
    wanted = weights(trained)
    with caplog.at_level("INFO", "detkernel"):
        found = loaded(trained, tmp_path, allow, data=data_of(*names))
    assert torch.equal(found["3.weight"][:4], wanted["3.weight"][:4])
    assert torch.equal(found["0.0.weight"], wanted["0.0.weight"])
    known = ("red", "green", "blue")
    for number, name in enumerate(names):
        if name in known:
            assert rows(found, number) == rows(wanted, known.index(name)), name
        else:
            assert all(rows(found, number) != rows(wanted, other) for other in range(3)), name
    taken, new = ([name for name in names if (name in known) == inside] for inside in (True, False))
    assert not taken or f"{len(taken)} taken by name ({', '.join(taken)})" in caplog.text
    assert not new or f"{len(new)} at random, since the weights do not have them ({', '.join(new)})" in caplog.text
    assert any(record.levelname == "WARNING" for record in caplog.records) == (not taken)


def test_names_that_differ_in_case_are_told(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    loaded(trained, tmp_path, data=data_of("Red", "green", "blue"))
    assert "Names are compared letter by letter: 'Red' is not 'red'" in caplog.text


def test_a_test_takes_classes_by_name_and_wants_all_of_them(trained: Path):
    def outputs(*names: str) -> dict[str, torch.Tensor]:
        kernel = tiny_kernel({"checkpoint": Checkpoint(), "data": data_of(*names)}, work_dir=trained.parents[1])
        return kernel.test().bare_model.state_dict()

    wanted = weights(trained)
    found = outputs("green", "red")
    assert [rows(found, number) for number in range(2)] == [rows(wanted, number) for number in (1, 0)]
    message = (
        r"no outputs for 1 classes of the data: Blue; it has red, green, blue. .*'Blue' is not 'blue'.*load_from_cl"
    )
    with pytest.raises(CheckpointError, match=message):
        outputs("red", "green", "Blue")


@pytest.mark.parametrize("names", [("green", "red", "blue"), ("red", "green")])
def test_a_run_cannot_go_on_with_other_classes_though_changes_are_accepted(
    trained: Path, tmp_path: Path, names: object
):
    """What an optimizer keeps of class outputs goes by position; so the weights may not."""
    plugins = {"checkpoint": Checkpoint(resume=str(trained), accept_changes=True), "data": data_of(*names)}
    message = r"is of the classes red, green, blue; the data has .*resume=never checkpoint\.load_from=.*iter_4\.pt"
    with pytest.raises(CheckpointError, match=message):
        tiny_run(plugins, until="8 iters", work_dir=tmp_path)


def test_weights_without_names_are_refused_unless_it_is_said_whose_they_are(trained: Path, tmp_path: Path):
    wanted = weights(trained)
    torch.save(wanted, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth does not say of which classes its outputs are \(3 by their sha"):
        loaded(tmp_path / "w.pth", tmp_path, allow=True)

    def given(value: object) -> list[list[float]]:
        found = loaded(tmp_path / "w.pth", tmp_path, data=data_of("dog", "cat", "cow"), load_from_classes=value)
        return [rows(found, number) for number in range(3)]

    theirs = [rows(wanted, number) for number in range(3)]
    assert given("same_order") == theirs
    assert given(["cow", "dog", "cat"]) == [theirs[1], theirs[2], theirs[0]]
    assert not any(row in theirs for row in given("none"))
    with pytest.raises(CheckpointError, match=r"said to be of 2 classes \(cow, dog\), but '3\.weight' of shape"):
        given(["cow", "dog"])


def test_a_model_that_does_not_say_what_its_classes_are_is_told_how(trained: Path, tmp_path: Path):
    @plugin
    class Silent(TinyDetector):
        """A detector without `class_outputs`."""

        @hookimpl
        def build_model(self, run: Run) -> torch.nn.Module:
            model = super().build_model(run)
            del model.class_outputs
            return model

    def start(*names: str, **options: object) -> dict[str, torch.Tensor]:
        return loaded(trained, tmp_path, data=data_of(*names), model=Silent(), **options)

    assert torch.equal(start("red", "green", "blue")["3.bias"], weights(trained)["3.bias"])
    for allow in (False, True):
        with pytest.raises(CheckpointError, match=r"classes red, green, blue; the data has blue, .*class_outputs"):
            start("blue", "red", "green", allow=allow)
    assert torch.equal(start("b", "a", "c", load_from_classes="same_order")["3.bias"], weights(trained)["3.bias"])
    assert torch.equal(start("red", "green", allow=True)["0.0.weight"], weights(trained)["0.0.weight"])


def test_the_config_in_a_checkpoint_names_it_as_where_to_go_on(trained: Path, tmp_path: Path):
    kernel = tiny_kernel({"checkpoint": Checkpoint(load_from=trained)}, until="1 iter", work_dir=tmp_path)
    kernel.state.config = {"run": {"until": "1 iters"}, "keep": {"use": "checkpoint", "load_from": str(trained)}}
    kernel.run()
    path = tmp_path / "checkpoints/iter_1.pt"
    assert config(path)["keep"] == {"use": "checkpoint", "load_from": None, "resume": str(path)}
    kernel = tiny_kernel({"checkpoint": Checkpoint()}, until="1 iter", work_dir=tmp_path / "other")
    kernel.state.config = {"run": {"until": "1 iters"}}
    kernel.run()
    with pytest.raises(CheckpointError, match=r"iter_1.pt: holds no config with the checkpoint plugin; give a YAML"):
        config(tmp_path / "other/checkpoints/iter_1.pt")
    (tmp_path / "torn.pt").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"torn.pt: torn"):
        config(tmp_path / "torn.pt")


def test_a_checkpoint_keeps_the_names_of_keypoints_and_a_run_does_not_go_on_with_others(tmp_path: Path):
    class Pointing(TinyDetector):
        names = ("nose", "tail")

        @hookimpl
        def build_model(self, run: Run) -> object:
            model = super().build_model(run)
            model.keypoint_names = self.names
            return model

    tiny_run({"checkpoint": Checkpoint(), "model": Pointing()}, until="2 iters", work_dir=tmp_path)
    path = next((tmp_path / "checkpoints").glob("iter_*.pt"))
    assert torch.load(path, weights_only=True)["keypoints"] == ["nose", "tail"]
    Pointing.names = ("tail", "nose")
    more = {"checkpoint": Checkpoint(accept_changes=True), "model": Pointing()}
    with pytest.raises(CheckpointError, match="is of the keypoints nose, tail; the data has tail, nose"):
        tiny_run(more, until="4 iters", work_dir=tmp_path)
