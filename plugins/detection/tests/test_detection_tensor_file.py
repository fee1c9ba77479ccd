"""Files of `torch.save` are read as torch reads them; nothing in one runs code, fills the memory or hangs."""

from __future__ import annotations

import os
import pickle
import random
import struct
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from detkernel import CheckpointError
from detkernel_detection import tensor_file
from detkernel_detection.safe_pickle import Foreign

MESSAGE = r"a\.pt: cannot be read as weights or a checkpoint: "
FORMS = {
    "zip": {},
    "protocol 3": {"pickle_protocol": 3},
    "protocol 4": {"pickle_protocol": 4},
    "protocol 5": {"pickle_protocol": 5},
    "older": {"_use_new_zipfile_serialization": False},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.pt"


def save(content: object, path: Path, **options: object) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_everything_that_a_checkpoint_holds_is_read_as_torch_reads_it(path: Path, form: str):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    plain = {
        "values": (1, -5, 300, 70_000, 2**70, 2.5, None, True, False, "é", [[]], ()),
        "bytes": (b"abc", b"", bytearray(b"xyz"), {1, 2}),
        3: Counter("abca"), ("a", 1): 1 + 2j, "dtype": torch.float16, "size": torch.Size([3, 4]), "long": "x" * 300,
        "many": list(range(3000)),
    }  # fmt: skip
    shared = torch.arange(10.0)
    tensors = {
        "part": shared[2:8:2], "whole": shared, "turned": torch.arange(6).reshape(2, 3).T, "none": torch.zeros(0, 3),
        "one": torch.tensor(3.0), "half": torch.ones(2).half(), "bfloat16": torch.ones(2).bfloat16(),
        "bool": torch.tensor([True, False]), "complex": torch.ones(2, dtype=torch.complex64),
        "parameter": torch.nn.Parameter(torch.ones(2)), "generator": torch.get_rng_state(),
        "one number, everywhere": torch.ones(1).expand(1, 1), **model.state_dict(),
    }  # fmt: skip
    if form != "older":
        tensors |= {"uint16": torch.ones(2, dtype=torch.uint16), "float8": torch.ones(2).to(torch.float8_e4m3fn)}
    content = {"plain": plain, "model": OrderedDict(tensors), "optimizer": optimizer.state_dict()}
    found = tensor_file.read(save(content, path, **FORMS[form]))
    assert found["plain"] == plain
    assert [type(value) for value in found["plain"]["values"]] == [type(value) for value in plain["values"]]
    assert list(found["model"]) == list(tensors)
    for name, value in tensors.items():
        assert found["model"][name].dtype == value.dtype, name
        assert torch.equal(found["model"][name].to(torch.complex64), value.detach().to(torch.complex64)), name
    assert found["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    assert torch.equal(found["optimizer"]["state"][0]["momentum_buffer"], model[0].weight.grad)


def test_what_shares_memory_shares_it_afterwards_and_metadata_of_a_state_dict_is_kept(path: Path):
    weight = torch.zeros(4)
    found = tensor_file.read(save({"a": weight, "b": weight[1:], "model": torch.nn.BatchNorm2d(2).state_dict()}, path))
    found["a"][1] = 7
    assert found["b"][0] == 7
    assert found["model"]._metadata[""]["version"] == 2


class Harmful:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("foreign", [False, True])
def test_no_code_runs(path: Path, form: str, foreign: bool):
    target = path.with_name("harm")
    save({"w": torch.zeros(1), "x": Harmful(os.mkdir, str(target))}, path, **FORMS[form])
    with pytest.raises(CheckpointError, match=r"a\.pt: holds more than tensors .*\(it calls (posix|nt)\.mkdir\)"):
        tensor_file.read(path, foreign=foreign)
    assert not target.exists()


def test_what_is_foreign_is_refused_with_its_place_or_left_as_its_name(path: Path):
    save({"meta": {"best": np.float64(0.5)}, "time": [Harmful(time.sleep, 9)], "w": torch.ones(2)}, path)
    with pytest.raises(
        CheckpointError, match=r"a\.pt: holds more than tensors and plain values; .*\(meta\.best: numpy"
    ):
        tensor_file.read(path)
    found = tensor_file.read(path, foreign=True)
    assert isinstance(found["time"][0], Foreign)
    assert repr(found["time"][0]) == "<time.sleep>"
    assert torch.equal(found["w"], torch.ones(2))


def nested(depth: int, width: int, kind=list):
    value = kind([1])
    for _ in range(depth):
        value = kind([value] * width)
    return value


def cycle():
    value = []
    value.append(value)
    return value


DEEP = {"x": nested(100, 1)}
HANGS = {
    "shared lists": {"x": nested(40, 2)},
    "shared tuples": {"x": nested(40, 2, tuple)},
    "wide": {"x": nested(5, 40)},
    "a long text many times": {"x": ["long" * 25_000] * 200},
    "itself": {"x": cycle()},
    "too deep": DEEP,
}  # fmt: skip


@pytest.mark.parametrize("form", ["zip", "older"])
@pytest.mark.parametrize("what", HANGS)
def test_what_would_hang_a_visitor_is_refused_at_once(path: Path, what: str, form: str):
    save(HANGS[what], path, **FORMS[form])
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=MESSAGE + "its values (refer|are nested)"):
        tensor_file.read(path)
    assert time.monotonic() - begun < 2


def pickled(*operations: bytes) -> bytes:
    return b"\x80\x02" + b"".join(operations) + b"."


def write_zip(path: Path, pickle_: bytes, parts: dict[str, bytes] | None = None, **options: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": pickle_, "byteorder": b"little", **(parts or {})}.items():
            archive.writestr(f"archive/{name}", data, **options)
    return path


MEMORY = b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu%st"


def a_tensor(count: bytes, size: bytes, stride: bytes, offset: bytes = b"K\0") -> bytes:
    """The pickle of a tensor over four floats."""
    memory = b"(" + MEMORY % count + b"Q"
    return pickled(b"ctorch._utils\n_rebuild_tensor_v2\n((", memory[1:], offset, size, stride, b"\x89N", b"tR")


HUGE = b"\x8a\x06" + (10**12).to_bytes(6, "little")
ATTACKS = {
    "bytearray": (pickled(b"c__builtin__\nbytearray\n", HUGE, b"\x85R"), "it asks for a bytearray of a given size"),
    "bytes": (pickled(b"c__builtin__\nbytes\n", HUGE, b"\x85R"), "it asks for a bytearray of a given size"),
    "text that is not there": (pickled(b"X\xff\xff\xff\x7f"), "256 MB"),
    "a text that ends": (pickled(b"X\xff\0\0\0abc"), "ends too early"),
    "text again and again": (
        pickled(b"X", struct.pack("<I", 10**5), b"x" * 10**5, b"q\0X\6\0\0\0latin1q\1",
                b"(", b"c_codecs\nencode\nh\0h\1\x86R" * 500, b"l"),
        "makes much more than it holds",
    ),
    "one number as a terabyte": (a_tensor(b"K\4", HUGE + b"\x85", b"K\0\x85"), "a tensor of 1000000000000 values"),
    "beyond its memory": (a_tensor(b"K\4", b"K\4\x85", b"K\1\x85", b"K\1"), "a tensor of 4 values over memory of 4"),
    "backwards": (a_tensor(b"K\4", b"K\4\x85", b"J\xff\xff\xff\xff\x85"), "without a valid shape"),
    "memory that is not there": (a_tensor(HUGE, b"K\4\x85", b"K\1\x85"), "memory has 16 bytes in the file"),
    "memory of less than nothing": (a_tensor(b"J\xff\xff\xff\xff", b"K\4\x85", b"K\1\x85"), "memory of no size"),
    "a key that hashes for ever": (
        pickled(b"}(K\1\x85", *[b"q%c" % n + b"h%c\x86" % n for n in range(45)], b"K\1u"), "a key that is not a plain"
    ),
    "a memo that is not there": (pickled(b"j\xff\xff\xff\x7f"), "a damaged pickle"),
    "a memo far out": (pickled(b"Nr\xff\xff\xff\x7f0"), "an operation that torch does not write"),
    "protocol 0": (pickled(b"I99\n"), "an operation that torch does not write"),
    "nothing": (b"", "ends too early"),
    "no value": (pickled(), "takes more than it holds"),
    "a mark": (pickled(b"("), "opens what it never closes"),
}  # fmt: skip


@pytest.mark.parametrize("what", ATTACKS)
def test_an_attack_costs_nothing(path: Path, what: str):
    attack, message = ATTACKS[what]
    write_zip(path, attack, {"data/0": bytes(16)})
    with pytest.raises(CheckpointError, match=MESSAGE + f".*{message}"):
        tensor_file.read(path, foreign=True)


def test_the_attack_over_four_floats_is_a_valid_tensor_when_it_asks_for_four(path: Path):
    write_zip(path, a_tensor(b"K\4", b"K\4\x85", b"K\1\x85"), {"data/0": np.arange(4, dtype="<f4").tobytes()})
    assert torch.equal(tensor_file.read(path), torch.arange(4.0))


def test_views_of_one_memory_do_not_add_up_to_more_than_the_file_allows(path: Path):
    whole = torch.zeros(100_000)
    tensor_file.read(save([whole.view(100_000 // n, n) for n in (1, 2, 4, 5)], path))
    with pytest.raises(CheckpointError, match="its tensors share memory so often"):
        tensor_file.read(save([whole.view(2, -1)[:] for _ in range(40)], path))


@pytest.mark.parametrize("size", [2**31, 10**15])
def test_an_older_file_cannot_claim_more_than_it_has(path: Path, size: int):
    save({"w": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    wanted = b"cpuq\x06K\x04N"  # the place, and the number of elements
    assert data.count(wanted) == 1
    path.write_bytes(data.replace(wanted, b"cpuq\x06\x8a\x08" + size.to_bytes(8, "little") + b"N"))
    with pytest.raises(CheckpointError, match=MESSAGE + "its tensors have more bytes than the file"):
        tensor_file.read(path)


def change(path: Path, what: str) -> None:
    """Rewrite the archive as torch never would."""
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    match what:
        case "version needed 99":
            for place in range(len(data) - 4):
                if data[place : place + 4] == b"PK\x01\x02":
                    data[place + 6 : place + 8] = struct.pack("<H", 99)
        case "a size beyond the file":
            data[central + 20 : central + 28] = struct.pack("<II", 10**9, 10**9)
        case "a part over another":
            second = data.index(b"PK\x01\x02", central + 4)
            data[second + 42 : second + 46] = data[central + 42 : central + 46]
        case "encrypted":
            data[central + 8] |= 1
        case "a part outside":
            data[central + 42 : central + 46] = struct.pack("<I", 2**31)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "what",
    [
        "version needed 99", "a size beyond the file", "a part over another", "encrypted", "a part outside",
    ],
)  # fmt: skip
def test_an_archive_that_lies_is_refused(path: Path, what: str):
    save({"w": torch.zeros(100)}, path)
    change(path, what)
    with pytest.raises(CheckpointError, match=MESSAGE):
        tensor_file.read(path)


def test_an_archive_of_a_million_parts_is_refused_unread(path: Path):
    part = b"PK\x01\x02" + bytes(24) + struct.pack("<H", 4) + bytes(16) + b"name"
    directory = part * 340_000
    path.write_bytes(
        b"PK\x03\x04" + directory + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 9, 9, len(directory), 4, 0)
    )
    with pytest.raises(CheckpointError, match=MESSAGE + "it is a zip archive of far too many parts"):
        tensor_file.read(path)


@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packed_parts_are_refused(path: Path, how: int):
    write_zip(path, pickle.dumps("x" * 10**6, 2), compress_type=how)
    with pytest.raises(CheckpointError, match=MESSAGE + "its parts are compressed, or overlap"):
        tensor_file.read(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_parts_of_one_name_are_refused(path: Path):
    with zipfile.ZipFile(path, "w") as archive:
        for text in ("a", "b"):
            archive.writestr("archive/data.pkl", pickle.dumps(text, 2))
    with pytest.raises(CheckpointError, match=MESSAGE):
        tensor_file.read(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04", b"PK\x03\x04" + bytes(99), bytes(1000)])
def test_a_file_of_another_kind(path: Path, content: bytes):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=MESSAGE):
        tensor_file.read(path)


def test_pipes_devices_folders_and_missing_files_are_told(path: Path):
    os.mkfifo(path)
    for special in (path, Path("/dev/zero"), path.parent):
        with pytest.raises(CheckpointError, match=r"cannot be read: (it is a .*, not a regular file|Is a directory)"):
            tensor_file.read(special)
    with pytest.raises(CheckpointError, match=r"b\.pt: cannot be read: No such file"):
        tensor_file.read(path.with_name("b.pt"))


@pytest.mark.parametrize("form", ["zip", "older"])
def test_a_damaged_file_is_read_or_refused(path: Path, form: str):
    save({"w": torch.zeros(8), "meta": {"names": ["a", "b"], "lr": 0.1}}, path, **FORMS[form])
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(300):
        hurt = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            hurt[draw.randrange(len(hurt))] = draw.randrange(256)
        path.write_bytes(hurt if draw.random() < 0.7 else hurt[: draw.randrange(len(hurt))])
        try:
            tensor_file.read(path, foreign=True)
        except CheckpointError:
            continue


def test_a_large_valid_file_is_read_as_fast_as_it_should(path: Path):
    many = {f"layer.{number}.weight": torch.zeros(8) for number in range(3000)}
    save({"model": many, "ids": list(range(100_000))}, path)
    begun = time.process_time()
    found = tensor_file.read(path)
    assert time.process_time() - begun < 3
    assert len(found["ids"]) == 100_000


@pytest.mark.parametrize("form", FORMS)
def test_devices_come_back_as_they_were(path: Path, form: str):
    devices = [torch.device("cpu"), torch.device("cuda"), torch.device("cuda", 1)]
    save({"devices": devices, devices[2]: 3}, path, **FORMS[form])
    assert tensor_file.read(path) == {"devices": devices, devices[2]: 3}
