"""Which entries of a source's task vector stay when it is trimmed, found from the parts that it is read in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_fda.checkpoint.layout import Role
from hf_fda.errors import InputError, RunError
from hf_fda.merge_methods import MethodConfig
from hf_fda.selection import (
    COARSE_BINS,
    FINE_BINS,
    FINITE,
    HALF,
    Cut,
    coarse_counts,
    cut_at,
    digits_inside,
    fine_counts,
    place,
    shares,
    tied,
)
from hf_fda.streaming.taskvectors import StoredPart
from hf_fda.streaming.tensorwise import by_entry

NOTHING = Cut(FINITE << HALF)
"""The cut that no finite entry is above."""


def trims(config: MethodConfig) -> bool:
    """Whether a method leaves entries of the task vectors out before it merges them, and these alone decide how."""
    return config.trims and not config.keeps_entries() and not getattr(config, "rescale", False)


def alone(config: MethodConfig, role: Role) -> bool:
    """Whether each entry of a tensor is merged on its own: by elementwise methods, and by those that trim where they
    leave nothing out."""
    return by_entry(config, role) or (config.trims and config.keeps_entries())


def trims_globally(config: MethodConfig | None) -> bool:
    """Whether a method trims over the whole task vectors."""
    return config is not None and trims(config) and getattr(config, "trim", "tensor") == "global"


def refuse_global(config: MethodConfig, what: str) -> None:
    """Refuse a global trim where tensors are merged without a look at the others.

    Raises:
        InputError: saying what it is refused for.
    """
    if trims_globally(config):
        raise InputError(f"method '{config.name}': trim='global' is for full checkpoints, not {what}; use 'tensor'")


def kept_of(config: MethodConfig, counts: Sequence[int]) -> list[int]:
    """How many entries of each source a method keeps: ``floor(density * n)``, but one at least where the density is
    above zero.

    Args:
        config: of a method that trims.
        counts: (K,) how many each source has.
    """
    shares = config.of_each("density", len(counts))
    return [max(1, int(share * count)) if share > 0 else 0 for share, count in zip(shares, counts, strict=True)]


def count_coarse(stored: StoredPart, device: torch.device) -> Tensor:
    """(K, 2^15) coarse counts of the magnitudes in part of a tensor, one row for each source, on the CPU."""
    counts = torch.zeros(len(stored.own), COARSE_BINS, dtype=torch.int64, device=device)
    for block in stored.blocks():
        _, tasks = stored.read(block, device, torch.float32)
        for own, task in zip(counts, tasks, strict=True):
            own += coarse_counts(task)
    return counts.cpu()


def count_fine(stored: StoredPart, coarse: Sequence[int], device: torch.device) -> Tensor:
    """(K, 2^16) fine counts of the magnitudes in one coarse bin for each source, on the CPU."""
    counts = torch.zeros(len(stored.own), FINE_BINS, dtype=torch.int64)
    for number, own in enumerate(coarse):
        tasks = (stored.task(number, block, device, torch.float32) for block in stored.blocks())
        counts[number] = fine_counts(torch.cat([digits_inside(task, own) for task in tasks]), own).cpu()
    return counts


def count_ties(stored: StoredPart, cuts: Sequence[Cut], device: torch.device) -> list[int]:
    """For each source how many entries of part of a tensor tie at its cut; not counted where all of them stay."""
    return [
        0
        if cut.ties is None
        else sum(tied(stored.task(n, block, device, torch.float32), cut) for block in stored.blocks())
        for n, cut in enumerate(cuts)
    ]


def bins_of(counts: Tensor, kept: Sequence[int]) -> list[tuple[int, int]]:
    """For each source the coarse bin in which its cut lies, and how many entries of that bin stay (one at least, where
    none is kept).

    Args:
        counts: (K, 2^15), of all parts.
        kept: for each source how many entries stay.
    """
    return [place(own, max(count, 1)) for own, count in zip(counts, kept, strict=True)]


def check_counts(counts: Tensor, sources: Sequence[str], what: str) -> None:
    """Refuse task vectors that are not finite.

    Args:
        counts: (K, 2^15) coarse counts.
        sources: their names.
        what: what was counted.

    Raises:
        RunError: naming the source.
    """
    for source, broken in zip(sources, counts[:, FINITE:].any(dim=1).tolist(), strict=True):
        if broken:
            raise RunError(f"source '{source}': {what} is not finite; check its weights")


def cuts_of_parts(
    held: Sequence[StoredPart],
    counts: Tensor,
    kept: Sequence[int],
    device: torch.device,
    each: Callable[[Callable[[StoredPart], Any], Sequence[StoredPart]], Iterable[Any]],
) -> list[list[Cut]]:
    """The cuts that keep the largest entries of each source, for every part of a tensor.

    Args:
        held: the parts of the tensor.
        counts: (K, 2^15), the coarse counts of all parts together.
        kept: (K,) entries of each source that stay.
        device: where to count.
        each: calls a function with every part, in order.

    Returns:
        for each part K cuts.
    """
    found = bins_of(counts, kept)
    bins = [coarse for coarse, _ in found]
    fine = sum(each(partial(count_fine, coarse=bins, device=device), held), torch.zeros(1, dtype=torch.int64))
    cuts = [cut_at(coarse, own, inside) for (coarse, inside), own in zip(found, fine, strict=True)]
    cuts = [cut if count else NOTHING for cut, count in zip(cuts, kept, strict=True)]
    if all(cut.ties is None for cut in cuts):
        return [cuts] * len(held)
    ties = each(partial(count_ties, cuts=cuts, device=device), held)
    by_source = [
        [cut] * len(held) if cut.ties is None else shares(cut, [of_part[number] for of_part in ties])
        for number, cut in enumerate(cuts)
    ]
    return [list(cuts_of_part) for cuts_of_part in zip(*by_source, strict=True)]


def dealt(cuts: Sequence[Cut], tasks: Sequence[Tensor]) -> tuple[list[Cut], list[Cut]]:
    """The cuts of the first block of a part, and those of what follows it: entries that tie stay in order."""
    here, later = [], []
    for cut, task in zip(cuts, tasks, strict=True):
        own = cut if cut.ties is None else shares(cut, [tied(task, cut)])[0]
        here.append(own)
        later.append(cut if cut.ties is None else Cut(cut.bits, cut.ties - (own.ties or 0)))
    return here, later
