import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from detkernel_detection.testing import TinyDetector, tiny_run
from webhook import Webhook


@pytest.fixture
def server():
    heard = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", heard
    server.shutdown()
    server.server_close()
    thread.join()


def test_tells_of_validations_and_the_end(server, tmp_path):
    url, heard = server
    tiny_run({"webhook": Webhook(url=url)}, until="4 iters", validate="every 2 iters", work_dir=tmp_path / "cats")
    assert heard == ["cats, iteration 2: validated", "cats, iteration 4: validated", "cats is done: 4 iterations"]


def test_tells_of_failures(server, tmp_path):
    url, heard = server
    with pytest.raises(TypeError):
        tiny_run({"webhook": Webhook(url=url), "model": TinyDetector(dropout=None)}, work_dir=tmp_path / "cats")
    assert heard[0].startswith("cats failed in iteration 0: TypeError")


def test_a_dead_address_stops_nothing(tmp_path, caplog):
    run = tiny_run({"webhook": Webhook(url="http://127.0.0.1:9", timeout=0.5)}, until="2 iters", work_dir=tmp_path)
    assert run.iter == 2
    assert "not delivered" in caplog.text
