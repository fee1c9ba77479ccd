import contextlib
import io
import math

import numpy as np
import pytest
from detkernel_report.metrics import best_threshold, curves, matched
from detkernel_report.mistakes import chosen, confusion, find_mistakes, image_scores
from detkernel_report.results import results_of, rows
from report_cases import image, random_results, results


def coco(given):
    """pycocotools' precision and recall [T, A, K, ...] of the same images."""
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    evaluation = cocoeval.COCOeval(iouType="bbox")
    evaluation.params.imgIds = list(range(len(given.images)))
    evaluation.params.catIds = list(range(len(given.classes)))

    def prepare():
        evaluation._gts, evaluation._dts = {}, {}
        number = 0
        for at, one in enumerate(given.images):
            for label in range(len(given.classes)):
                truths, found = [], []
                for place in np.flatnonzero(one.labels == label):
                    x1, y1, x2, y2 = one.boxes[place]
                    number += 1
                    truths.append(
                        {"id": number, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": one.area[place],
                         "iscrowd": int(one.crowd[place]), "ignore": int(one.ignore[place])}
                    )  # fmt: skip
                for place in np.flatnonzero(one.found_labels == label):
                    x1, y1, x2, y2 = one.found_boxes[place]
                    number += 1
                    found.append(
                        {"id": number, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": one.scores[place],
                         "area": (x2 - x1) * (y2 - y1)}
                    )  # fmt: skip
                evaluation._gts[at, label], evaluation._dts[at, label] = truths, found

    evaluation._prepare = prepare
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    found = (evaluation.eval[name] for name in ("precision", "recall"))
    return tuple(np.where(values < 0, np.nan, values)[..., -1] for values in found)


