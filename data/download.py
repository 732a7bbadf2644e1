"""Download one file over HTTP with time limits, retries, and resumption of partial downloads."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from data.errors import DownloadError

CHUNK = 1 << 16  # bytes read at a time
RETRYABLE = {408, 429, 500, 502, 503, 504}  # HTTP statuses that are worth a retry

log = logging.getLogger("data")


@dataclass(frozen=True)
class RetryPolicy:
    """Time limits and number of attempts of a download."""

    timeout: float = 15.0  # seconds to wait for a connection, and for the next byte
    attempts: int = 4  # consecutive failures without progress before giving up
    backoff: float = 0.5  # seconds before the second attempt; doubles with each further one
    min_rate: float = 1000.0  # bytes/s; give up on a server that is slower than this...
    min_rate_window: float = 30.0  # ...averaged over this many seconds


def fetch(url: str, target: Path, policy: RetryPolicy) -> None:
    """Download a file to `target`, resuming if `target` already holds the beginning of it.

    After a failure `target` keeps the bytes received so far, and a later call continues from there. The content is not
    verified; that is up to the caller.

    Args:
        url: an http or https address.
        target: the file to write, used for this URL only, as its content is taken for the beginning of the file.
        policy: time limits and retries.

    Raises:
        DownloadError: the server cannot be reached, refuses the request, is too slow, or keeps closing the connection.
    """
    if not url.startswith(("http://", "https://")):
        raise DownloadError("not an http or https address")
    log.info("downloading %s", url)
    started, progress, failures = time.monotonic(), _size(target), 0
    while True:
        try:
            _attempt(url, target, policy)
            break
        except (OSError, HTTPException) as error:
            unreachable = isinstance(error, URLError) and not failures
            if _size(target) > progress:
                progress, failures = _size(target), 0
            failures += 1
            # Without a network, retries do not help.
            if unreachable or failures >= policy.attempts:
                if not _size(target):
                    target.unlink(missing_ok=True)
                raise DownloadError(_reason(error)) from error
        time.sleep(policy.backoff * 2 ** (failures - 1))
    log.info("downloaded %s bytes in %.0f s", f"{_size(target):,}", time.monotonic() - started)


def _attempt(url: str, target: Path, policy: RetryPolicy) -> None:
    """Send one request. Raises OSError or HTTPException if a retry may succeed, DownloadError if not."""
    offset = _size(target)
    headers = {"User-Agent": "enwik8-loader/1.0"}  # some servers refuse urllib's own
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        response = urlopen(Request(url, headers=headers), timeout=policy.timeout)
    except HTTPError as error:
        error.close()
        if error.code == 416 and offset:  # range not satisfiable: no bytes after the offset
            if error.headers.get("Content-Range") == f"bytes */{offset}":
                return
            target.unlink()
            raise ConnectionError("the file has changed on the server") from error
        if error.code in RETRYABLE:
            raise ConnectionError(f"HTTP {error.code} {error.reason}") from error
        raise DownloadError(f"HTTP {error.code} {error.reason}") from error
    except ValueError as error:
        raise DownloadError(f"not an address: {error}") from error
    with response:
        _receive(response, target, offset, policy)


def _receive(response: HTTPResponse, target: Path, offset: int, policy: RetryPolicy) -> None:
    """Append the body of a response to the `offset` bytes of `target`, or replace them."""
    resumed = response.status == 206  # with 200, the server ignored Range and sends the whole file
    if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
        target.unlink(missing_ok=True)
        raise ConnectionError("the server sent another range than the requested one")
    received = offset if resumed else 0
    total = None if response.length is None else received + response.length
    with (
        open(target, "ab" if resumed else "wb") as file,
        # disable=None shows the bar on terminals only.
        tqdm(desc="downloading", total=total, initial=received, unit="B", unit_scale=True, disable=None) as bar,
    ):
        window_start, window_bytes = time.monotonic(), 0
        # read1 returns what has arrived; read would wait for a full chunk, for hours if the server is slow.
        while received != total and (chunk := response.read1(CHUNK)):
            file.write(chunk)
            bar.update(len(chunk))
            received += len(chunk)
            window_bytes += len(chunk)
            seconds = time.monotonic() - window_start
            if seconds >= policy.min_rate_window:
                if window_bytes < policy.min_rate * seconds:
                    raise DownloadError(f"too slow: {window_bytes:,} bytes in {seconds:.0f} s")
                window_start, window_bytes = time.monotonic(), 0
    if total is not None and received < total:
        raise ConnectionError(f"connection closed after {received:,} of {total:,} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    """Describe briefly why a request failed, without error numbers."""
    cause = getattr(error, "reason", error)  # URLError wraps the actual error
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return " ".join(text.split())[:100]
