"""Tensors that two processes give each other: through shared memory where both can, otherwise sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from processes import fork, rank

from hf_fda import mailbox, processes
from hf_fda.mailbox import Mailbox
from hf_fda.processes import Team


def entries(whose: int, turn: int) -> torch.Tensor:
    return torch.arange(100.0) + 1000 * whose + 10 * turn


def _swap(results: Path, trouble: str) -> None:
    mailbox.LEAST = 1000 if trouble == "small" else 0
    if trouble == "nothing to share" and rank() == 1:
        del os.memfd_create
    if trouble == "another container" and rank() == 0:  # whose processes have other numbers
        os.getpid = lambda: 1 << 30
    if trouble == "another process's" and rank() == 0:
        mailbox.secrets.randbits = lambda bits: 1  # type: ignore[attr-defined]
        real = Mailbox._tell
        Mailbox._tell = lambda self, values: real(self, [*values[:2], 2][: len(values)])  # type: ignore[method-assign]
    with processes.together("cpu") as team:
        box = Mailbox(team, 1 - team.rank, 100, torch.float32)
        found = []
        for turn in range(3):
            box.room().copy_(entries(team.rank, turn))
            theirs = box.swap()
            found.append((theirs.clone(), box.add(theirs).clone()))
        shared = box._seen is not None
        del box, theirs  # what was shared goes with them
        left = [name for name in os.listdir("/proc/self/fd") if "hf_fda" in _target(name)] if shared else []
        torch.save({"found": found, "shared": shared, "left": left}, results / f"rank{team.rank}")


def _target(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""


@pytest.mark.parametrize(
    "trouble",
    ["", "small", "nothing to share", "another container", "another process's"],
    ids=lambda own: own or "none",
)
def test_both_get_what_the_other_gave(trouble: str, tmp_path: Path) -> None:
    fork(_swap, tmp_path, trouble)
    for own in (0, 1):
        seen = torch.load(tmp_path / f"rank{own}")
        assert seen["shared"] == (not trouble and hasattr(os, "memfd_create")) and not seen["left"]
        for turn, (theirs, added) in enumerate(seen["found"]):
            assert torch.equal(theirs, entries(1 - own, turn))
            assert torch.equal(added, entries(0, turn) + entries(1, turn))


def test_alone_nobody_is_asked_for_small_things() -> None:
    assert Mailbox(Team(), 0, 3, torch.float32).room().shape == (3,)
