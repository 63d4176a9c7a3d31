"""A real S3 protocol server (moto's) on loopback, behind an HTTP proxy that injects faults into chosen requests."""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from moto.server import ThreadedMotoServer

ERRORS = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied"}
DROPPED = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass(frozen=True)
class Request:
    """What a fault is chosen by: ``number`` counts from 1 since the plan was set."""

    number: int
    method: str
    path: str


Plan = Callable[[Request], "int | str | float | None"]


@dataclass
class S3:
    """The server as clients see it. ``plan`` says what happens to a request: None passes it on; 500, 503 and 403 are
    answered in its place; ``cut`` passes it on and ends the connection in the middle of the answer, ``lose`` before
    it; a float waits for so many seconds first."""

    port: int = 0
    plan: Plan = lambda request: None
    seen: list[Request] = field(default_factory=list)
    faults: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def failing(self, plan: Plan) -> Iterator[S3]:
        """Follow a plan for a while; ``seen`` and ``faults`` are of this while."""
        with self.lock:
            self.plan, self.seen, self.faults = plan, [], 0
        try:
            yield self
        finally:
            self.plan = lambda request: None

    def note(self, method: str, path: str) -> int | str | float | None:
        with self.lock:
            request = Request(len(self.seen) + 1, method, path)
            self.seen.append(request)
            fault = self.plan(request)
            self.faults += fault is not None
        return fault


@contextlib.contextmanager
def serve() -> Iterator[S3]:
    """Start both servers on free ports; stop them in the end."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    backend, s3 = moto.get_host_and_port(), S3()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # it would hold back every body until the headers are acknowledged

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle_one_request()

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = s3.note(self.command, self.path)
            if isinstance(fault, int):
                code = ERRORS[fault]
                text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected {code}</Message></Error>"
                self.answer(fault, [("Content-Type", "application/xml")], text.encode())
                return
            if isinstance(fault, float):
                time.sleep(fault)
            connection = http.client.HTTPConnection(*backend)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            content = response.read()
            connection.close()
            if fault == "lose":
                self.reset()
            elif fault == "cut":
                self.answer(response.status, response.getheaders(), content, send=len(content) // 2)
                self.reset()
            else:
                self.answer(response.status, response.getheaders(), content)

        def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, send: int | None = None) -> None:
            length = {name.lower(): value for name, value in headers}.get("content-length", str(len(content)))
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in DROPPED:
                    self.send_header(name, value)
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
            self.end_headers()
            self.wfile.write(content[:send])

        def reset(self) -> None:
            """End the connection as a machine that fails does, with a reset and not a farewell."""
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def log_message(self, *args: object) -> None:
            pass

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    s3.port = proxy.server_address[1]
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield s3
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        moto.stop()
