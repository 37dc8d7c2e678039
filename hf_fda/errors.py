"""The two ways a merge can fail, each with a message that names the thing and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TypeVar


class HFFDAError(Exception):
    """Base of every error this package raises on purpose.

    `agreed` says whether every one of several processes raises it, so that it needs to be said only once.
    """

    agreed: bool = False


class InputError(HFFDAError, ValueError):
    """An argument or an input cannot be used. Raised before any work starts; nothing was written."""


class UnreachableError(InputError):
    """The Hub gives no answer, or refuses one: whether the input can be used is not known."""


class RunError(HFFDAError, RuntimeError):
    """The work failed on the way. What was finished stays on disk; the same call goes on from there."""


class PeerError(RunError):
    """This process stops because another one that worked on the same merge failed or was killed."""


@contextmanager
def about(what: str) -> Iterator[None]:
    """A failure of the work inside says what it is about.

    >>> with about("block 'encoder.layer.0'"):
    ...     raise RunError("the loss is nan")
    Traceback (most recent call last):
    ...
    hf_fda.errors.RunError: block 'encoder.layer.0': the loss is nan
    """
    try:
        yield
    except PeerError:  # not this work's
        raise
    except RunError as error:
        raise RunError(f"{what}: {error}") from None


E = TypeVar("E", bound=HFFDAError)


def agreed(error: E) -> E:
    """An error marked as one that every process raises."""
    error.agreed = True
    return error


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped word.

    >>> nearest("task_aritmetic", ["linear", "task_arithmetic"])
    "did you mean 'task_arithmetic'? Known: linear, task_arithmetic."
    """
    names = list(known)
    close = get_close_matches(word, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(names)}."


def few(names: Iterable[str], limit: int = 3) -> str:
    """The first few of many names, for messages.

    >>> few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    listed = list(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")
