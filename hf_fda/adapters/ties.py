"""Tied tensors: one in a checkpoint, several in PEFT, which changes each module that has it on its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fda.adapters.changes import Change, Rebased, Replaced, Residual
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.errors import InputError, RunError
from hf_fda.lowrank import LowRank


@dataclass
class Checked(Change):
    """Something is done to a tensor of which the adapter brings the base's own, too, and it has to be that.

    As the file may be of another type than the base, its rounding counts for nothing.
    """

    tensor: Tensor
    change: Change
    label: str
    needs_base = True

    def task(self, base: Tensor) -> Tensor:
        """What is done."""
        self._check(base)
        return self.change.task(base)

    def factors(self, base: Tensor | None) -> LowRank | None:
        """Its factors."""
        assert base is not None
        self._check(base)
        return self.change.factors(base)

    @property
    def rank(self) -> int | None:
        """The rank of these."""
        return self.change.rank

    def _check(self, base: Tensor) -> None:
        if not torch.equal(base.to(self.tensor.device, self.tensor.dtype), self.tensor):
            raise RunError(
                f"{self.label}: the adapter comes with embeddings that are not the base's, although the base ties them "
                "to what it leaves as it is; give the base that it was trained on"
            )


def with_loaded(
    label: str, changes: Mapping[str, Change], loaded: Mapping[str, Tensor], layout: ModelLayout
) -> dict[str, Change]:
    """What an adapter does to the base's tensors, with the tensors that it loads into the base before.

    Such a tensor is in all places of a tied one. But beside the factors of embeddings PEFT saves what the base has, so
    where one comes only for places that have factors, and others have none, it has to be the base's.

    Args:
        label: the adapter, for messages.
        changes: by all names of the model's tensors, tied ones too.
        loaded: by such names.
        layout: of the model.

    Raises:
        InputError: when its initialisation took something out of a tied tensor, and so out of its other places.
    """
    names: dict[str, list[str]] = {}
    for name in loaded:
        names.setdefault(layout.tied.get(name, name), []).append(name)
    found = dict(changes)
    for stored, given in names.items():
        value, places = loaded[given[0]], layout.places(stored)
        everywhere = any(name not in changes for name in given) or all(place in changes for place in places)
        for place in places:
            change = changes.get(place)
            if change is None and everywhere:
                found[place] = Replaced(value)
            elif change is not None and not isinstance(change, Replaced):
                found[place] = Rebased(value, change) if everywhere else Checked(value, change, label)
    for name, change in found.items():
        start = change.change if isinstance(change, (Rebased, Checked)) else change
        if isinstance(start, Residual) and len(layout.places(layout.tied.get(name, name))) > 1:
            raise InputError(
                f"{label}: the adapter is initialised by '{start.method}', which took something out of '{name}' and so "
                "out of what the base ties to it; merge it in memory (hf_fda.merge_adapters), where that is so, too"
            )
    return found


def fold(changes: Mapping[str, Change], layout: ModelLayout) -> tuple[dict[str, Change], frozenset[str]]:
    """What an adapter does to each stored tensor, from what it does to it in each of its places.

    Args:
        changes: by all names of the model's tensors, tied ones too.
        layout: of the model.

    Returns:
        the changes of tensors that are changed alike in all their places, and the names of those that are not.
    """
    folded, apart = {}, set()
    for name in layout.names:
        first, *others = (changes.get(place) for place in layout.places(name))
        if not all(_same(first, other) for other in others):
            apart.add(name)
        elif first is not None:
            folded[name] = first
    return folded, frozenset(apart)


def _same(one: Any, other: Any) -> bool:
    """Whether two changes, or parts of them, are equal to the last bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other.to(one.device))
    if is_dataclass(one) and type(one) is type(other):
        return all(_same(getattr(one, own.name), getattr(other, own.name)) for own in fields(one))
    return bool(one == other)
