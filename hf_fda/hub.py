"""Errors of the Hub in this package's words: which repository, and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from hf_fda.errors import InputError

UNREACHABLE = (OfflineModeIsEnabled, LocalEntryNotFoundError, RevisionResolutionError, HTTPError, OSError)
"""What the Hub's client raises when it cannot be asked (it is down, or the process is offline)."""


@contextmanager
def hub_errors(id: str, prefix: str = "") -> Iterator[None]:
    """Translate what the Hub's client raises into `InputError`.

    Args:
        id: the repository as the user wrote it.
        prefix: said before the reason, such as "no such folder, and ".
    """
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
    except HFValidationError as error:
        raise InputError(f"{id}: {prefix}not a Hub id ({first_line(error)})") from None
    except UNREACHABLE as error:
        raise InputError(f"{id}: {prefix}the Hub cannot be asked ({first_line(error)})") from None
    except EntryNotFoundError as error:
        raise InputError(f"{id}: a file is missing on the Hub ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
