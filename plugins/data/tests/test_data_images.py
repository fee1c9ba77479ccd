"""Image files: every kind that is read, every way to be broken, and no warning on the way."""

from __future__ import annotations

import os
import socket
import struct
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from detkernel import DataError
from detkernel_data.formats.yolo import Yolo
from detkernel_detection.images import Header, Listing, decode, find_depth, image_files, read_headers, turn_upright
from PIL import Image, ImageOps

MakeImage = Callable[..., Path]


def reference(path: Path, apply_exif: bool = False) -> torch.Tensor:
    """What Pillow makes of it."""
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened) if apply_exif else opened
        return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)


def header(path: Path) -> Header:
    (found,) = read_headers([str(path)])
    assert isinstance(found, Header)
    return found


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as refused:
        decode(str(path), apply_exif=False)
    return str(refused.value)


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *[("png", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")],
        *[("jpg", mode) for mode in ("RGB", "L", "CMYK")],
        *[("bmp", mode) for mode in ("RGB", "L", "P")],
        *[("tif", mode) for mode in ("RGB", "RGBA", "L", "CMYK")],
        *[("gif", mode) for mode in ("RGB", "P")],
        *[("webp", mode) for mode in ("RGB", "RGBA")],
        *[("ppm", mode) for mode in ("RGB", "L")],
    ],
)
def test_every_kind_becomes_rgb(here: Path, make_image: MakeImage, suffix: str, mode: str) -> None:
    path = make_image(here / f"a.{suffix}", 40, 30, mode=mode)
    assert header(path)[:3] == (30, 40, 1)
    image = decode(str(path), apply_exif=False)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 30, 40)
    assert image.permute(1, 2, 0).is_contiguous(), "channels-last in memory"
    assert torch.equal(image, reference(path))


def test_a_palette_with_a_transparent_colour(here: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    for suffix in ("gif", "png"):
        image.save(here / f"a.{suffix}", transparency=1)
        assert decode(str(here / f"a.{suffix}"), apply_exif=False)[:, 0, 0].tolist() == [200, 100, 50]


@pytest.mark.parametrize("depth", ["I;16", "RGB"])
def test_pngs_of_16_bits_keep_their_upper_8(here: Path, depth: str) -> None:
    values = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)
    if depth == "RGB":
        (here / "a.png").write_bytes(png(256, 256, 2, 16, np.repeat(values[..., None], 3, axis=2).astype(">u2")))
    else:
        Image.fromarray(values).save(here / "a.png")
    image = decode(str(here / "a.png"), apply_exif=False)
    assert torch.equal(image, torch.from_numpy(values >> 8).to(torch.uint8).expand(3, -1, -1))


def deep(folder: Path, form: str, values: np.ndarray) -> Path:
    """A file of 16 bits a channel, grey or with three equal colours."""
    height, width = values.shape
    if form == "png RGB":
        path = folder / "a.png"
        path.write_bytes(png(width, height, 2, 16, np.repeat(values[..., None], 3, axis=2).astype(">u2")))
    elif form == "png RGBA":
        path = folder / "a.png"
        colours = np.repeat(values[..., None], 4, axis=2)
        colours[..., 3] = 65535
        path.write_bytes(png(width, height, 6, 16, colours.astype(">u2")))
    elif form == "tif RGB":
        path = folder / "a.tif"
        path.write_bytes(tiff(np.repeat(values[..., None], 3, axis=2).astype("<u2")))
    else:
        path = folder / f"a.{form}"
        Image.fromarray(values).save(path)
    return path


DEEP = ["png", "tif", "png RGB", "png RGBA", "tif RGB"]


