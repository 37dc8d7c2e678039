"""A stage of a merge: pieces of work that do not depend on each other, spread over the processes by their cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hf_fda.devices import release_memory
from hf_fda.processes import Team
from hf_fda.progress import Progress
from hf_fda.store import Store


@dataclass(frozen=True)
class Piece:
    """A piece of work that ends in one recorded file.

    `label` says what it is; `file` is made, under the key `key`; `cost` is compared with that of other pieces only;
    `make` does the work and gives what writes the file and says its hash. It is also finished where the same lies in
    `elsewhere`. Pieces of one `group`, where they have one, share work, and one process does them. A piece of several
    `hands` is made by so many processes together, the first ones, and written by the first.
    """

    label: str
    file: str
    key: str
    cost: float
    make: Callable[[], Callable[[Path], str]]
    elsewhere: tuple[str, ...] = ()
    group: str | None = None
    hands: int = 1

    def finished(self, store: Store) -> bool:
        """Whether the file is there, undamaged and made from the same; reads it whole."""
        return any(store.finished(place, self.key) for place in (self.file, *self.elsewhere))


def assign(costs: Sequence[float], processes: int, groups: Sequence[object] | None = None) -> list[int]:
    """Who does what: longest first, each to the process that has least to do; the same everywhere.

    >>> assign([3, 1, 1, 1, 2], 2)
    [0, 1, 0, 1, 1]
    >>> assign([3, 1, 1, 1, 2], 2, ["a", None, "b", "b", "b"])
    [1, 1, 0, 0, 0]

    Args:
        costs: of the pieces, in any unit.
        processes: how many there are.
        groups: what each piece belongs to, all of which goes to one process; None: a piece of its own.

    Returns:
        for each piece its process.
    """
    members: dict[object, list[int]] = {}
    for number, group in enumerate(groups or [None] * len(costs)):
        members.setdefault(("alone", number) if group is None else ("group", group), []).append(number)
    totals = [(sum(costs[number] for number in pieces), pieces) for pieces in members.values()]
    load, owners = [0.0] * processes, [0] * len(costs)
    for cost, pieces in sorted(totals, key=lambda item: (-item[0], item[1])):
        owner = min(range(processes), key=lambda process: (load[process], process))
        load[owner] += cost
        for number in pieces:
            owners[number] = owner
    return owners


def find_finished(pieces: Sequence[Piece], store: Store, team: Team) -> list[bool]:
    """Which pieces an earlier run finished; every file is read by one process only."""
    return team.map(lambda piece: piece.finished(store), pieces)


def work_off(pieces: Sequence[Piece], finished: Sequence[bool], store: Store, team: Team, progress: Progress) -> None:
    """Do what is not finished, each piece in one process, and wait until all are done.

    Raises:
        RunError: when a piece fails in this process.
        PeerError: when another process failed.
    """
    unfinished = [piece for piece, done in zip(pieces, finished, strict=True) if not done]
    for _ in range(len(pieces) - len(unfinished)):
        progress.finish("what an earlier run finished")
    owners = assign([piece.cost for piece in unfinished], team.count, [piece.group for piece in unfinished])
    writers = [owner if piece.hands == 1 else 0 for piece, owner in zip(unfinished, owners, strict=True)]
    own = [number for number, writer in enumerate(writers) if writer == team.rank]
    helped = [number for number, piece in enumerate(unfinished) if 0 < team.rank < piece.hands]
    _make([(unfinished[number], number in own) for number in sorted([*own, *helped])], store, progress)
    others = [piece for piece, writer in zip(unfinished, writers, strict=True) if writer != team.rank]
    if others:
        progress.now("waiting for the other processes")
    team.wait()
    for piece in others:
        store.await_file(piece.file)
        progress.finish(piece.label)
    team.wait()  # until all have seen the files, which the next stage may move away


def _make(pieces: Sequence[tuple[Piece, bool]], store: Store, progress: Progress) -> None:
    """Make pieces one after the other, and write those that are said to be written here; while one is on its way to the
    disk, the next is made."""
    with ThreadPoolExecutor(1, "disk") as disk:
        before: Future[Path] | None = None
        for piece, here in pieces:
            progress.now(piece.label)
            write = piece.make()
            release_memory()
            if not here:
                continue
            filled = store.fill(piece.file, piece.key, write)
            if before is not None:
                before.result()
            before = disk.submit(store.settle, filled)
            progress.finish(piece.label)
        if before is not None:
            before.result()
