"""`detkernel download`: against a server that cuts, stalls, lies and refuses, and archives that want out."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import attrs
import pytest
from click.testing import CliRunner, Result
from detkernel import DataError, UserError
from detkernel_data.download import command, fetch
from detkernel_data.download.published import SETS, File, Published, hint
from detkernel_data.download.unpack import unpack
from detkernel_data.formats.coco import Coco
from detkernel_data.formats.voc import Voc

IMAGE = os.urandom(300_000)


def archive(**files: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, content in (files or {"images/1.jpg": IMAGE}).items():
            file.writestr(name, content)
    return made.getvalue()


GOOD = archive()


@attrs.define
class Server:
    """What it does to each request in turn; afterwards it behaves."""

    address: str = ""
    content: bytes = GOOD
    faults: list[str] = attrs.field(factory=list)
    asked: list[str] = attrs.field(factory=list)
    released: threading.Event = attrs.field(factory=threading.Event)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range", "")
        self.asked.append(asked)
        fault = self.faults.pop(0) if self.faults else ""
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and fault != "no ranges" else 0
        if fault.isdigit():
            handler.send_error(int(fault))
            return
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        if start:
            given = start + (7 if fault == "wrong range" else 0)
            handler.send_header("Content-Range", f"bytes {given}-{len(self.content) - 1}/{len(self.content)}")
        length = len(body) + {"too long": 1000, "too short": -1000}.get(fault, 0)
        if fault != "no length":
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if fault in ("cut", "stall"):
            body = body[: len(body) // 3]
        handler.wfile.write(body)
        handler.wfile.flush()
        if fault == "stall":
            self.released.wait(10)
        handler.close_connection = True


@pytest.fixture
def server(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.answer(self)

        def log_message(self, *_: object) -> None:
            """Nothing on standard error."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made.address = f"http://127.0.0.1:{http.server_address[1]}"
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    monkeypatch.setattr(fetch, "TIMEOUT", 0.3)
    offer(made, monkeypatch)
    yield made
    made.released.set()
    http.shutdown()
    thread.join()
    http.server_close()


