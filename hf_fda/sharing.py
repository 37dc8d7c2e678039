"""What several processes must have in common before they start: one plan, one output folder."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping
from pathlib import Path

from hf_fda.errors import InputError, agreed, few
from hf_fda.processes import Team
from hf_fda.store import WORK, appears

LOOK = 20.0
"""Seconds to look for the mark of the main process in the output folder."""


def check_same(facts: Mapping[str, str], team: Team) -> None:
    """Refuse to go on when processes do not work on the same thing.

    Args:
        facts: hashes of what must be equal everywhere, by what it is.
        team: the processes.

    Raises:
        InputError: in every process, saying which process sees something else.
    """
    hosts = team.gather((socket.gethostname(), dict(facts)))
    first = hosts[0][1]
    for rank, (host, theirs) in enumerate(hosts):
        different = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if different:
            raise agreed(
                InputError(
                    f"process {rank} on {host} sees something else than process 0 on {hosts[0][0]}: {few(different)}; "
                    "give all processes the same arguments and files (a folder that all machines share, or a Hub id)"
                )
            )


def check_shared(folder: Path, team: Team, seconds: float | None = None) -> None:
    """Refuse an output folder that is not the same one for all processes; a refused one is left as it was.

    Args:
        folder: the output folder.
        team: the processes.
        seconds: how long to look for what the main process left there; LOOK if None.

    Raises:
        InputError: in every process, naming the machines that do not see it.
    """
    if team.count == 1:
        return
    mark = folder / WORK / f"{team.from_owner(uuid.uuid4().hex, 0)}.mark"
    made = [parent for parent in mark.parents if not parent.exists()]
    team.agree(lambda: _leave(mark, folder) if team.main else None)
    seen = appears(mark, LOOK if seconds is None else seconds)
    blind = [host for host in team.gather(None if seen else socket.gethostname()) if host]
    if team.main:
        mark.unlink(missing_ok=True)
        for parent in made if blind else []:
            parent.rmdir()
    team.wait()
    if blind:
        raise agreed(
            InputError(
                f"output '{folder}': not the same folder for all processes; {few(sorted(set(blind)))} cannot see what "
                "the main process writes there: choose a folder on a file system that all machines share"
            )
        )


def _leave(mark: Path, folder: Path) -> None:
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise InputError(f"output '{folder}': cannot be written ({error.strerror}); choose another") from None
