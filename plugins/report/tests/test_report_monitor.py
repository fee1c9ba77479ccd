import http.client
import json
import shutil
import socket
import threading

import pytest
from browser import chromium
from detkernel import UserError
from detkernel_report.monitor import MonitorServer
from detkernel_report.results import rows
from report_cases import random_results


def line(step):
    return json.dumps({"mode": "train", "epoch": 1, "iter": step, "step": step, "loss": 8.0 / step}) + "\n"


@pytest.fixture
def work_dir(tmp_path):
    folder = tmp_path / "live"
    (folder / "report").mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {until: 100 iters}\n")
    (folder / "log.jsonl").write_text(line(1) + line(2))
    (folder / "report" / "run.json").write_text('{"state": "running", "iter": 2, "max_iters": 100}\n')
    given = random_results(0, images=3)
    (folder / "report" / "images_val.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows(given)))
    return folder


@pytest.fixture
def server(work_dir):
    with MonitorServer(work_dir) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, headers={"Host": f"127.0.0.1:{server.server_port}"} | headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


def test_it_listens_on_the_loopback_alone(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert server.server_port > 0


def test_the_page_is_the_reports_with_what_renews_it(server):
    answer, text = ask(server)
    assert answer.status == 200
    assert "What to do next" in text
    assert "running, or killed" in text
    assert f'<body data-version="{ask(server, "/version")[1]}">' in text
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1", "localhost:1"])
def test_another_host_is_refused(server, host):
    for path in ("/", "/parts", "/version"):
        answer, text = ask(server, path, Host=host)
        assert answer.status == 403
        assert "live" not in text


def test_localhost_is_this_host(server):
    assert ask(server, Host=f"localhost:{server.server_port}")[0].status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_get_alone_is_answered(server, method):
    assert ask(server, method=method)[0].status == 501


@pytest.mark.parametrize(
    "path", ["/config.yaml", "/../config.yaml", "/report/run.json", "//etc/passwd", "/?x=1", "/%2e%2e/"]
)
def test_no_file_is_served(server, path):
    assert ask(server, path)[0].status == 404


def test_the_version_changes_when_the_run_goes_on(server, work_dir):
    _, before = ask(server, "/version")
    assert ask(server, "/version")[1] == before
    with (work_dir / "log.jsonl").open("a") as log:
        log.write(line(3))
    _, after = ask(server, "/version")
    assert after != before
    parts = json.loads(ask(server, "/parts")[1])
    assert parts["version"] == after
    assert ">3<" in parts["main"]


def test_a_folder_that_is_gone_is_said_and_the_server_lives(server, work_dir):
    shutil.rmtree(work_dir)
    answer, text = ask(server)
    assert answer.status == 503
    assert "there is no such folder" in text
    assert ask(server, "/version")[0].status == 503


def test_a_port_that_is_taken_and_a_folder_that_is_no_run_are_one_message(work_dir, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: .*give another one"):
            MonitorServer(work_dir, port)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run's folder"):
        MonitorServer(tmp_path / "empty")


def test_a_browser_sees_the_run_go_on(server, work_dir, tmp_path):
    with chromium(tmp_path / "profile") as browser:
        browser.open(server.url)
        browser.run("document.querySelector('#data, #config').nextElementSibling")
        browser.run("document.querySelector('main details').open = true")
        count = "document.querySelectorAll('figure.chart button').length"
        before = browser.run(count)
        assert before > 0
        with (work_dir / "log.jsonl").open("a") as log:
            log.write(line(77))
        seen = """new Promise((done) => {
          const end = Date.now() + 20000;
          (function look() {
            if (document.body.textContent.includes("77")) done(true);
            else if (Date.now() > end) done(false);
            else setTimeout(look, 100);
          })();
        })"""
        assert browser.run(seen)
        assert browser.run("document.querySelector('main details').open")
        assert browser.run(count) == before
        assert browser.problems == []