@pytest.mark.parametrize("seed", range(4))
def test_precision_and_recall_are_those_of_pycocotools(seed):
    given = random_results(seed)
    precision, recall = coco(given)  # [T, R, K, A], [T, K, A]
    found = curves(matched(given))
    np.testing.assert_allclose(found.precision, precision.transpose(0, 3, 2, 1), atol=1e-12)
    np.testing.assert_allclose(found.recall, recall.transpose(0, 2, 1), atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_one_overlap_and_all_sizes_are_matched_alike(seed):
    given = random_results(seed)
    every, once = matched(given), matched(given, (0.5,), ("all",))
    assert (once.hit[0, 0] == every.hit[0, 0]).all()
    assert (once.ignored[0, 0] == every.ignored[0, 0]).all()
    assert (once.truth == every.truth).all()


def test_a_crowd_is_matched_often_and_counts_for_nothing():
    given = results(
        image(0, [(0, 0, 50, 50), (60, 60, 80, 80)], [0, 0],
              [(0, 0, 20, 20, 0.9, 0), (20, 20, 40, 40, 0.8, 0), (60, 60, 80, 80, 0.7, 0)], crowd=[0])
    )  # fmt: skip
    found = matched(given)
    assert found.positives[0].tolist() == [1, 0]
    assert found.ignored[0, 0].tolist() == [True, True, False]
    assert curves(found).ap[0, 0, 0] == 1
    assert math.isnan(curves(found).ap[0, 0, 1])


BOX = (10, 10, 30, 30)


@pytest.mark.parametrize(
    ("found", "kinds", "missed"),
    [
        ([(*BOX, 0.9, 0)], ["right"], 0),
        ([(*BOX, 0.9, 1)], ["class"], 0),
        ([(20, 10, 40, 30, 0.9, 0)], ["location"], 0),  # IoU 1/3
        ([(20, 10, 40, 30, 0.9, 1)], ["both"], 1),
        ([(70, 70, 90, 90, 0.9, 0)], ["background"], 1),
        ([(*BOX, 0.9, 0), (*BOX, 0.8, 0)], ["right", "duplicate"], 0),
        ([], [], 1),
    ],
)
def test_every_mistake_has_its_kind_and_a_missed_object_is_one_that_nothing_meant(found, kinds, missed):
    given = results(image(0, [BOX], [0], found))
    made = find_mistakes(given, matched(given))
    assert made.kinds == kinds
    assert len(made.missed) == missed


def test_what_a_kind_costs_is_what_ap_gains_without_it():
    given = results(
        image(0, [BOX, (50, 50, 70, 70)], [0, 0], [(*BOX, 0.9, 0), (60, 50, 80, 70, 0.8, 0), (0, 80, 9, 99, 0.95, 0)])
    )
    made = find_mistakes(given, matched(given))
    assert made.kinds == ["background", "right", "location"]
    # of 2 objects 1 is found behind an invented one: precision 1/2 up to recall 1/2
    assert made.ap == pytest.approx(0.5 * 51 / 101)
    assert made.ap + made.cost["background"] == pytest.approx(51 / 101)
    # the object that was nearly found is found too: 2 of 2 at precision 2/3
    assert made.ap + made.cost["location"] == pytest.approx(2 / 3)
    assert made.cost["class"] == made.cost["duplicate"] == made.cost["missed"] == 0


def test_ignored_objects_are_neither_missed_nor_mistaken():
    given = results(image(0, [BOX], [0], [(*BOX, 0.9, 0)], ignore=[0]))
    made = find_mistakes(given, matched(given))
    assert made.kinds == ["ignored"]
    assert not made.missed
    assert confusion(given, 0.5).counts.sum() == 0


def test_the_confusion_matrix_pairs_objects_with_what_they_were_taken_for():
    given = results(
        image(0, [BOX, (50, 50, 70, 70), (0, 60, 20, 80)], [0, 1, 1],
              [(*BOX, 0.9, 1), (50, 50, 70, 70, 0.8, 1), (80, 0, 99, 20, 0.7, 0), (0, 60, 20, 80, 0.1, 1)])
    )  # fmt: skip
    assert confusion(given, 0.5).counts.tolist() == [[0, 1, 0], [0, 1, 1], [1, 0, 0]]


def test_the_best_threshold_is_that_of_the_greatest_f1():
    given = results(
        image(0, [BOX, (50, 50, 70, 70)], [0, 0],
              [(*BOX, 0.9, 0), (50, 50, 70, 70, 0.6, 0), (0, 80, 9, 99, 0.3, 0), (80, 80, 90, 99, 0.2, 0)])
    )  # fmt: skip
    best = best_threshold(matched(given))
    assert (best.score, best.precision, best.recall, best.f1) == (0.6, 1, 1, 1)
    assert math.isnan(best_threshold(matched(given), label=1).score)


def test_images_are_sorted_from_the_worst_to_the_best():
    given = results(
        image(0, [BOX], [0], [(*BOX, 0.9, 0)]),
        image(1, [BOX, (50, 50, 70, 70)], [0, 0], []),
        image(2, [BOX, (50, 50, 70, 70)], [0, 0], [(*BOX, 0.9, 0), (0, 80, 9, 99, 0.9, 0)]),
        image(3),
    )
    scores = image_scores(given, matched(given), 0.5)
    assert [one.at for one in scores] == [1, 2, 3, 0]
    assert [(one.right, one.wrong, one.missed) for one in scores] == [(0, 0, 2), (1, 1, 1), (0, 0, 0), (1, 0, 0)]
    worst, best = chosen(scores, 3)
    assert [one.at for one in worst] == [1, 2]
    assert [one.at for one in best] == [0]


def test_results_survive_their_file():
    given = random_results(0)
    again = results_of(list(rows(given)))
    np.testing.assert_allclose(curves(matched(again)).ap, curves(matched(given)).ap, atol=1e-9)
    assert [one.crowd.tolist() for one in again.images] == [one.crowd.tolist() for one in given.images]
    assert [one.ignore.tolist() for one in again.images] == [one.ignore.tolist() for one in given.images]


@pytest.mark.parametrize(
    "change",
    [
        {"labels": [7]}, {"labels": []}, {"boxes": [[0, 0, 1]]}, {"boxes": "x"}, {"scores": [0.5, 0.4]}, {"crowd": [3]},
        {"height": 0}, {"height": True}, {"found": [[0, 0, float("inf"), 1]]}, {"id": None}, {"file": 3},
    ],
)  # fmt: skip
def test_a_file_with_nonsense_is_an_error_and_not_a_crash(change):
    head, line = rows(results(image(0, [BOX], [0], [(*BOX, 0.9, 0)])))
    with pytest.raises((ValueError, TypeError, IndexError)):
        results_of([head, line | change])