def offer(server: Server, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    md5 = hashlib.md5(server.content).hexdigest()
    file = File(f"{server.address}/set.zip", len(server.content), md5, proof="images/1.jpg")
    published = Published("a set", "set", (attrs.evolve(file, **changes),), "a licence")  # type: ignore[arg-type]
    monkeypatch.setitem(SETS, "set", published)


def run(*words: str) -> Result:
    return CliRunner().invoke(command.download, ["set", "--yes", *words])


def refused(*words: str) -> str:
    result = run(*words)
    assert isinstance(result.exception, UserError), result.exception or result.output
    return str(result.exception)


def whole() -> bool:
    path = Path("data/set/images/1.jpg")
    return path.exists() and path.read_bytes() == IMAGE


def test_a_set_is_fetched_once_and_its_size_is_told_before(server: Server):
    output = run().output
    assert whole()
    assert output.startswith("a set (a licence)\n  set.zip")
    assert "to download: 300 kB into data/set" in output
    assert list(Path("data/set").rglob("*.zip")) == []
    assert "nothing to download" in run().output
    assert len(server.asked) == 1


def test_sets_are_listed():
    output = CliRunner().invoke(command.download, env={"COLUMNS": "80"}).output
    assert "COCO 2017: 80 classes" in output
    assert "(20.4 GB)" in " ".join(output.split())
    assert max(map(len, output.splitlines())) <= 80
    result = CliRunner().invoke(command.download, ["voc2006"])
    assert "there is no data set 'voc2006', did you mean 'voc2007'?" in str(result.exception)


def test_nobody_to_ask(server: Server):
    result = CliRunner().invoke(command.download, ["set"])
    assert "nobody can be asked whether to download this: give --yes" in str(result.exception)
    assert server.asked == []


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_what_is_cut_is_gone_on_with(server: Server, fault: str):
    server.faults = [fault, fault]
    assert run().exit_code == 0
    assert whole()
    third = len(GOOD) // 3
    assert server.asked == ["", f"bytes={third}-", f"bytes={third + (len(GOOD) - third) // 3}-"]


def test_a_later_run_goes_on(server: Server):
    server.faults = ["cut", *["503"] * 5]
    message = refused()
    assert "the server answers 503 Service Unavailable, 5 times in a row" in message
    assert f"{len(GOOD) // 3:,} bytes are kept in data/set/.downloads/set.zip.part" in message
    assert "100 kB of it are here" in run().output
    assert whole()
    assert server.asked[-1] == f"bytes={len(GOOD) // 3}-"


def test_a_server_without_ranges(server: Server):
    server.faults = ["cut", "no ranges"]
    assert run().exit_code == 0
    assert whole()


@pytest.mark.parametrize("code", ["404", "403"])
def test_a_refusal_is_final(server: Server, code: str):
    server.faults = [code]
    assert f"the server answers {code} " in refused()
    assert len(server.asked) == 1


@pytest.mark.parametrize("fault", ["too long", "too short"])
def test_a_wrong_length_is_refused_at_once(server: Server, fault: str):
    server.faults = [fault]
    expected = len(GOOD) + {"too long": 1000, "too short": -1000}[fault]
    assert f"the server has a file of {expected:,} bytes; expected {len(GOOD):,}; `--mirror URL`" in refused()
    assert not whole()


def test_more_than_was_announced(server: Server):
    server.faults, server.content = ["no length"], GOOD + b"x" * 1000
    assert f"the server sends more than the {len(GOOD):,} bytes" in refused()


def test_another_part_than_was_asked_for(server: Server):
    server.faults = ["cut", "wrong range"]
    assert "the server sends another part than was asked for" in refused()


def test_a_wrong_sum_is_refused_and_not_kept(server: Server, monkeypatch: pytest.MonkeyPatch):
    server.content = archive(**{"images/1.jpg": IMAGE[::-1]})
    message = refused()
    assert f"its MD5 sum is {hashlib.md5(server.content).hexdigest()}; expected" in message
    assert list(Path("data/set/.downloads").iterdir()) == []
    server.content = GOOD
    assert run().exit_code == 0


def test_a_file_of_no_known_size(server: Server, monkeypatch: pytest.MonkeyPatch):
    offer(server, monkeypatch, size=0, md5="")
    server.faults = ["no length"]
    assert "no size or MD5 is published" in run().output
    assert whole()


def test_a_mirror(server: Server, monkeypatch: pytest.MonkeyPatch):
    offer(server, monkeypatch, url="http://127.0.0.1:9/nowhere/set.zip")
    assert "times in a row" in refused()
    assert run("--mirror", f"{server.address}/").exit_code == 0
    assert whole()
    assert "not an address" in refused_again(monkeypatch)


def refused_again(monkeypatch: pytest.MonkeyPatch) -> str:
    Path("data/set/images/1.jpg").unlink()
    return refused("--mirror", "nonsense")


def test_an_archive_without_what_is_expected(server: Server, monkeypatch: pytest.MonkeyPatch):
    offer(server, monkeypatch, proof="images/2.jpg")
    assert "data/set/images/2.jpg is not there: another archive" in refused()


def test_the_archive_is_kept_on_request(server: Server):
    run("--keep")
    Path("data/set/images/1.jpg").unlink()
    assert run().exit_code == 0
    assert whole()
    assert len(server.asked) == 1


def test_an_unpacking_that_was_cut_short_is_done_again(server: Server):
    run("--keep")
    Path("data/set/.downloads/set.zip.unpacking").touch()
    assert "set.zip: 1 file" in run().output


def test_a_disk_that_is_full(server: Server, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert "do not fit in the 1.0 kB that are free" in refused()
    assert server.asked == []


def zipped(path: Path, name: str, content: bytes = b"x", mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        info = zipfile.ZipInfo(name)
        info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
        file.writestr(info, content)
    return path


OUTSIDE = ["../out.txt", "/out.txt", "a/../../out.txt", "..\\out.txt", "C:\\out.txt", "\\out.txt"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_is_written_outside(here: Path, name: str):
    path = here / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("first.txt", "fine")
        file.writestr(name, "y")
    with pytest.raises(UserError, match="would be written outside of the folder"):
        unpack(path, here / "d")
    assert list((here / "d").iterdir()) == []
    assert not (here / "out.txt").exists()


def test_links_are_refused(here: Path):
    with pytest.raises(UserError, match=r"'l' is a link or a device"):
        unpack(zipped(here / "a.zip", "l", b"/etc/passwd", stat.S_IFLNK | 0o777), here / "d")
    with tarfile.open(here / "a.tar", "w") as file:
        link = tarfile.TarInfo("l")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        file.addfile(link)
    with pytest.raises(UserError, match=r"'l' is a link or a device"):
        unpack(here / "a.tar", here / "d")
    assert list((here / "d").iterdir()) == []


def test_bombs_are_refused(here: Path):
    with pytest.raises(UserError, match="it says that it unpacks to 50,000,000 bytes"):
        unpack(zipped(here / "a.zip", "b", bytes(50_000_000)), here / "d")
    with tarfile.open(here / "a.tar.gz", "w:gz") as file:
        big = tarfile.TarInfo("b")
        big.size = 50_000_000
        file.addfile(big, io.BytesIO(bytes(big.size)))
    with pytest.raises(UserError, match="it unpacks to more than"):
        unpack(here / "a.tar.gz", here / "d")
    assert list((here / "d").iterdir()) == []


def test_damaged_archives(here: Path):
    good = archive(**{"a.txt": b"hello hello hello"})
    (here / "a.zip").write_bytes(good.replace(b"hello hello", b"hallo hello"))
    with pytest.raises(UserError, match=r"a.zip: it cannot be unpacked \(Bad CRC-32"):
        unpack(here / "a.zip", here / "d")
    (here / "b.tar").write_bytes(b"no archive at all")
    with pytest.raises(UserError, match=r"b.tar: it cannot be unpacked"):
        unpack(here / "b.tar", here / "d")
    with zipfile.ZipFile(here / "c.zip", "w") as file:
        file.writestr("a.txt", "1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("a.txt", "2")
    with pytest.raises(UserError, match=r"'a\.txt' is in it twice"):
        unpack(here / "c.zip", here / "d")


def test_a_tar_is_merged_with_what_is_there(here: Path):
    (here / "d/kit").mkdir(parents=True)
    (here / "d/kit/old.txt").write_text("old")
    with tarfile.open(here / "a.tar", "w") as file:
        new = tarfile.TarInfo("kit/new.txt")
        new.size = 3
        file.addfile(new, io.BytesIO(b"new"))
    assert unpack(here / "a.tar", here / "d") == 1
    assert sorted(path.name for path in (here / "d/kit").iterdir()) == ["new.txt", "old.txt"]


def test_missing_data_names_the_command(here: Path):
    for dataset in (
        Voc(root=Path("data/VOCdevkit/VOC2007"), split="train"),
        Coco(annotation_file=Path("data/coco/annotations/instances_val2017.json"), image_folder=Path("data/coco")),
    ):
        with pytest.raises(DataError, match=r"; `detkernel download (voc2007|coco2017)` fetches it into data/"):
            dataset.load()
    assert "`detkernel download voc2007`" in hint(Path("data/VOCdevkit/VOC2007/Annotations"))
    assert "`detkernel download coco2017`" in hint(Path("data/coco/annotations/instances_val2017.json"))
    assert "`detkernel download lvis`" in hint(Path("x/lvis_v1_train.json"))
    assert hint(Path("data/cells/train.json")) == ""
