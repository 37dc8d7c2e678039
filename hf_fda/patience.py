"""Asking the Hub again when it is busy or a connection breaks, for requests that its client tries only once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub.errors import HTTPError

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRIES = 4
BUSY = (408, 429, 500, 502, 503, 504)
"""Statuses that may pass."""
BROKEN = (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError, httpx2.TimeoutException)
"""What is raised when a connection breaks that was there."""
LONGEST = 300.0
"""Seconds to wait at most where the Hub says for how long."""


def patiently(call: Callable[[], T], id: str, tries: int = TRIES) -> T:
    """What `call` gives; asked again, after waits of 1, 2 and 4 seconds or as long as the Hub says, where it failed for
    a reason that may pass. The last failure is raised.

    Args:
        call: a request that may be made twice.
        id: the repository, for the log.
        tries: how often it is made at most.
    """
    for tried in range(1, tries):
        try:
            return _bare(call)
        except (HTTPError, OSError) as error:
            seconds = wait_after(error, tried)
            if seconds is None:
                raise
            logger.warning("%s: %s; again in %.0f seconds", id, str(error).splitlines()[0], seconds)
            time.sleep(seconds)
    return _bare(call)


def _bare(call: Callable[[], T]) -> T:
    """What `call` gives, or what really went wrong: the client wraps failed uploads of weights."""
    try:
        return call()
    except RuntimeError as error:
        if isinstance(error.__cause__, (HTTPError, OSError)):
            raise error.__cause__ from None
        raise


def wait_after(error: BaseException, tried: int) -> float | None:
    """Seconds to wait before a request is made again; None: it would fail again.

    Args:
        error: how it failed.
        tried: how often it was made.
    """
    response = getattr(error, "response", None)
    if response is not None:
        if response.status_code not in BUSY:
            return None
        said = response.headers.get("Retry-After", "")
        return min(float(said), LONGEST) if said.isdigit() else float(2 ** (tried - 1))
    return float(2 ** (tried - 1)) if isinstance(error, BROKEN) else None
