"""Data sets made of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import DataError, option, plugin
from detkernel_data.shapes import Shapes
from detkernel_data.wrappers import Concat, Repeat, Subset
from detkernel_detection import Dataset
from detkernel_detection.testing import DatasetContract, TinyDataset

Refusal = Callable[[Dataset], str]


def shapes(*kinds: str, size: int = 4, split: str = "train") -> Shapes:
    return Shapes(size=size, side=32, sizes=(6, 12), split=split, kinds=kinds or ("circle", "square"))  # type: ignore[arg-type]


def loaded(dataset: Dataset) -> Dataset:
    dataset.load()
    return dataset


def names(dataset: Dataset, index: int) -> list[str]:
    return [dataset.classes[label] for label in dataset.annotations(index).labels]


class TestContract(DatasetContract):
    def dataset(self) -> Dataset:
        both = Concat(datasets=[shapes(), shapes("square", "circle", split="val")])
        return Subset(dataset=Repeat(dataset=both, times=2), fraction=0.5)


def test_concat_matches_classes_by_name() -> None:
    train, val = loaded(shapes()), loaded(shapes("square", "circle", split="val", size=3))
    both = loaded(Concat(datasets=[shapes(), shapes("square", "circle", split="val", size=3)]))
    assert both.classes == ("circle", "square")
    assert len(both) == 7
    assert [names(both, index) for index in range(7)] == [
        *(names(train, index) for index in range(4)),
        *(names(val, index) for index in range(3)),
    ]
    assert torch.equal(both.image(4), val.image(0))
    assert torch.equal(both.image(-1), val.image(2))
    assert both.annotations(4).masks == val.annotations(0).masks
    with pytest.raises(IndexError):
        both.annotations(7)


def test_concat_with_class_names_may_join_what_differs() -> None:
    both = loaded(Concat(datasets=[shapes("circle"), shapes("cross")], class_names=["cross", "circle"]))
    assert both.classes == ("cross", "circle")
    assert set(names(both, 0)) == {"circle"}
    assert set(names(both, 4)) == {"cross"}


def test_concat_keeps_ids_apart() -> None:
    both = loaded(Concat(datasets=[shapes(size=2), shapes(size=2)]))
    assert [both.annotations(index).image_id for index in range(4)] == ["0/0", "0/1", "1/0", "1/1"]
    alone = loaded(Concat(datasets=[shapes(size=2)]))
    assert [alone.annotations(index).image_id for index in range(2)] == [0, 1]


def test_concat_passes_notes_on() -> None:
    both = loaded(Concat(datasets=[shapes(), Subset(dataset=shapes(), first=3)]))
    assert list(both.notes) == ["data set 1: 3 of 4 images"]


def test_concat_of_other_classes(refusal: Refusal) -> None:
    assert refusal(Concat(datasets=[shapes(), shapes("circle", "cross")])) == (
        "concat: data sets 0 and 1 differ in the classes 'cross', 'square'; give `class_names` here "
        "if objects of a class really cannot be in one of them, or fix the data"
    )
    assert refusal(Concat(datasets=[shapes(), shapes("cross")], class_names=["circle", "square", "cros"])) == (
        "concat: `class_names`: no data set has 'cros', did you mean 'cross'?"
    )
    assert refusal(Concat(datasets=[shapes(), shapes("cross")], class_names=["circle", "cross"])) == (
        "concat: `class_names` does not list 'square', which a data set has"
    )


def test_concat_of_other_keypoints(refusal: Refusal) -> None:
    posed = TinyDataset()
    posed.keypoint_names = ("nose",)
    assert refusal(Concat(datasets=[TinyDataset(), posed])) == (
        "concat: the data sets have different keypoints; expected the same in all of them"
    )
    assert loaded(Repeat(dataset=posed, times=2)).keypoint_names == ("nose",)


def test_repeat() -> None:
    thrice = loaded(Repeat(dataset=shapes(size=2), times=3))
    assert len(thrice) == 6
    assert torch.equal(thrice.image(5), thrice.image(1))
    assert [thrice.annotations(index).image_id for index in range(6)] == [0, 1, 0, 1, 0, 1]
    with pytest.raises(IndexError):
        thrice.image(6)


def test_subset_by_number() -> None:
    part = loaded(Subset(dataset=shapes(size=9), first=3))
    assert [part.annotations(index).image_id for index in range(len(part))] == [0, 1, 2]
    assert list(part.notes) == ["3 of 9 images"]


def test_subset_by_fraction_is_drawn_from_the_seed() -> None:
    def ids(**options: Any) -> list[Any]:
        part = loaded(Subset(dataset=shapes(size=100), **options))
        return [part.annotations(index).image_id for index in range(len(part))]

    assert len(ids(fraction=0.1)) == 10
    assert ids(fraction=0.1) == ids(fraction=0.1) == sorted(ids(fraction=0.1))
    assert ids(fraction=0.1) != ids(fraction=0.1, seed=1)
    assert set(ids(fraction=0.1)) < set(ids(fraction=0.2)), "more of it is the same and others"
    assert len(ids(fraction=0.001)) == 1
    assert ids(fraction=1.0) == list(range(100))


def test_subset_by_ids_keeps_the_order_of_the_data() -> None:
    part = loaded(Subset(dataset=shapes(size=9), ids=[7, 2, 2]))
    assert [part.annotations(index).image_id for index in range(len(part))] == [2, 7]


def test_subset_that_cannot_be(refusal: Refusal) -> None:
    assert refusal(Subset(dataset=shapes(), first=5)) == ("subset: `first` is 5, but the data set has 4 images")
    assert refusal(Subset(dataset=shapes(), ids=["1", 9, 2])) == (
        "subset: `ids`: no image has '1', 9; ids are such as 0, 1, 2"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Subset(dataset=shapes()), "expected one of `first`, `fraction`, `ids` and `id_list`, got none"),
        (lambda: Subset(dataset=shapes(), first=1, ids=[1]), "got first and ids"),
        (lambda: Subset(dataset=shapes(), ids=[]), "ids: expected at least one"),
        (lambda: Subset(dataset=shapes(), fraction=1.5), "fraction: expected at most 1, got 1.5"),
        (lambda: Repeat(dataset=shapes(), times=0), "times: expected at least 1, got 0"),
        (lambda: Concat(datasets=[]), "datasets: expected at least one"),
        (lambda: Concat(datasets=[shapes()], class_names=["a", "a"]), "class_names: 'a' is listed twice"),
        (lambda: Concat(datasets=[shapes()], class_names=[]), "class_names: expected at least one class"),
    ],
)
def test_wrong_options(make: Callable[[], Dataset], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_fingerprints() -> None:
    found = [
        loaded(dataset).fingerprint()
        for dataset in (
            Concat(datasets=[shapes(), shapes(split="val")]),
            Concat(datasets=[shapes(split="val"), shapes()]),
            Concat(datasets=[shapes()]),
            Concat(datasets=[shapes()], class_names=["square", "circle"]),
            Repeat(dataset=shapes(), times=2),
            Repeat(dataset=shapes(), times=3),
            Subset(dataset=shapes(), first=2),
            Subset(dataset=shapes(), first=3),
            Subset(dataset=shapes(), ids=[0, 3]),
        )
    ]
    assert len(set(found)) == len(found)
    assert loaded(Subset(dataset=shapes(), ids=[1, 0])).fingerprint() == found[6], "the same images, chosen otherwise"


def test_those_that_are_not_loaded_are_empty() -> None:
    made = [Concat(datasets=[shapes()]), Subset(dataset=shapes(), first=1)]
    assert [len(dataset) for dataset in made] == [0, 0]


def test_category_ids_reach_through_wrappers_and_processes() -> None:
    import pickle

    from detkernel_data.loading.build import Relabelled

    @plugin
    class Numbered(TinyDataset):
        """Classes with numbers of their own."""

        first: int = option(default=7, help="number of the first class")

        def load(self) -> None:
            super().load()
            self.category_ids = {name: self.first + 10 * n for n, name in enumerate(self.classes)}

    wanted = {"red": 7, "green": 17, "blue": 27}
    for dataset in (
        Repeat(dataset=Numbered(), times=2),
        Subset(dataset=Numbered(), first=2),
        Concat(datasets=[Numbered()]),
    ):
        dataset.load()
        assert dataset.category_ids == wanted
    assert Relabelled(dataset, ("blue", "red", "green")).category_ids == wanted
    joined = Concat(datasets=[Numbered(), Numbered(first=1)])
    joined.load()
    assert joined.category_ids == {}  # they contradict each other
    plain = Repeat(dataset=TinyDataset(), times=2)
    plain.load()
    assert pickle.loads(pickle.dumps(plain)).category_ids == {}


def test_a_subset_of_the_ids_in_a_list(here: Path) -> None:
    (here / "ids.txt").write_text("2\n\n0\n")
    dataset = loaded(Subset(dataset=TinyDataset(size=4), id_list=Path("ids.txt")))
    assert [dataset.annotations(index).image_id for index in range(len(dataset))] == [0, 2]
    (here / "ids.txt").write_text("2\n9\n")
    with pytest.raises(DataError, match=r"ids.txt:2: no image has the id '9'; ids are such as 0, 1, 2"):
        Subset(dataset=TinyDataset(size=4), id_list=Path("ids.txt")).load()
    (here / "ids.txt").write_text("\n")
    with pytest.raises(DataError, match=r"ids.txt: there is no id in this list"):
        Subset(dataset=TinyDataset(size=4), id_list=Path("ids.txt")).load()
    with pytest.raises(DataError, match=r"none.txt: the list of image ids cannot be read \(No such file"):
        Subset(dataset=TinyDataset(size=4), id_list=Path("none.txt")).load()
