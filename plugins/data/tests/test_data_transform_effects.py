"""What every option of every transform does, against a value that was got in another way."""

import colorsys
import random
import warnings

import numpy as np
import pytest
import torch
from detkernel import ConfigError, DataError, UserError, plugin
from detkernel_data.loading.loader import Loader
from detkernel_data.transforms.standard import V2, Color, Crop, Expand, Flip, MinIouCrop, Normalize, Pad, Resize
from detkernel_detection import Sample, Target, Transform
from detkernel_detection.testing import TinyDataset, tiny_kernel
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

HEIGHT, WIDTH = 60, 90


def located(boxes, height=HEIGHT, width=WIDTH, **more):
    """An image whose red is the row and whose green is the column: a crop shows its window."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows, columns, torch.full_like(rows, 7)]).to(torch.uint8)
    target = Target(torch.tensor(boxes).float().reshape(-1, 4), torch.arange(len(boxes)), **more)
    return Sample(image, target, 0, 0, (height, width))


def window_of(found):
    """x1, y1, x2, y2 of a crop of a `located` image, from its corner pixels."""
    (top, left), (bottom, right) = found.image[:2, 0, 0].tolist(), found.image[:2, -1, -1].tolist()
    return left, top, right + 1, bottom + 1


def many(transform, make, count=300):
    torch.manual_seed(0)
    return [transform(make()) for _ in range(count)]


# colour


@pytest.mark.parametrize("turn", [0.05, -0.05, 0.1])
@pytest.mark.parametrize("colour", [(190, 70, 70), (70, 190, 70), (70, 70, 190), (180, 180, 60), (60, 180, 180)])
def test_hue_turns_as_colorsys_and_torchvision_count_it(monkeypatch, colour, turn):
    image = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    monkeypatch.setattr(torch, "rand", lambda *size: torch.full(size, 0.0 if turn < 0 else 0.999999))
    color = Color(brightness=0, contrast=0, saturation=0, hue=abs(turn), probability=1)
    found = color(Sample(image.permute(1, 2, 0).contiguous().permute(2, 0, 1), located([]).target, 0, 0, (4, 4))).image
    change = (hue_of(found) - colorsys.rgb_to_hsv(*(value / 255 for value in colour))[0] + 0.5) % 1 - 0.5
    assert change == pytest.approx(turn, rel=0.5), "a turn in YIQ is nearly one of hues"
    theirs = F.adjust_hue(image, turn)
    assert (hue_of(found) - hue_of(theirs) + 0.5) % 1 - 0.5 == pytest.approx(0, abs=abs(turn) / 2)


def hue_of(image):
    return colorsys.rgb_to_hsv(*(value / 255 for value in image[:, 0, 0].tolist()))[0]


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_amount_of_color_acts_alone_and_by_share(name):
    amounts = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, name: 0.4}
    found = many(Color(**amounts, probability=0.25), lambda: located([]), 400)
    changed = [one.image for one in found if not torch.equal(one.image, located([]).image)]
    assert 70 < len(changed) < 130
    grey = torch.full((3, 8, 8), 90, dtype=torch.uint8)
    flat = [Color(**amounts, probability=1)(Sample(grey, located([]).target, 0, 0, (8, 8))).image for _ in range(20)]
    assert any(not torch.equal(image, grey) for image in flat) == (name == "brightness")
    if name == "brightness":
        assert min(int(image.min()) for image in flat) >= 90 * 0.6 - 1
        assert max(int(image.max()) for image in flat) <= 90 * 1.4 + 1


# crops


def test_min_iou_crop_keeps_its_rules():
    boxes = [[10, 10, 40, 40], [50, 20, 85, 55], [5, 50, 15, 58]]
    sizes, overlaps = set(), []
    for found in many(MinIouCrop(overlaps=[0.5], smallest=0.4), lambda: located(boxes)):
        x1, y1, x2, y2 = window_of(found)
        if found.size == (HEIGHT, WIDTH):
            continue
        sizes.add(found.size)
        ious = box_iou(torch.tensor(boxes).float(), torch.tensor([[x1, y1, x2, y2]]).float())[:, 0]
        overlaps.append(float(ious.max()))
        centres = [((a + c) / 2, (b + d) / 2) for a, b, c, d in boxes]
        assert found.target.labels.tolist() == [
            number for number, (x, y) in enumerate(centres) if x1 < x < x2 and y1 < y < y2
        ]
        expected = [[max(a, x1) - x1, max(b, y1) - y1, min(c, x2) - x1, min(d, y2) - y1] for a, b, c, d in boxes]
        assert found.target.boxes.tolist() == [expected[label] for label in found.target.labels.tolist()]
        assert len(found.target) > 0
        assert 0.5 <= found.size[0] / found.size[1] <= 2
        assert found.size[0] >= int(0.4 * HEIGHT)
        assert found.size[1] >= int(0.4 * WIDTH)
    assert len(sizes) > 20
    assert 0.5 <= min(overlaps) < 0.56


def test_min_iou_crop_has_the_whole_image_and_any_window_among_its_choices():
    """SSD: the whole image, a least overlap, or any patch."""
    box = [[10, 10, 16, 16]]
    shares = {}
    for overlaps in ([0.0], [0.0, 0.0, 0.0]):
        found = many(MinIouCrop(overlaps=overlaps), lambda: located(box))
        shares[len(overlaps)] = sum(one.size == (HEIGHT, WIDTH) for one in found) / len(found)
        assert min(36 / (one.size[0] * one.size[1]) for one in found) < 0.02
    assert shares[1] == pytest.approx(1 / 2, abs=0.1)
    assert shares[3] == pytest.approx(1 / 4, abs=0.1)
    assert 0.0 in MinIouCrop().overlaps
    whole = many(MinIouCrop(overlaps=[0.9]), lambda: located(box), 30)
    assert {one.size for one in whole} == {(HEIGHT, WIDTH)}, "no window has such an overlap with a small box"
    with pytest.raises(ValueError, match="overlaps: expected at least one"):
        MinIouCrop(overlaps=[])


def test_min_iou_crop_has_a_probability():
    """Without the draw of the whole image, which is one of two."""
    found = many(MinIouCrop(overlaps=[0.0], probability=0.5), lambda: located([[10, 10, 16, 16]]))
    assert sum(one.size == (HEIGHT, WIDTH) for one in found) / len(found) == pytest.approx(3 / 4, abs=0.1)


def test_min_iou_crop_tries_as_often_as_it_is_told():
    box = [[40, 25, 50, 35]]
    cropped = {
        tries: sum(
            one.size != (HEIGHT, WIDTH) for one in many(MinIouCrop(overlaps=[0.1], tries=tries), lambda: located(box))
        )
        for tries in (1, 100)
    }
    assert cropped[1] < cropped[100] / 2


@pytest.mark.parametrize("visible", [0.0, 0.3, 0.8])
def test_crop_keeps_objects_of_which_enough_is_seen(visible):
    boxes = [[10, 10, 40, 40], [50, 20, 85, 55]]
    dropped = kept = 0
    for found in many(Crop(share=(0.4, 0.8), visible=visible, keep_objects=False), lambda: located(boxes), 100):
        x1, y1, x2, y2 = window_of(found)
        shares = []
        for a, b, c, d in boxes:
            inside = max(0, min(c, x2) - max(a, x1)) * max(0, min(d, y2) - max(b, y1))
            shares.append(inside / ((c - a) * (d - b)))
        expected = [number for number, share in enumerate(shares) if share >= visible and share > 0]
        assert found.target.labels.tolist() == expected
        kept += len(expected)
        dropped += 2 - len(expected)
    assert kept > 10
    assert dropped > 10


def test_crop_with_keep_objects_never_loses_all_of_them():
    box = [[2, 2, 8, 8]]
    for keep in (True, False):
        found = many(Crop(size=(20, 20), keep_objects=keep), lambda: located(box), 60)
        assert all(len(one.target) == 1 for one in found) == keep
        assert any(one.size == (HEIGHT, WIDTH) for one in found) == keep
    slivers = many(Crop(size=(20, 20), visible=0), lambda: located([[0, 0, 0.7, 0.7]]), 60)
    assert {one.size for one in slivers} == {(HEIGHT, WIDTH)}, "less than a pixel is not an object"
    empty = many(Crop(size=(20, 20)), lambda: located([]), 5)
    assert {one.size for one in empty} == {(20, 20)}


def test_crop_takes_windows_of_its_shares_everywhere():
    windows = [window_of(one) for one in many(Crop(share=(0.5, 0.7), keep_objects=False), lambda: located([]))]
    heights, widths = zip(*((y2 - y1, x2 - x1) for x1, y1, x2, y2 in windows), strict=True)
    assert (min(heights), max(heights)) == (30, 42)
    assert (min(widths), max(widths)) == (45, 63)
    assert min(x1 for x1, *_ in windows) == 0
    assert max(x2 for *_, x2, _ in windows) == WIDTH
    assert max(y2 for *_, y2 in windows) == HEIGHT
    cropped = sum(one.size != (HEIGHT, WIDTH) for one in many(Crop(size=(9, 9), probability=0.2), lambda: located([])))
    assert 35 < cropped < 85
    assert Crop(size=(500, 10))(located([])).size == (HEIGHT, 10), "no larger than the image"


def test_crop_draws_each_side_in_pixels():
    sides = {one.size for one in many(Crop(sides=(20, 70), keep_objects=False), lambda: located([]), 2000)}
    heights, widths = (set(side) for side in zip(*sides, strict=True))
    assert heights == set(range(20, HEIGHT + 1))
    assert widths == set(range(20, 71))
    assert Crop(sides=(100, 200))(located([])).size == (HEIGHT, WIDTH), "no larger than the image"
    with pytest.raises(ValueError, match=r"sides: expected the smaller number first, got \[3, 2\]"):
        Crop(sides=(3, 2))


def test_crop_resizes_what_it_crops_alone():
    crop = Crop(sides=(10, 10), probability=0.5, resize=Resize(short=30), keep_objects=False)
    found = many(crop, lambda: located([[0, 0, WIDTH, HEIGHT]]))
    assert {(one.size, one.scale) for one in found} == {((HEIGHT, WIDTH), (1.0, 1.0)), ((10, 10), (0.5, 0.5))}


def test_expand_places_the_image_on_its_canvas():
    transform = Expand(ratio=(1.5, 2.5), probability=0.5, fill=(1, 2, 3))
    masks = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.uint8)
    masks[0, 10:30, 20:50] = 1
    points = torch.tensor([[[20.0, 10, 2], [0, 0, 0]]])
    found = many(transform, lambda: located([[20, 10, 50, 30]], masks=masks, keypoints=points))
    grown = [one for one in found if one.size != (HEIGHT, WIDTH)]
    assert 120 < len(grown) < 180
    factors = [one.size[0] / HEIGHT for one in grown]
    assert (min(factors), max(factors)) == (pytest.approx(1.5, abs=0.04), pytest.approx(2.5, abs=0.04))
    for one in grown[:40]:
        blue = one.image[2] == 7
        y, x = (int(side.min()) for side in blue.nonzero().unbind(1))
        assert torch.equal(one.image[:, y : y + HEIGHT, x : x + WIDTH], located([]).image)
        assert one.image[:, ~blue].unique(dim=1).tolist() == [[1], [2], [3]]
        assert one.target.boxes.tolist() == [[20 + x, 10 + y, 50 + x, 30 + y]]
        assert one.target.keypoints.tolist() == [[[20 + x, 10 + y, 2], [0, 0, 0]]]
        assert one.target.masks[0].nonzero()[0].tolist() == [10 + y, 20 + x]
    for bad in ((2.0, 1.0), (1.5, 1.2)):
        with pytest.raises(ValueError, match="ratio: expected the smaller number first"):
            Expand(ratio=bad)


# resize and flip


def test_resize_scales_every_keypoint_by_its_own_axis():
    points = torch.tensor([[[30.0, 20, 2], [60, 50, 1], [0, 0, 0]]])
    found = Resize(size=(120, 30))(located([[30, 20, 60, 50]], keypoints=points))
    assert found.target.keypoints.tolist() == [[[10, 40, 2], [20, 100, 1], [0, 0, 0]]]
    assert found.target.boxes.tolist() == [[10, 40, 20, 100]]
    assert found.scale == (2, pytest.approx(1 / 3))
    again = Resize(size=(60, 60))(found)
    assert again.scale == (pytest.approx(1), pytest.approx(2 / 3))
    assert again.target.keypoints[0, 1].tolist() == [40, 50, 1]


def test_resize_without_antialias_is_torchvisions():
    for antialias in (True, False):
        expected = F.resize(located([]).image, [20, 30], antialias=antialias)
        assert torch.equal(Resize(size=(20, 30), antialias=antialias)(located([])).image, expected)


@pytest.mark.parametrize(
    "names", [("left_eye", "right_eye"), ("Right Eye", "Left Eye"), ("l_eye", "r_eye"), ("eyeL", "eyeR")]
)
@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_a_mirror_image_swaps_left_and_right(names, direction):
    dataset = TinyDataset()
    dataset.keypoint_names = (*names, "nose")
    flip = Flip(probability=1, direction=direction)
    flip.prepare(dataset)
    points = torch.tensor([[[10.0, 20, 2], [30, 40, 1], [50, 50, 2]]])
    found = flip(located([[5, 5, 60, 55]], keypoints=points)).target.keypoints[0].tolist()
    moved = [(WIDTH - x, y, v) if direction == "horizontal" else (x, HEIGHT - y, v) for x, y, v in points[0].tolist()]
    assert [tuple(point) for point in found] == [moved[1], moved[0], moved[2]]


def test_a_half_turn_does_not_swap_left_and_right():
    dataset = TinyDataset()
    dataset.keypoint_names = ("left_eye", "right_eye")
    ways = [Flip(probability=1, direction=direction) for direction in ("horizontal", "vertical")]
    found = located([[5, 5, 60, 55]], keypoints=torch.tensor([[[10.0, 20, 2], [30, 40, 1]]]))
    for flip in ways:
        flip.prepare(dataset)
        found = flip(found)
    assert found.target.keypoints[0].tolist() == [[80, 40, 2], [60, 20, 1]]


# order, floats, nothing to move


@pytest.mark.parametrize(
    "late", [Color(), Expand(), Pad(size=(9, 9)), Normalize(), V2(name="ColorJitter"), V2(name="RandomEqualize")]
)
def test_what_takes_colours_is_refused_behind_what_normalises_them(late):
    loader = Loader(train=TinyDataset(), workers=0, train_transforms=[Flip(), Normalize(), Resize(short=20), late])
    name = late.name if isinstance(late, V2) else type(late).__name__
    with pytest.raises(
        ConfigError, match=rf"train_transforms: {name} \(number 3\) takes colours of 0 to 255; put it before"
    ):
        loader.build_loader(tiny_kernel({"data": loader}).state, "train")


@pytest.mark.parametrize("transform", [Color(probability=1), Expand(probability=1), Pad(size=(99, 99))])
def test_what_takes_bytes_refuses_floats(transform):
    sample = Normalize()(located([]))
    with pytest.raises(UserError, match=r"(color|expand|a canvas): expected a uint8 image, got float32; put it before"):
        transform(sample)


ALL = [
    Resize(size=(30, 30)),
    Flip(probability=1),
    Crop(),
    MinIouCrop(),
    V2(name="RandomRotation", args={"degrees": 20}),
]


@pytest.mark.parametrize(
    "transform", [*ALL, Expand(probability=1), Pad(size=(90, 120)), Color(probability=1), Normalize()]
)
@pytest.mark.parametrize("parts", [False, True])
def test_images_without_objects_pass_through(transform, parts):
    more = (
        {"masks": torch.zeros(0, HEIGHT, WIDTH, dtype=torch.uint8), "keypoints": torch.zeros(0, 2, 3)} if parts else {}
    )
    found = transform(located([], **more))
    assert found.target.boxes.shape == (0, 4)
    if parts:
        assert found.target.masks.shape == (0, *found.size)
        assert found.target.keypoints.shape == (0, 2, 3)


@pytest.mark.parametrize("transform", ALL)
def test_float_images_are_moved_as_bytes_are(transform):
    torch.manual_seed(3)
    expected = transform(located([[20, 10, 70, 50]]))
    given = located([[20, 10, 70, 50]])
    given.image = given.image.float()
    torch.manual_seed(3)
    found = transform(given)
    assert found.image.dtype == torch.float32
    torch.testing.assert_close(found.image, expected.image.float(), atol=1.01, rtol=0)
    assert torch.equal(found.target.boxes, expected.target.boxes)


# torchvision's


@pytest.mark.parametrize("name", ["AugMix", "AutoAugment", "RandAugment", "TrivialAugmentWide"])
def test_v2_refuses_what_does_not_know_boxes(name):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(2), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    with pytest.raises(ConfigError, match=f"name: {name} does not know boxes"):
        V2(name=name).prepare(TinyDataset())
    found = torch.rand(2), random.random(), np.random.rand()
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:], "trying it draws none of the run's random numbers"


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("RandomErasing", {"p": 1.0}),
        ("JPEG", {"quality": 90}),
        ("ConvertBoundingBoxFormat", {"format": "CXCYWH"}),
        ("Grayscale", {}),
        ("ToPureTensor", {}),
    ],
)
def test_v2_leaves_boxes_that_it_does_not_move(name, args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform = V2(name=name, args=args)
        transform.prepare(TinyDataset())
        found = transform(located([[20, 10, 70, 50]]))
    assert found.target.boxes.tolist() == [[20, 10, 70, 50]]
    assert found.image.shape == (3, HEIGHT, WIDTH)


def test_v2_that_gives_no_tensor():
    with pytest.raises(UserError, match=r"v2: ToPILImage gives a PIL.Image.Image, not a tensor"):
        V2(name="ToPILImage")(located([[20, 10, 70, 50]]))


# what a transform of one's own may do wrong


@plugin
class Odd(Transform):
    """Does what it is told to the second image."""

    def __call__(self, sample):
        return self.act(sample) if sample.index == 1 else sample

    @staticmethod
    def refuse(_sample):
        raise UserError("too small for this")

    @staticmethod
    def double(sample):
        sample.image = sample.image.double()
        return sample

    @staticmethod
    def forget(_sample):
        return None

    @staticmethod
    def grey(sample):
        sample.image = sample.image[:1]
        return sample

    @staticmethod
    def lose(sample):
        sample.target.labels = sample.target.labels[:0]
        return sample

    @staticmethod
    def float(sample):
        sample.image = sample.image.float()
        return sample


@pytest.mark.parametrize(
    ("way", "message", "workers"),
    [
        ("refuse", "too small for this", 1),
        ("refuse", "too small for this", 0),
        ("double", "the image it gives is torch.float64; expected torch.uint8, or torch.float32", 0),
        ("forget", "it gives NoneType; expected the sample", 0),
        ("grey", r"the image it gives is \[1, 32, 32\]; expected a tensor \[3, H, W\]", 0),
        ("lose", r"boxes and 0 labels; expected \[N, 4\] and N", 0),
        ("float", "data: transforms make some images of a batch float and leave others uint8", 0),
    ],
)
def test_a_transform_that_refuses_or_breaks_an_image_is_one_line_with_its_name(way, message, workers):
    odd = Odd()
    odd.act = getattr(Odd, way)
    loader = Loader(train=TinyDataset(size=4), workers=workers, train_transforms=[odd], batch_size=4)
    made = loader.build_loader(tiny_kernel({"data": loader}).state, "train")
    with pytest.raises(DataError, match=message) as caught:
        list(made.batches(0))
    assert "\n" not in str(caught.value)
    if way != "float":
        assert str(caught.value).startswith(f"{TinyDataset().annotations(1).path} (image 1) in Odd: ")
    loader.after_run()
