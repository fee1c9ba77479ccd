"""Weights of MMDetection's zoo by name, from a server of the tests."""

from __future__ import annotations

import hashlib
import io
import logging
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detkernel import CheckpointError, ConfigError, UserError
from detkernel_detection import downloads
from detkernel_detection.downloads import digest_in
from detkernel_detectors import zoo
from detkernel_detectors.backbones import Resnet
from detkernel_detectors.heads import Towers
from detkernel_detectors.models.network import Network
from detkernel_detectors.models.retinanet import Retinanet
from detkernel_detectors.necks import Fpn

CLASSES = ["cat", "dog"]
OPTIONS: dict[str, Any] = {
    "backbone": Resnet(depth=18, channels=4, stages=2),
    "neck": Fpn(channels=8, extra=0),
    "head": Towers(convs=1, channels=8),
}
CODE = b"cbuiltins\neval\n(S'1/0'\ntR."


class Server(ThreadingHTTPServer):
    """Serves `files`, each whole, cut off at half or silent from there on, and counts what it was asked for."""

    daemon_threads = True
    files: dict[str, bytes]
    cut = False
    silent: threading.Event | None = None
    asked: list[str]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append(self.path)
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if server.cut or server.silent else content)
        if server.silent:
            server.silent.wait()

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A zoo of its own, and a folder of downloads."""
    served = Server(("127.0.0.1", 0), Handler)
    served.files, served.asked = {}, []
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("DETKERNEL_MMDET_ZOO", f"http://127.0.0.1:{served.server_port}/zoo/")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield served
    served.shutdown()
    served.server_close()
    thread.join()


def load(name: str) -> Network:
    plugin = Retinanet(weights=f"mmdet:{name}", **OPTIONS)
    run: Any = SimpleNamespace(classes=tuple(CLASSES), log=logging.getLogger("detkernel"))
    model = Network(plugin, CLASSES)
    plugin.load(run, model)
    return model


def published() -> tuple[dict[str, torch.Tensor], bytes]:
    """Weights under MMDetection's names, and a file of them as its zoo has them."""
    own = Network(Retinanet(**OPTIONS), CLASSES).state_dict()
    theirs = {}
    for name, value in own.items():
        name = re.sub(r"^neck\.laterals\.(\d+)\.", r"neck.lateral_convs.\1.conv.", name)
        name = re.sub(r"^neck\.outputs\.(\d+)\.", r"neck.fpn_convs.\1.conv.", name)
        name = re.sub(r"^head\.(cls|reg)_convs\.(\d+)\.(\d+\.)?", r"bbox_head.\1_convs.\2.conv.", name)
        theirs[re.sub(r"^head\.(cls|reg)\.", r"bbox_head.retina_\1.", name)] = value
    file = io.BytesIO()
    torch.save({"meta": {"CLASSES": tuple(CLASSES)}, "state_dict": theirs}, file)
    return own, file.getvalue()


def named(content: bytes) -> str:
    return f"v2.0/retinanet/small/small_20200130-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def test_weights_are_downloaded_by_the_name_of_a_config_once(server: Server, monkeypatch: pytest.MonkeyPatch):
    own, content = published()
    stamp = f"_20200130-{hashlib.sha256(content).hexdigest()[:8]}"
    monkeypatch.setitem(zoo.ZOO, "small_1x_coco", zoo.Published("v2.0/retinanet", "small", stamp))
    server.files[f"/zoo/{named(content)}"] = content
    for _ in range(2):
        for name, value in load("small_1x_coco").state_dict().items():
            assert torch.equal(value, own[name]), name
    assert server.asked == [f"/zoo/{named(content)}"], "the second time it is there"
    [kept] = (Path(torch.hub.get_dir()) / "checkpoints").iterdir()
    assert kept.read_bytes() == content


def test_weights_are_downloaded_by_a_path_and_by_an_address(server: Server):
    own, content = published()
    address = f"http://127.0.0.1:{server.server_port}/elsewhere/a-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files |= {f"/zoo/{named(content)}": content, address.split(str(server.server_port))[1]: content}
    for name in (named(content), address):
        found = load(name).state_dict()
        assert all(torch.equal(value, own[key]) for key, value in found.items())
    assert len(server.asked) == 2


