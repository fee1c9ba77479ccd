"""Weights from any file into a model: tensors by their names, class outputs by the names of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detkernel import CheckpointError, UserError
from detkernel_detection.class_mapping import ClassOutput, map_classes
from detkernel_detection.weights import load_into, read_weights
from torch import nn


class Detector(nn.Module):
    """A body with batch norm, and a linear head over classes."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, classes)
        self.class_outputs: Any = {"head.weight": {}, "head.bias": ClassOutput()}


class Odd:
    """An object of another framework."""


NAMES = ("cat", "dog", "cow")
FORMS = {
    "ours": lambda state: {"model": state, "classes": list(NAMES)},
    "module.": lambda state: {"model": {f"module.{key}": value for key, value in state.items()}, "classes": NAMES},
    "one without": lambda state: {
        "model": {f"module.{key}" if n else key: value for n, (key, value) in enumerate(state.items())},
        "classes": NAMES,
    },
    "compiled": lambda state: {"model": {f"_orig_mod.{key}": value for key, value in state.items()}, "classes": NAMES},
    "MMDetection 2": lambda state: {"state_dict": state, "meta": {"CLASSES": NAMES, "epoch": 3}},
    "MMDetection 3": lambda state: {
        "state_dict": state, "meta": {"dataset_meta": {"classes": NAMES}}, "message_hub": {"log": Odd()},
        "best": np.float64(0.5),
    },
    "Lightning": lambda state: {
        "state_dict": {f"model.{key}": value for key, value in state.items()}, "names": dict(enumerate(NAMES)),
        "hyper_parameters": Odd(),
    },
    "another key": lambda state: {"model_state": state, "iteration": 7, "classes": NAMES},
    "half": lambda state: {"net": {key: value.half() for key, value in state.items()}, "classes": NAMES},
    "without counters": lambda state: {
        "model": {key: value for key, value in state.items() if "num_batches" not in key}, "classes": NAMES
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_the_forms_of_many_frameworks(form: str, tmp_path: Path):
    source, model = Detector(), Detector()
    torch.save(FORMS[form](source.state_dict()), tmp_path / "w.pt")
    weights = read_weights(tmp_path / "w.pt")
    assert weights.classes == NAMES
    loaded = load_into(model, weights, ("cow", "cat", "dog"))
    assert loaded.classes is not None
    assert loaded.classes.taken == ("cow", "cat", "dog")
    for name, value in source.state_dict().items():
        wanted = value[[2, 0, 1]] if name.startswith("head") else value
        if "num_batches" not in name:
            torch.testing.assert_close(model.state_dict()[name], wanted, rtol=1e-3, atol=1e-3)


def test_two_models_in_a_file_are_not_guessed_between(tmp_path: Path):
    state = Detector().state_dict()
    both = {f"{who}.{key}": value for who in ("student", "teacher") for key, value in state.items()}
    torch.save({"model": both, "classes": NAMES}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"holds several models, 'student\.' and 'teacher\.': save one alone"):
        load_into(Detector(), read_weights(tmp_path / "w.pt"), NAMES)


def test_tensors_that_would_lose_their_values_do_not_fit(tmp_path: Path):
    state = Detector().state_dict()
    state["body.0.bias"] = state["body.0.bias"].to(torch.complex64)
    state["body.1.bias"] = state["body.1.bias"].to_sparse()
    torch.save({"model": state, "classes": NAMES}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as caught:
        load_into(Detector(), read_weights(tmp_path / "w.pt"), NAMES, allow_mismatch=False)
    assert "1 not plain tensors: body.1.bias" in str(caught.value)
    assert "1 of another type: body.0.bias torch.complex64, expected torch.float32" in str(caught.value)


LAYOUTS = [
    ClassOutput(),
    ClassOutput(background="first"),
    ClassOutput(background="last"),
    ClassOutput(before=3),
    ClassOutput(before=3, background="first"),
    ClassOutput(after=4, background="last"),
    ClassOutput(before=3, skip=5),
    ClassOutput(before=2, skip=1, after=2, background="first", dim=1),
]


def filled(output: ClassOutput, names: tuple[str, ...]) -> torch.Tensor:
    """A tensor in which every entry says whose it is: of a class, of the background (900) or of neither (below 0)."""
    numbers = {"first": [900], "none": [], "last": []}[output.background] + [float(sum(map(ord, n))) for n in names]
    numbers += [900.0] if output.background == "last" else []
    rows: list[float] = []
    for block in range(output.before):
        rows += [-1.0 - number - 10 * block for number in range(output.skip)]
        rows += [number + 1000 * block + 10_000 * part for number in numbers for part in range(output.after)]
    vector = torch.tensor(rows)
    return vector.expand(2, -1).clone() if output.dim else vector[:, None].expand(-1, 2).clone()


@pytest.mark.parametrize("output", LAYOUTS, ids=str)
@pytest.mark.parametrize("names", [("cow", "cat", "dog"), ("dog",), ("elk", "dog", "fox", "cat"), ("elk",)])
def test_every_layout_of_classes(output: ClassOutput, names: tuple[str, ...]):
    own = filled(output, names) + 0.5
    moved, mapped = map_classes({"w": own}, {"w": output}, {"w": filled(output, NAMES)}, NAMES, names)
    wanted = filled(output, names)
    new = {float(sum(map(ord, name))) for name in names if name not in NAMES}
    here = moved["w"]
    random = torch.tensor([[any((v - n) % 1000 == 0 and v > 0 for n in new) for v in row] for row in wanted.tolist()])
    assert torch.equal(here, torch.where(random, own, wanted))
    assert mapped.taken == tuple(name for name in names if name in NAMES)
    assert mapped.left == tuple(name for name in NAMES if name not in names)


def test_names_that_count_the_background_and_those_of_no_class():
    """As torchvision's 91 do."""
    names = ("__background__", "cat", "N/A", "dog", "N/A")
    weights = {"w": torch.arange(5.0)}
    for background, own, expected in (("first", 3, [0, 3, 1]), ("none", 2, [3, 1])):
        output = ClassOutput(background=background)
        found, mapped = map_classes({"w": torch.zeros(own)}, {"w": output}, weights, names, ("dog", "cat"))
        assert found["w"].tolist() == expected
        assert mapped.left == ()


@pytest.mark.parametrize(
    ("background", "names", "expected"),
    [
        ("last", ("__background__", "cat", "dog"), [3, 2, 1]),  # counted: wherever they say
        ("last", ("cat", "dog", "background"), [2, 1, 3]),
        ("last", ("cat", "dog"), [3, 2, 1]),
        ("first", ("cat", "dog"), [1, 3, 2]),
        ("none", ("cat", "dog"), [3, 2]),  # an output of the background that the model does not have
        ("none", ("cat", "dog", "cow"), [2, 1]),
    ],
)
def test_weights_whose_background_is_first_for_a_model_that_has_it_elsewhere(background, names, expected):
    output, own = ClassOutput(background=background), torch.zeros(len(expected))
    weights = {"w": torch.tensor([1.0, 2.0, 3.0])}
    found, _ = map_classes({"w": own}, {"w": output}, weights, names, ("dog", "cat"), background_first=True)
    assert found["w"].tolist() == expected


def test_a_class_may_be_called_background():
    output = ClassOutput(background="first")
    weights = {"w": torch.arange(3.0)}
    names = ("background", "cat")
    found, _ = map_classes({"w": torch.zeros(3)}, {"w": output}, weights, names, ("cat", "background"))
    assert found["w"].tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"head.weight": {"befor": 2}}, r"Detector\.class_outputs: expected a dict of ClassOutput, or of its fields"),
        (3, r"Detector\.class_outputs: expected a dict"),
        (
            {"head.weight": {"skip": 2}},
            r"'head\.weight' holds outputs for 3 names as ClassOutput\(.*but its shape is \[3, 4\]",
        ),
    ],
)
def test_what_a_model_says_wrongly_of_its_classes_is_told(said: Any, message: str, tmp_path: Path):
    model = Detector()
    model.class_outputs = said
    torch.save({"model": Detector().state_dict(), "classes": NAMES}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=message):
        load_into(model, read_weights(tmp_path / "w.pt"), ("dog", "cat", "cow"))


