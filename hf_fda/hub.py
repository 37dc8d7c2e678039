"""Errors of the Hub in this package's words: which repository, and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from hf_fda.errors import InputError, UnreachableError

UNREACHABLE = (OfflineModeIsEnabled, LocalEntryNotFoundError, RevisionResolutionError, HTTPError, OSError)
"""What the Hub's client raises when it cannot be asked (it is down, or the process is offline)."""


@contextmanager
def hub_errors(id: str, prefix: str = "", file: str = "") -> Iterator[None]:
    """Translate what the Hub's client raises into `InputError`, where it cannot be asked into `UnreachableError`.

    Args:
        id: the repository as the user wrote it.
        prefix: said before the reason, such as "no such folder, and ".
        file: the file that is asked for, if it is one.
    """
    where = f"{id}: {file}: " if file else f"{id}: "
    try:
        yield
    except RevisionNotFoundError:
        raise InputError(f"{id}: {prefix}the Hub has no such revision of it; see its branches and tags") from None
    except GatedRepoError:
        raise InputError(
            f"{id}: the repository is gated; accept its terms on the Hub and run 'hf auth login'"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{id}: {prefix}no such repository on the Hub (if it is private, run 'hf auth login')"
        ) from None
    except RemoteEntryNotFoundError:
        raise InputError(f"{where}not in the repository on the Hub") from None
    except HFValidationError as error:
        raise InputError(f"{id}: {prefix}not a Hub id ({first_line(error)})") from None
    except UNREACHABLE as error:
        raise UnreachableError(f"{where}{_unanswered(error, prefix)}") from None


def _unanswered(error: BaseException, prefix: str) -> str:
    """Why the Hub gave no answer: it refuses, or it cannot be asked."""
    cause = error.__cause__ or error  # the client wraps what really happened
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 402, 403, 413):
        said = getattr(cause, "server_message", None)
        why = f"{status}, {first_line_of(said)}" if said else str(status)
        return f"the Hub refuses it ({why}); run 'hf auth login' with a token that has the right to it"
    return f"{prefix}the Hub cannot be asked ({first_line(cause)})"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name when it says nothing."""
    return first_line_of(str(error)) or type(error).__name__


def first_line_of(text: str) -> str:
    """The first line that is not empty, or nothing."""
    return next(iter(text.strip().splitlines()), "")
