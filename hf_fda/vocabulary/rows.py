"""Which row of which model a token's row is: maps of numbers, and the rows that models share for want of their own.

A model keeps the row of every token it has. A token that it lacks gets the row that all who lack it share: the base's,
so that its task vector is zero there; where the base lacks it, too, the mean of the sources that have it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.view import read_rows, runs
from hf_fda.vocabulary.tokens import Tokens

CHUNK = 2**20
"""Entries of a tensor that are read at a time for the mean of its rows."""


def own_rows(out: Tokens, own: Tokens) -> Tensor:
    """For every row of the output the model's own row, (rows of the output,); -1 where it has none.

    A row that no token uses, in neither of the two, is itself: fine-tunes of one base agree on their padding.

    >>> own_rows(Tokens("out", {"a": 0, "c": 1, "b": 2}, 4), Tokens("own", {"a": 0, "b": 1}, 4)).tolist()
    [0, -1, 1, 3]
    """
    used = set(out.ids.values()) | set(own.ids.values())
    rows = [row if row < own.rows and row not in used else -1 for row in range(out.rows)]
    for token, row in out.ids.items():
        if token in own.ids and rows[row] < 0:
            rows[row] = own.ids[token]
    return torch.tensor(rows)


class SharedRows:
    """The rows of tokens that a model lacks.

    Args:
        checkpoints: the base, then the sources, M in all.
        names: for each its vocabulary tensors by a name that is the same in all models.
        axes: which axis of these tensors counts tokens.
        rows: (M, rows of the output), each model's own rows, -1 where it has none.
        tokens: (rows of the output,) bool, whether a token uses the row.
        given: by row of the output the model and its row that a user chose; None for zeros.
        with_base: whether the first model is a base; else it only gives its shapes, and none is the others' model.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        names: Sequence[Mapping[str, str]],
        axes: Mapping[str, int],
        rows: Tensor,
        tokens: Tensor,
        given: Mapping[int, tuple[int, int] | None],
        with_base: bool = True,
    ) -> None:
        self.checkpoints, self.names, self.axes = tuple(checkpoints), tuple(names), dict(axes)
        self.rows, self.tokens, self.given, self.with_base = rows, tokens, dict(given), with_base
        self._donors: dict[str, Tensor] = {}
        self._fillers: dict[str, Tensor] = {}

    def take(self, key: str, wanted: Tensor) -> Tensor:
        """Rows of one tensor.

        Args:
            key: the tensor, by the name that is the same in all models.
            wanted: (n,) rows of the output.

        Returns:
            (n, ...) in the type of the first model that has the tensor.
        """
        donors = self.donors(key)[:, wanted]
        first = next(own for own, names in enumerate(self.names) if key in names)
        shape = list(self.checkpoints[first].shape(self.names[first][key]))
        del shape[self.axes[key]]
        total = torch.zeros((len(wanted), *shape), dtype=torch.float64)
        for model, rows in enumerate(donors):
            there = rows >= 0
            if bool(there.any()):
                total[there] += self._read(model, key, rows[there])
        count = (donors >= 0).sum(0)
        total /= count.clamp(min=1).view(-1, *[1] * len(shape))
        zeros = torch.tensor([self.given.get(row, ()) is None for row in wanted.tolist()], dtype=torch.bool)
        nobody = (count == 0) & ~zeros
        if bool(nobody.any()):
            total[nobody] = self._filler(key)
        return total.to(self.checkpoints[first].dtype(self.names[first][key]))

    def donors(self, key: str) -> Tensor:
        """(M, rows of the output): for each row the models whose mean it is, by their own rows; else -1."""
        if key not in self._donors:
            donors = self.rows.clone()
            for model, names in enumerate(self.names):
                if key not in names:
                    donors[model] = -1
            if self.with_base:
                donors[1:, donors[0] >= 0] = -1
            else:
                donors[0] = -1
            for row, chosen in self.given.items():
                donors[:, row] = -1
                if chosen is not None:
                    donors[chosen[0], row] = chosen[1]
            self._donors[key] = donors
        return self._donors[key]

    def fingerprint(self) -> str:
        """A hash of what every row is made of; the models' weights are not in it."""
        digest = hashlib.sha256(self.rows.numpy().tobytes() + self.tokens.numpy().tobytes())
        digest.update(repr((sorted(self.axes.items()), sorted(self.given.items()), self.with_base)).encode())
        return digest.hexdigest()

    def _read(self, model: int, key: str, rows: Tensor) -> Tensor:
        """(n, ...) some of one model's own rows, in float64."""
        checkpoint, name = self.checkpoints[model], self.names[model][key]
        if self.axes[key] != 0:
            return checkpoint.read(name).movedim(self.axes[key], 0)[rows].double()
        parts = [read_rows(checkpoint, name, first, count) for _, first, count in runs(rows)]
        return torch.cat(parts).double()

    def _filler(self, key: str) -> Tensor:
        """The mean of all tokens' rows, for rows that nobody has: it never is the likeliest token of a language model,
        as zeros would be where all logits are negative."""
        if key not in self._fillers:
            known = (self.tokens & (self.donors(key) >= 0).any(0)).nonzero().flatten()
            width = prod(self.take(key, known[:1]).shape[1:])
            step = max(CHUNK // max(width, 1), 1)
            parts = [
                self.take(key, known[start : start + step]).double().sum(0) for start in range(0, len(known), step)
            ]
            self._fillers[key] = torch.stack(parts).sum(0) / len(known)
        return self._fillers[key]
