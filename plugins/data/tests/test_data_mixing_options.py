"""What each option of mosaic, mixup and copy-paste does to images of one colour, against sums done here."""

from types import SimpleNamespace

import pytest
import torch
from detkernel_data.transforms.mixing import CopyPaste, Mixup, Mosaic
from detkernel_detection import Sample, Target

HEIGHT, WIDTH = 48, 64


def plain(value, *boxes, label=0):
    """An image of one value, with objects that fill their boxes."""
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    image = torch.full((HEIGHT, WIDTH, 3), value, dtype=torch.uint8).permute(2, 0, 1)
    labels = torch.full((len(boxes),), label, dtype=torch.int64)
    return Sample(image, Target(torch.tensor(boxes).float().view(-1, 4), labels, masks), 0, 0, (HEIGHT, WIDTH))


def many(transform, own, *others, count=200):
    """What becomes of an image with these others, many times over."""
    torch.manual_seed(0)
    found = []
    for _ in range(count):
        sample, rest = own(), iter(others)
        sample.context = SimpleNamespace(another=lambda rest=rest: next(rest)())
        found.append(transform(sample))
    return found


def white():
    return plain(200)


def black():
    return plain(0)


@pytest.mark.parametrize(
    ("transform", "others"),
    [
        (Mixup(probability=0.25), 1),
        (Mosaic(size=(HEIGHT, WIDTH), probability=0.25), 3),
        (CopyPaste(probability=0.25, scale=(1.0, 1.0)), 1),
    ],
    ids=["mixup", "mosaic", "copy_paste"],
)
def test_as_many_images_are_changed_as_asked_for(transform, others):
    dark = lambda: plain(0, (2, 2, 60, 40))  # noqa: E731
    changed = sum(not torch.equal(one.image, white().image) for one in many(transform, white, *[dark] * others))
    assert 30 < changed < 70


def test_the_share_of_the_image_itself_in_a_mixup_is_drawn_from_its_range():
    shares = [one.image[0, 0, 0].item() / 200 for one in many(Mixup(probability=1, ratio=(0.2, 0.6)), white, black)]
    assert min(shares) == pytest.approx(0.2, abs=0.02)
    assert max(shares) == pytest.approx(0.6, abs=0.02)
    assert sum(shares) / len(shares) == pytest.approx(0.4, abs=0.03)


def colours(*values):
    return [lambda value=value: plain(value) for value in values]


def test_the_four_of_a_mosaic_meet_within_the_range_that_is_asked_for():
    """Each of them is large enough to fill its quarter."""
    own, *others = colours(10, 20, 30, 40)
    found = [one.image[0] for one in many(Mosaic(size=(100, 200), center=(0.3, 0.6), scale=(2.0, 2.0)), own, *others)]
    assert {tuple(one.flatten().unique().tolist()) for one in found} == {(10, 20, 30, 40)}
    assert {tuple(one[[0, 0, -1, -1], [0, -1, 0, -1]].tolist()) for one in found} == {(10, 20, 30, 40)}
    rows, columns = ([int(count) for count in counts] for counts in zip(*map(meeting, found), strict=True))
    assert (min(rows), max(rows)) == (pytest.approx(30, abs=1), pytest.approx(60, abs=1))
    assert (min(columns), max(columns)) == (pytest.approx(60, abs=2), pytest.approx(120, abs=2))


def meeting(one):
    return (one[:, 0] == 10).sum(), (one[0] == 10).sum()


def test_the_images_of_a_mosaic_have_the_sizes_that_are_asked_for_on_the_colour_that_is_asked_for():
    own, *others = colours(10, 20, 30, 40)
    half = {"size": (4 * HEIGHT, 4 * WIDTH), "center": (0.5, 0.5), "fill": (1, 2, 3)}
    one = many(Mosaic(**half, scale=(0.25, 0.25)), own, *others, count=1)[0].image
    for number, value in enumerate((10, 20, 30, 40)):
        assert (one == value).all(0).sum() == HEIGHT * WIDTH
        y, x = (slice(HEIGHT, 2 * HEIGHT), slice(2 * HEIGHT, 3 * HEIGHT))[number // 2], number % 2
        assert bool((one[:, y, (1 + x) * WIDTH : (2 + x) * WIDTH] == value).all()), "at the meeting point"
    rest = (one[0] != 10) & (one[0] != 20) & (one[0] != 30) & (one[0] != 40)
    assert one[:, rest].unique(dim=1).tolist() == [[1], [2], [3]]
    sides = [
        (one.image[0, 2 * HEIGHT - 1] == 10).sum().item()
        for one in many(Mosaic(**half, scale=(0.25, 0.5)), own, *others)
    ]
    assert (min(sides), max(sides)) == (pytest.approx(WIDTH, abs=2), pytest.approx(2 * WIDTH, abs=2))


@pytest.mark.parametrize(("visible", "kept"), [(0.2, True), (0.3, False)])
def test_an_object_of_a_mosaic_keeps_the_share_of_its_box_that_is_asked_for(visible, kept):
    """Of the image, as large as the result, the lower right quarter is seen, and of the object a quarter."""
    own = lambda: plain(9, (22, 18, 42, 30), label=3)  # noqa: E731
    mosaic = Mosaic(size=(4 * HEIGHT, 4 * WIDTH), center=(0.5, 0.5), scale=(1.0, 1.0), visible=visible)
    target = many(mosaic, own, black, black, black, count=1)[0].target
    assert target.labels.tolist() == [3] * kept
    assert target.boxes.tolist() == [[0, 0, 40, 24]] * kept


SIX = [(10 * number, 4, 10 * number + 8, 20) for number in range(6)]


@pytest.mark.parametrize(("most", "counts"), [(1, {1}), (2, {1, 2}), (10, {1, 2, 3, 4, 5, 6})])
def test_so_many_objects_are_pasted_at_most(most, counts):
    found = many(CopyPaste(most=most, scale=(1.0, 1.0), probability=1), white, lambda: plain(0, *SIX))
    assert {len(one.target) for one in found} == counts


def test_pasted_objects_have_the_sizes_that_are_asked_for():
    """An object of half the image's sides, at 0.4 to 0.8 of them."""
    found = many(CopyPaste(scale=(0.4, 0.8), probability=1), white, lambda: plain(0, (16, 12, 48, 36)))
    widths = [(one.target.boxes[0, 2] - one.target.boxes[0, 0]).item() for one in found]
    assert min(widths) == pytest.approx(0.4 * 32, abs=1.5)
    assert max(widths) == pytest.approx(0.8 * 32, abs=1.5)


@pytest.mark.parametrize(("visible", "kept"), [(0.15, True), (0.25, False)])
def test_what_is_pasted_over_an_object_leaves_the_share_of_its_mask_that_is_asked_for(visible, kept):
    """A fifth of it is left."""
    own = lambda: plain(200, (20, 10, 30, 20), label=1)  # noqa: E731
    paste = CopyPaste(scale=(1.0, 1.0), visible=visible, probability=1)
    target = many(paste, own, lambda: plain(0, (20, 10, 28, 20)), count=1)[0].target
    assert target.labels.tolist() == [1] * kept + [0]
    assert target.boxes.tolist() == [[28, 10, 30, 20]] * kept + [[20, 10, 28, 20]]