@pytest.mark.parametrize("form", DEEP)
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_bits_that_are_used_become_the_whole_range(here: Path, form: str, bits: int) -> None:
    values = np.linspace(0, 2**bits - 1, 32 * 32).astype(np.uint16).reshape(32, 32)
    path = deep(here, form, values)
    expected = torch.from_numpy(values.astype(np.int64) * 256 // 2**bits).to(torch.uint8).expand(3, -1, -1)
    assert torch.equal(decode(str(path), False, bits), expected)
    assert find_depth([str(path)]) == (bits, 2**bits - 1)


@pytest.mark.parametrize("form", DEEP)
def test_deep_images_that_would_become_black_are_refused(here: Path, form: str) -> None:
    path = deep(here, form, np.full((8, 8), 1000, dtype=np.uint16))
    assert refusal(path) == (
        f"{path.name}: 16 bits a channel, but its values reach 1000 of 65535, so it would become black; set "
        "`bit_depth` to the bits that are used, such as 10, or to 16"
    )
    assert decode(str(path), False, 16).unique().tolist() == [3]
    with pytest.raises(DataError, match=r"a value of 1000, where `bit_depth` is 8 .* is 255; set `bit_depth` to 10"):
        decode(str(path), False, 8)


def test_data_of_12_bits_is_read_as_such(here: Path) -> None:
    """Whichever reader: the depth is found in a sample of the files, and told."""
    for number, largest in enumerate((700, 4000)):
        values = np.full((8, 8), largest, dtype=np.uint16)
        for folder in ("images", "labels"):
            (here / folder).mkdir(exist_ok=True)
        deep(here, "png", values).rename(here / f"images/{number}.png")
        (here / f"labels/{number}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (here / "data.yaml").write_text("{names: [bolt], train: images}\n")
    data = Yolo(data=Path("data.yaml"), split="train")
    data.load()
    assert [int(data.image(index).max()) for index in range(2)] == [700 >> 4, 4000 >> 4]
    assert data.notes[-1] == (
        "images with 16 bits a channel have values up to 4000: read as 12 bits (4095 becomes 255); `bit_depth` says "
        "otherwise"
    )
    data = Yolo(data=Path("data.yaml"), split="train", bit_depth=14)
    data.load()
    assert [int(data.image(index).max()) for index in range(2)] == [700 >> 6, 4000 >> 6]
    assert not any("bit_depth" in note for note in data.notes)


def test_a_black_image_of_16_bits_is_black(here: Path) -> None:
    path = deep(here, "png", np.zeros((8, 8), dtype=np.uint16))
    assert decode(str(path), False).unique().tolist() == [0]
    assert find_depth([str(path)]) == (None, 0)


def test_other_deep_images_are_refused(here: Path) -> None:
    for dtype, mode in ((np.float32, "F"), (np.int32, "I")):
        Image.fromarray(np.zeros((4, 4), dtype=dtype)).save(here / "a.tif")
        assert refusal(here / "a.tif") == (f"a.tif: {mode} pixels; expected 8 or 16 bits a channel; convert the image")


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_no_flipped_bit_of_a_png_is_passed_over(here: Path, make_image: MakeImage, mode: str) -> None:
    """Each is an error of one line, or was in what is not pixels; torchvision's decoder ended the process."""
    path = make_image(here / "a.png", 12, 9, mode=mode)
    whole, expected = path.read_bytes(), decode(str(path), apply_exif=False)
    messages = []
    for bit in range(0, len(whole) * 8, 7):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert torch.equal(decode(str(path), apply_exif=False), expected)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > len(whole) // 2
    assert all(told.startswith("a.png: ") and "\n" not in told for told in messages)


@pytest.mark.parametrize("suffix", ["jpg", "gif", "tif", "webp", "bmp", "ppm"])
def test_flipped_bits_of_other_formats_end_no_process(here: Path, make_image: MakeImage, suffix: str) -> None:
    path, generator = make_image(here / f"a.{suffix}", 24, 18), np.random.default_rng(0)
    whole = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        for place in generator.integers(len(whole), size=3):
            damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        with suppress(DataError):
            decode(str(path), apply_exif=False)


def test_only_regular_files_are_read(here: Path) -> None:
    """None of them is waited for, or read without end."""
    os.mkfifo(here / "fifo.png")
    (here / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket.png")
        for name, kind in (("fifo", "a FIFO"), ("zero", "a device"), ("socket", "")):
            told = f"{name}.png: the image cannot be read (it is {kind}; expected a regular file)"
            if not kind:
                told = "socket.png: the image cannot be read (No such device or address)"
            assert refusal(here / f"{name}.png").endswith(told)
            assert str(read_headers([f"{name}.png"])[0]).endswith(told)


def test_a_file_larger_than_any_image(here: Path) -> None:
    with (here / "a.png").open("wb") as file:
        file.truncate(2**40)
    assert refusal(here / "a.png") == (
        "a.png: the image cannot be read (1,099,511,627,776 bytes, more than any image has)"
    )


def test_no_program_is_run_to_read_an_image(here: Path) -> None:
    (here / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    assert refusal(here / "a.png").startswith("a.png: no image that can be read")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_on_request_only(
    here: Path, make_image: MakeImage, suffix: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = make_image(here / f"a.{suffix}", exif=exif)
    found = header(path)
    assert found[:3] == (30, 40, orientation)
    assert found.upright() == ((40, 30) if orientation >= 5 else (30, 40))
    assert torch.equal(decode(str(path), apply_exif=False), reference(path))
    upright = decode(str(path), apply_exif=True)
    assert torch.equal(upright, reference(path, apply_exif=True))
    assert upright.permute(1, 2, 0).is_contiguous(), "channels-last in memory"


def test_tiffs_are_always_upright(here: Path, make_image: MakeImage) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = make_image(here / "a.tif", exif=exif)
    assert header(path)[:3] == (40, 30, 1)
    for apply_exif in (False, True):
        assert torch.equal(decode(str(path), apply_exif), reference(path))


def test_an_orientation_that_is_none(here: Path, make_image: MakeImage) -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert header(make_image(here / "a.jpg", exif=exif)).orientation == 1
    path = make_image(here / "b.jpg", exif=b"Exif\0\0broken")
    assert header(path).orientation == 1
    image = torch.zeros(3, 2, 4)
    assert turn_upright(image, 1) is image


def test_headers_do_not_decode(here: Path) -> None:
    """A PNG of 10,000 x 8,000 pixels whose pixels are missing: only its header is looked at."""
    (here / "a.png").write_bytes(png(10_000, 8_000, 0, 8, b"")[:50])
    assert header(here / "a.png")[:4] == (8_000, 10_000, 1, "PNG")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_further_frames_are_known_of(here: Path, make_image: MakeImage, suffix: str) -> None:
    plain, moving = make_image(here / f"a.{suffix}"), here / f"b.{suffix}"
    with Image.open(plain) as image:
        image.convert("RGB").save(moving, save_all=True, append_images=[Image.new("RGB", image.size)])
    assert [header(path).animated for path in (plain, moving)] == [False, True]


def test_headers_of_many_keep_their_order(here: Path, make_image: MakeImage) -> None:
    paths = [str(make_image(here / f"{side}.bmp", side, 5)) for side in range(1, 150)]
    paths.insert(70, str(here / "none.jpg"))
    found = read_headers(paths)
    assert str(found.pop(70)) == "none.jpg: the image cannot be read (No such file or directory)"
    assert [one.width for one in found if isinstance(one, Header)] == list(range(1, 150))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "webp"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_images(here: Path, make_image: MakeImage, suffix: str, kept: float) -> None:
    path = make_image(here / f"a.{suffix}", 200, 200)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    told = refusal(path)
    assert told.startswith(f"a.{suffix}: ")
    assert told.endswith("; replace the file")
    assert "\n" not in told


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"no image at all"])
def test_files_that_are_no_images(here: Path, data: bytes) -> None:
    (here / "a.jpg").write_bytes(data)
    assert refusal(here / "a.jpg").startswith("a.jpg: ")
    (found,) = read_headers(["a.jpg"])
    assert isinstance(found, DataError)
    assert str(found) == refusal(here / "a.jpg")


def test_folders_and_names_that_cannot_be(here: Path) -> None:
    assert refusal(here / "none.jpg") == "none.jpg: the image cannot be read (No such file or directory)"
    (here / "a.jpg").mkdir()
    assert refusal(here / "a.jpg") == "a.jpg: the image cannot be read (Is a directory)"
    (found,) = read_headers(["a\0.jpg"])
    assert isinstance(found, DataError)
    assert not Listing()("a\0/b.jpg")
    assert not Listing()("none/b.jpg")


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_bombs_are_refused_before_they_are_decoded(here: Path, side: int) -> None:
    (here / "a.png").write_bytes(png(side, side, 0, 8, b""))
    message = "a.png: the image has more than 89,478,485 pixels; cut it into tiles"
    for action in ("ignore", "error"):
        with warnings.catch_warnings():
            warnings.simplefilter(action)  # type: ignore[arg-type]
            assert refusal(here / "a.png") == message
            assert [str(found) for found in read_headers(["a.png"])] == [message]


def test_image_files_of_a_folder(here: Path, make_image: MakeImage) -> None:
    for name in ("a.jpg", "b.JPG", "c.Png"):
        make_image(here / name, format="png")
    (here / "notes.txt").write_text("")
    assert sorted(image_files(here)) == ["a.jpg", "b.JPG", "c.Png"]


def test_warning_filters_are_left_alone(here: Path, make_image: MakeImage) -> None:
    paths = [str(make_image(here / f"{number}.png")) for number in range(200)]
    before = list(warnings.filters)
    read_headers(paths)
    decode(paths[0], apply_exif=False)
    assert warnings.filters == before


def png(width: int, height: int, colour: int, depth: int, pixels: bytes | np.ndarray) -> bytes:
    """A PNG file of unfiltered rows; of too few, if `pixels` is empty."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels) if isinstance(pixels, np.ndarray) else pixels
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(pixels: np.ndarray) -> bytes:
    """A little-endian TIFF of one strip, 16 bits a channel."""
    height, width, channels = pixels.shape
    entries = [
        *((256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, 1, 14), (277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, pixels.nbytes)),
    ]
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<I", 14 + pixels.nbytes) + struct.pack("<HHH", 16, 16, 16)
    return head + pixels.tobytes() + struct.pack("<H", len(entries)) + table + bytes(4)


@pytest.mark.parametrize(("kind", "refused"), [(b"tEXt", False), (b"tIME", False), (b"XBAD", True)])
def test_a_wrong_checksum_counts_where_the_chunk_is_critical(
    here: Path, make_image: MakeImage, kind: bytes, refused: bool
) -> None:
    """The case of a chunk's first letter says so (PNG 1.2, 3.3). Palettes go to Pillow, and so does what is critical
    and not known."""
    path = make_image(here / "a.png", 40, 30, mode="P")
    expected = decode(str(path), apply_exif=False)
    whole = path.read_bytes()
    bad = struct.pack(">I", 4) + kind + b"a\0bc" + b"\0\0\0\0"
    path.write_bytes(whole[:-12] + bad + whole[-12:])
    if refused:
        assert "the checksum of its XBAD chunk is wrong" in refusal(path)
    else:
        assert torch.equal(decode(str(path), apply_exif=False), expected)


@pytest.mark.parametrize("rest", [b"\0", b"more that is not of the image", b"\0\0\0\4IDATxxxxyyyy"])
def test_what_is_behind_the_end_of_a_png_is_of_no_matter(here: Path, make_image: MakeImage, rest: bytes) -> None:
    path = make_image(here / "a.png", 40, 30, mode="P")
    expected = decode(str(path), apply_exif=False)
    path.write_bytes(path.read_bytes() + rest)
    assert torch.equal(decode(str(path), apply_exif=False), expected)


@pytest.mark.parametrize(("bits", "next_depth"), [(8, 10), (10, 12), (12, 14)])
def test_the_first_value_that_a_depth_does_not_hold_is_refused(here: Path, bits: int, next_depth: int) -> None:
    values = np.zeros((8, 8), dtype=np.uint16)
    values[2, 3] = 2**bits - 1
    assert int(decode(str(deep(here, "png", values)), False, bits).max()) == 255
    values[2, 3] = 2**bits
    with pytest.raises(DataError, match=rf"a value of {2**bits}, .* is {2**bits - 1}; set `bit_depth` to {next_depth}"):
        decode(str(deep(here, "png", values)), False, bits)
