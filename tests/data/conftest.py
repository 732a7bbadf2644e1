"""A local HTTP server whose faults the tests choose."""

from __future__ import annotations

import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest

from data.download import RetryPolicy


class Mirror:
    """An HTTP server with one handler per path; it records the requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str | None]] = []  # (path, Range header)
        self.full_bodies = 0  # responses with the whole file
        self.closing = threading.Event()
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler, int], None]] = {}
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requests.append((self.path, self.headers["Range"]))
                nth = sum(path == self.path for path, _ in mirror.requests)
                if self.path in mirror.answers:
                    mirror.answers[self.path](self, nth)
                else:
                    self.send_error(404)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:  # clients that hang up are part of the tests
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.server_port}{path}"

    def serve(
        self,
        path: str,
        body: bytes,
        *,
        ranges: bool = True,
        cut: Callable[[int], int | None] = lambda nth: None,
        stall: bool = False,
        trickle: float | None = None,
        busy: int = 0,
        delay: float = 0.0,
        length: bool = True,
    ) -> str:
        """Answer `path` with `body`.

        Args:
            ranges: whether Range is supported.
            cut: number of bytes after which the nth response ends; None for all of them.
            stall: where the response is cut, keep the connection open without sending anything.
            trickle: seconds between chunks of 100 bytes.
            busy: number of 503 responses before the first good one.
            delay: seconds before the response.
            length: whether a Content-Length is sent.
        """

        def answer(request: BaseHTTPRequestHandler, nth: int) -> None:
            time.sleep(delay)
            if nth <= busy:
                request.send_error(503)
                return
            start = 0
            if ranges and request.headers["Range"]:
                start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start and start >= len(body):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(body)}")
                request.end_headers()
                return
            request.send_response(206 if start else 200)
            if start:
                request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            if length:
                request.send_header("Content-Length", str(len(body) - start))
            request.end_headers()
            end = cut(nth)
            part = body[start : None if end is None else start + end]
            step = len(part) or 1 if trickle is None else 100
            for at in range(0, len(part), step):
                request.wfile.write(part[at : at + step])
                request.wfile.flush()
                if trickle is not None:
                    self.closing.wait(trickle)
            if stall and end is not None:
                self.closing.wait(30)
            self.full_bodies += part == body

        self.answers[path] = answer
        return self.url(path)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("no_proxy", "*")  # or requests to 127.0.0.1 would go to the machine's proxy
    mirror = Mirror()
    yield mirror
    mirror.close()


@pytest.fixture
def policy() -> RetryPolicy:
    return RetryPolicy(timeout=5.0, attempts=3, backoff=0.01, min_rate=50_000, min_rate_window=0.4)


@pytest.fixture
def short_timeout(policy: RetryPolicy) -> RetryPolicy:
    """For servers that stop sending. Elsewhere a longer timeout keeps slow machines from failing."""
    return replace(policy, timeout=0.3)


@pytest.fixture(scope="session")
def content() -> bytes:
    """300,000 incompressible bytes, so that an archive of them is as long and arrives in several chunks."""
    return np.random.RandomState(0).bytes(300_000)


def zipped(content: bytes, method: int = zipfile.ZIP_DEFLATED, names: tuple[str, ...] = ("enwik8",)) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in names:
            archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture(scope="session")
def archive(content: bytes) -> bytes:
    return zipped(content)


@pytest.fixture(scope="session")
def zip_of() -> Callable[..., bytes]:
    return zipped
