"""Fetch one file over HTTP, patiently: time limits, retries, and resuming where the last attempt broke off."""

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
BUSY = {408, 429, 500, 502, 503, 504}  # HTTP statuses that may be gone a second later

log = logging.getLogger("data")


@dataclass(frozen=True)
class RetryPolicy:
    """How long to bear with a server."""

    timeout: float = 15.0  # seconds to connect, and seconds without a single byte
    attempts: int = 4  # failures in a row, none of which brought the file further
    backoff: float = 0.5  # seconds before the second attempt; doubles from there
    min_rate: float = 1000.0  # bytes per second: a server slower than this...
    min_rate_window: float = 30.0  # ...over that many seconds is given up


def fetch(url: str, target: Path, patience: RetryPolicy) -> None:
    """Download a file to `target`, going on behind what already lies there.

    After a failure `target` holds what has arrived (if anything), for a later call to continue. Nothing is said here
    about whether the content is right: that is for the caller to verify.

    Args:
        url: an http or https address.
        target: where to write; must belong to this url alone, as its content is taken for the beginning of the file.
        patience: when to retry and when to give up.

    Raises:
        DownloadError: the server cannot be reached, refuses, is too slow, or keeps breaking off.
    """
    if not url.startswith(("http://", "https://")):
        raise DownloadError("not an http or https address")
    log.info("downloading %s", url)
    started, furthest, failures = time.monotonic(), _size(target), 0
    while True:
        try:
            _attempt(url, target, patience)
            break
        except (OSError, HTTPException) as error:
            nobody_there = isinstance(error, URLError) and not failures
            if _size(target) > furthest:
                furthest, failures = _size(target), 0
            failures += 1
            # A machine without network must not wait for retries that cannot help.
            if nobody_there or failures >= patience.attempts:
                if not _size(target):
                    target.unlink(missing_ok=True)
                raise DownloadError(_reason(error)) from error
        time.sleep(patience.backoff * 2 ** (failures - 1))
    log.info("downloaded %s bytes in %.0f s", f"{_size(target):,}", time.monotonic() - started)


def _attempt(url: str, target: Path, patience: RetryPolicy) -> None:
    """One request. Raises OSError or HTTPException where another may succeed, DownloadError where none will."""
    have = _size(target)
    headers = {"User-Agent": "enwik8-loader/1.0"}  # some servers refuse urllib's own
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urlopen(Request(url, headers=headers), timeout=patience.timeout)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:  # there is nothing behind what we have
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
            target.unlink()
            raise ConnectionError("the file has changed on the server") from error
        if error.code in BUSY:
            raise ConnectionError(f"HTTP {error.code} {error.reason}") from error
        raise DownloadError(f"HTTP {error.code} {error.reason}") from error
    except ValueError as error:
        raise DownloadError(f"not an address: {error}") from error
    with response:
        _receive(response, target, have, patience)


def _receive(response: HTTPResponse, target: Path, have: int, patience: RetryPolicy) -> None:
    """Write the body of a response behind the `have` bytes of `target`, or in place of them."""
    resumed = response.status == 206  # 200: this server ignores Range and sends everything again
    if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        target.unlink(missing_ok=True)
        raise ConnectionError("the server sent another part of the file than it was asked for")
    received = have if resumed else 0
    total = None if response.length is None else received + response.length
    with (
        open(target, "ab" if resumed else "wb") as file,
        # disable=None: a bar where a person watches, nothing where the output goes to a file.
        tqdm(desc="downloading", total=total, initial=received, unit="B", unit_scale=True, disable=None) as bar,
    ):
        window_start, window_bytes = time.monotonic(), 0
        # read1 hands over what has come; read would wait for a full chunk, hours from a server that trickles.
        while received != total and (chunk := response.read1(CHUNK)):
            file.write(chunk)
            bar.update(len(chunk))
            received += len(chunk)
            window_bytes += len(chunk)
            seconds = time.monotonic() - window_start
            if seconds >= patience.min_rate_window:
                if window_bytes < patience.min_rate * seconds:
                    raise DownloadError(f"too slow: {window_bytes:,} bytes in {seconds:.0f} s")
                window_start, window_bytes = time.monotonic(), 0
    if total is not None and received < total:
        raise ConnectionError(f"broke off after {received:,} of {total:,} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    """Why a request failed, in a few words and without error numbers."""
    cause = getattr(error, "reason", error)  # URLError wraps the error that matters
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return " ".join(text.split())[:100]
