"""`detkernel monitor`: the page of a run, live, for the browsers of this machine alone.

The server listens on the loopback interface and answers GET alone. The `Host` that a browser names must be this
address: otherwise a foreign page could be read here through a name of its own that leads to 127.0.0.1.
"""

from __future__ import annotations

import json
import threading
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import attrs
from detkernel import UserError
from detkernel.errors import relative

from detkernel_report.html import asset, policy
from detkernel_report.page import report, report_parts
from detkernel_report.record import FOLDER
from detkernel_report.run_folder import CONTENT, read_run

ADDRESS = "127.0.0.1"
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@attrs.define(eq=False)
class LivePage:
    """What a run's folder says now; made anew only when a file has changed."""

    path: Path
    _lock: threading.Lock = attrs.field(factory=threading.Lock)
    _made: tuple[str, str, str] = ("", "", "")
    """The version, the whole page, and its parts as JSON."""

    def version(self) -> str:
        """Changes when a file of the run does: names, sizes and times of change."""
        marks = []
        for name in (*CONTENT, f"{FOLDER}/images"):
            path = self.path / name
            for one in (path, *(sorted(path.iterdir()) if path.is_dir() else ())):
                try:
                    status = one.lstat()
                except OSError:
                    continue  # just renamed
                marks.append((str(one), status.st_size, status.st_mtime_ns))
        return blake2b(repr(marks).encode(errors="replace"), digest_size=8).hexdigest()

    def current(self) -> tuple[str, str, str]:
        """(version, page, parts). Raises UserError where the folder is gone."""
        version = self.version()
        with self._lock:
            if version != self._made[0]:
                run = read_run(self.path)
                header, main = report_parts(run)
                parts = json.dumps({"version": version, "header": header, "main": main})
                self._made = (version, report(run, version), parts)
            return self._made


class _Handler(BaseHTTPRequestHandler):
    """GET / is the page, GET /version what it goes by, GET /parts its content."""

    server: MonitorServer
    server_version = "detkernel"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        if self.headers.get("Host", "") not in self.server.hosts:
            self._answer(403, "text/plain", f"this server answers to {self.server.url} alone\n")
            return
        try:
            version, page, parts = self.server.page.current()
        except (UserError, OSError) as error:
            self._answer(503, "text/plain", f"{error}\n")
            return
        answers = {
            "/": ("text/html", page),
            "/version": ("text/plain", version),
            "/parts": ("application/json", parts),
        }
        kind, text = answers.get(self.path, ("", ""))
        if kind:
            self._answer(200, kind, text)
        else:
            self._answer(404, "text/plain", "there is nothing here; the page is at /\n")

    def _answer(self, status: int, kind: str, text: str) -> None:
        content = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        for name, value in {**HEADERS, "Content-Security-Policy": self.server.policy}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing: the terminal is the user's."""


class MonitorServer(ThreadingHTTPServer):
    """Serves one run. `port` 0: one that is free."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, path: Path, port: int = 0) -> None:
        """Raises UserError for what is not a run's folder, and for a port that is taken."""
        read_run(path)
        self.page = LivePage(path)
        scripts = [asset("page.js"), asset("live.js")]
        self.policy = policy(asset("page.css"), scripts, live=True) + "; frame-ancestors 'none'"
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise UserError(
                f"--port {port}: {error.strerror}; give another one, or leave it out for one that is free"
            ) from None
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, _request: Any, _client: Any) -> None:
        """A browser that went away is no mistake."""


def serve(path: Path, port: int, said: Any) -> None:
    """Until Ctrl-C. `said` is called with what to print."""
    with MonitorServer(path, port) as server:
        said(f"watching {relative(path)} at {server.url} (Ctrl-C ends it; the run is not touched)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            said("ended")