@pytest.mark.parametrize("cut", [False, True])
def test_a_file_of_another_hash_and_one_cut_off_are_told_and_not_kept(cut: bool, server: Server):
    content = published()[1]
    path = named(content) if cut else "v2.0/small-00000000.pth"
    server.files[f"/zoo/{path}"] = content
    server.cut = cut
    with pytest.raises(UserError, match=r"small.*\.pth from http://.* is not the file that its name says: its SHA-256"):
        load(path)
    assert list((Path(torch.hub.get_dir()) / "checkpoints").iterdir()) == []
    if cut:
        server.cut = False
        load(path)


def test_a_server_that_falls_silent_is_told(server: Server, monkeypatch: pytest.MonkeyPatch):
    content = published()[1]
    server.files[f"/zoo/{named(content)}"] = content
    server.silent = threading.Event()
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    with pytest.raises(UserError, match=r"small.*\.pth cannot be downloaded from http://.* \(timed out\)"):
        load(named(content))
    server.silent.set()
    assert socket.getdefaulttimeout() is None
    assert list((Path(torch.hub.get_dir()) / "checkpoints").iterdir()) == []


def test_a_file_that_is_not_there_and_a_server_that_is_not_there_are_told(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(
        UserError, match=r"cannot be downloaded from http://127.*/zoo/v2.0/.*\.pth \(Not Found\); where"
    ):
        load("retinanet_r50_fpn_1x_coco")
    monkeypatch.setenv("DETKERNEL_MMDET_ZOO", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"cannot be downloaded from http://127.*\(.*refused.*\); where there is no net"
    ):
        load("retinanet_r50_fpn_1x_coco")
    monkeypatch.setenv("DETKERNEL_MMDET_ZOO", "nowhere")
    with pytest.raises(ConfigError, match=r"begins with http:// or https://, got 'nowhere/v2.*DETKERNEL_MMDET_ZOO"):
        load("retinanet_r50_fpn_1x_coco")
    assert list((Path(torch.hub.get_dir()) / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "retinanet_r50_fpn_1x_cocoo",
            r"MMDetection publishes no 'retinanet_r50_fpn_1x_cocoo' .*did you mean 'retinanet_r50_fpn_1x_coco'",
        ),
        ("rtmdet", r"MMDetection publishes no 'rtmdet' that is known here.*mmdet:v2\.0/FAMILY/CONFIG/FILE\.pth"),
        ("v2.0/a/a_20200130.pth", r"'v2\.0/a/a_20200130\.pth' does not end with eight digits of its SHA-256"),
        ("file:///etc/a-01234567.pth", "expected an address that begins with http:// or https://, got 'file:///etc"),
    ],
)
def test_a_name_that_means_nothing_is_told(name: str, message: str):
    with pytest.raises(ConfigError, match=f"weights: {message}"):
        load(name)


@pytest.mark.parametrize(
    ("content", "message"), [(b"not a file of torch", r"cannot be read as weights"), (CODE, "harm|cannot|not loaded")]
)
def test_what_is_downloaded_is_read_as_safely_as_any_file(content: bytes, message: str, server: Server):
    server.files[f"/zoo/{named(content)}"] = content
    with pytest.raises(CheckpointError, match=message):
        load(named(content))


def test_a_pickle_that_calls_something_is_refused(server: Server):
    file = io.BytesIO()
    torch.save({"state_dict": {"a": Harmful()}}, file)
    server.files[f"/zoo/{named(file.getvalue())}"] = file.getvalue()
    with pytest.raises(CheckpointError, match="it is not loaded, since that could run code"):
        load(named(file.getvalue()))


class Harmful:
    def __reduce__(self) -> Any:
        return (eval, ("1/0",))


def test_every_published_file_is_named_by_its_hash():
    assert all(digest_in(one.path) and re.match(r"v[23]\.0/\w+/", one.path) for one in zoo.ZOO.values())
    assert len({one.path for one in zoo.ZOO.values()}) == len(zoo.ZOO)
    names = {"a-f37072fd.pth": "f37072fd", "a_f37072fd.pth": "f37072fd", "a_20210419.pth": None, "a.pth": None}
    assert {name: digest_in(name) for name in names} == names