class Skeleton(Detector):
    """With a head over keypoints, too."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.points = nn.ConvTranspose2d(4, len(names), 2)
        self.keypoint_names = names
        self.keypoint_outputs: Any = {"points.weight": {"dim": 1}, "points.bias": {}}


def saved_skeleton(path: Path) -> Skeleton:
    source = Skeleton("nose", "left", "right")
    content = {"model": source.state_dict(), "classes": NAMES, "keypoints": list(source.keypoint_names)}
    torch.save(content, path)
    return source


def test_outputs_for_keypoints_are_taken_by_name_too(tmp_path: Path):
    source, model = saved_skeleton(tmp_path / "w.pt"), Skeleton("right", "tail", "nose")
    own = model.points.bias[1].item()
    loaded = load_into(model, read_weights(tmp_path / "w.pt"), NAMES)
    assert model.points.bias.tolist() == [source.points.bias[2].item(), own, source.points.bias[0].item()]
    assert torch.equal(model.points.weight[:, 0], source.points.weight[:, 2])
    assert "keypoint outputs: 2 taken by name (right, nose); 1 at random" in loaded.text
    assert loaded.classes is None


def test_equal_keypoints_are_loaded_without_a_word_and_missing_ones_cannot_be_tested(tmp_path: Path):
    source, same = saved_skeleton(tmp_path / "w.pt"), Skeleton("nose", "left", "right")
    weights = read_weights(tmp_path / "w.pt")
    assert "keypoint outputs" not in load_into(same, weights, NAMES, complete=True).text
    assert torch.equal(same.points.weight, source.points.weight)
    with pytest.raises(CheckpointError, match="no outputs for 1 keypoints of the data: tail; it has nose, left, right"):
        load_into(Skeleton("right", "tail", "nose"), weights, NAMES, complete=True)


@pytest.mark.parametrize(
    ("content", "has"),
    [
        ({}, r"'model'$"),
        ([1, 2], r"'model'$"),
        ({"epoch": 3, "name": "x"}, r"'model'; has only .*epoch.*name"),
        ({"model": {"a": 1}}, r"'model'; has only .*model"),
    ],
)
def test_a_file_without_weights_says_what_it_has(content: object, has: str, tmp_path: Path):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=rf"w\.pt: no weights: expected a dict of tensors, plain or under {has}"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({}, r"are \(3 by their shapes\); the data has 2"),
        ({"head.weight": torch.tensor(1.0), "head.bias": torch.tensor(1.0)}, "are; the data has 2"),
        ({"head.weight": Odd(), "head.bias": Odd()}, "are; the data has 2"),
        ({"head.weight": torch.tensor(1.0)}, r"are \(3 by their shapes\); the data has 2"),
    ],
)
def test_weights_without_class_names_are_told_with_their_count_where_shapes_say_it(
    head: dict[str, Any], said: str, tmp_path: Path
):
    torch.save({**Detector(3).state_dict(), **head}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=rf"does not say of which classes its outputs {said}: a, b"):
        load_into(Detector(2), read_weights(tmp_path / "w.pt"), ["a", "b"])
