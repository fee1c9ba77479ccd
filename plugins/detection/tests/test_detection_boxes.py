"""Arithmetic of boxes, suppression and names of tensors, by numbers worked out by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torchvision
from detkernel_detection import boxes, nms
from detkernel_detection.nms import suppressed
from detkernel_detection.normalize import Normalize
from detkernel_detection.processes import mean_over_processes
from detkernel_detection.weights import Weights, load_into, renamed
from torch import nn

ONE, OTHER, AWAY = (torch.tensor(box) for box in ([0.0, 0, 4, 4], [2.0, 0, 6, 4], [8.0, 0, 12, 4]))


def test_overlaps_of_boxes():
    found = boxes.overlap(ONE, OTHER)
    assert found.iou.item() == pytest.approx(8 / 24)
    assert found.union.item() == 24
    assert boxes.generalized_iou(ONE, OTHER).item() == pytest.approx(8 / 24)  # nothing of the box around is left over
    assert boxes.generalized_iou(ONE, AWAY).item() == pytest.approx(-16 / 48)
    assert boxes.distance_iou(ONE, OTHER).item() == pytest.approx(8 / 24 - 4 / (36 + 16))
    assert boxes.iou_of_all(ONE[None], torch.stack([ONE, OTHER, AWAY])).tolist() == [[1, pytest.approx(1 / 3), 0]]
    own = torch.stack([torch.stack([ONE, AWAY]), torch.stack([OTHER, ONE])])
    assert boxes.iou_of_all(ONE[None, None], own).tolist() == [[[1, 0]], [[pytest.approx(1 / 3), 1]]]
    assert boxes.overlap(ONE, torch.zeros(4)).iou.item() == 0


def test_boxes_are_clipped_to_their_images():
    given = torch.tensor([[[-1.0, -2, 50, 60]], [[5.0, 6, 70, 8]]])
    clipped = boxes.clip(given, torch.tensor([[40, 30], [10, 20]]))
    assert clipped.tolist() == [[[0, 0, 30, 40]], [[5, 6, 20, 8]]]
    assert boxes.clip(given, None) is given


def test_boxes_of_one_class_suppress_each_other():
    given = torch.stack([ONE, OTHER, ONE + 1, AWAY]).expand(2, 4, 4)
    scores = torch.tensor([[0.5, 0.9, 0.8, 0.1]]).expand(2, 4)
    labels = torch.tensor([[0, 0, 1, 0], [1, 1, 1, 1]])
    valid = torch.tensor([[True, True, True, False], [True, True, True, True]])
    found = suppressed(given, scores, labels, valid, 0.3, 3)
    assert found.scores.tolist() == [
        [pytest.approx(0.9), pytest.approx(0.8), 0],
        [pytest.approx(0.9), pytest.approx(0.1), 0],
    ]
    assert found.labels.tolist() == [[0, 1, 0], [1, 1, 0]]
    assert found.valid.tolist() == [[True, True, False]] * 2
    assert found.boxes[1].tolist() == [OTHER.tolist(), AWAY.tolist(), [0] * 4]
    assert suppressed(given, scores, labels, valid, 0.5, 9).valid.sum(1).tolist() == [3, 4]
    assert suppressed(given, scores, labels, valid, 0.5, 9).boxes.shape == (2, 9, 4)


def test_nms_hands_on_further_values_with_the_boxes():
    given = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]]])
    scores, labels, valid = torch.tensor([[0.5, 0.9, 0.7]]), torch.zeros(1, 3).long(), torch.ones(1, 3).bool()
    place = torch.tensor([[7, 8, 9]])
    for most, expected in ((2, [8, 9]), (5, [8, 9, 7, 0, 0])):
        found = suppressed(given, scores, labels, valid, 0.5, most, fields={"place": place})
        assert found.fields is not None
        assert found.fields["place"][0].tolist() == expected
        assert found.valid.sum() == 2
    assert suppressed(given, scores, labels, valid, 0.5, 2).fields is None


@pytest.mark.parametrize("counts", [None, (300, 50, 50)])
def test_suppression_in_rounds_is_that_of_torchvision(counts):
    torch.manual_seed(0)
    corner = torch.rand(3, 400, 2) * 40  # dense: one decides on the next for many in a row
    given = torch.cat([corner, corner + torch.rand(3, 400, 2) * 30], 2)
    scores = torch.rand(3, 400).mul(50).round() / 50  # many are equal
    for start, boxes_of in zip((0, 300, 350), given.split(counts or 400, 1), strict=False):
        boxes_of += start * 10  # in place: apart from the other runs
    for iou in (0.1, 0.5, 0.7):
        kept = nms.in_rounds(given, scores, iou, counts)
        for number in range(3):
            expected = torchvision.ops.nms(given[number], scores[number], iou)
            assert kept[number].nonzero()[:, 0].tolist() == sorted(expected.tolist())


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_suppression_compiles_without_a_break(monkeypatch):
    given = torch.stack([ONE, OTHER, ONE + 1, AWAY]).expand(2, 4, 4)
    rest = (torch.rand(2, 4), torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool), 0.3, 3)
    compiled = torch.compile(suppressed, fullgraph=True, backend="aot_eager")
    expected = suppressed(given, *rest)
    torch.testing.assert_close(tuple(compiled(given, *rest)), tuple(expected))
    monkeypatch.setattr(nms, "_one_by_one", nms.in_rounds)
    torch.compiler.reset()
    torch.testing.assert_close(tuple(compiled(given, *rest)), tuple(expected))


def test_channels_and_units_of_images():
    image = torch.tensor([30, 20, 10], dtype=torch.uint8).view(1, 3, 1, 1)
    found = Normalize((10.0, 10.0, 10.0), (1.0, 2.0, 5.0), unit=1.0, bgr=True)(image)
    assert found.flatten().tolist() == [0, 5, 20]


def test_names_of_others_are_turned_into_the_models():
    pairs = [(r"bbox_head\.cls_(\d)\.", r"head.\1."), (r"bbox_head\.", None)]
    given = {"bbox_head.cls_3.bias": 1, "bbox_head.scale": 2, "backbone.bbox_head.x": 3}
    assert renamed(given, pairs) == {"head.3.bias": 1, "backbone.bbox_head.x": 3}


def test_weights_under_the_names_of_others_are_loaded():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, 1)
            self.key_maps = {"Ours": [(r"other\.", "none.")], "Theirs": [(r"head\.", "fc."), (r"extra", None)]}

    model, theirs = Model(), {"head.weight": torch.tensor([[3.0]]), "head.bias": torch.tensor([4.0])}
    said = load_into(model, Weights({**theirs, "extra": torch.zeros(1)}, "file.pth"))
    assert (model.fc.weight.item(), model.fc.bias.item()) == (3, 4)
    assert "names of Theirs" in said.text
    own = load_into(model, Weights({"fc.weight": torch.tensor([[5.0]]), "fc.bias": torch.tensor([6.0])}, "own.pt"))
    assert model.fc.weight.item() == 5
    assert "names of" not in own.text


def test_a_sum_over_all_processes_counts_at_least_so_much(monkeypatch: pytest.MonkeyPatch):
    assert mean_over_processes(torch.tensor(3.0), 4.0).item() == 4
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: value.add_(5))
    given = torch.tensor(3.0)
    assert mean_over_processes(given).item() == 2
    assert mean_over_processes(given, 20.0).item() == 5
    assert given.item() == 3


def test_lazy_torch_imports_torch_when_it_is_first_asked():
    code = (
        "import sys; from detkernel_detection import lazy_torch, boxes; assert 'torch' not in sys.modules; "
        "lazy_torch.ones; assert 'torch' in sys.modules; assert not hasattr(lazy_torch, '__wrapped__')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
