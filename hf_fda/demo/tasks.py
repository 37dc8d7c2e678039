"""The images: real handwritten digits, and the same digits in the disguises that make the tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fda.errors import InputError

TRAIN, VALIDATION = 1000, 297


@dataclass(frozen=True)
class Rows:
    """Images (n, 1, 8, 8) in [-1, 1] and their digits (n,)."""

    images: Tensor
    labels: Tensor

    def seen_as(self, disguise: Callable[[Tensor], Tensor]) -> Rows:
        """The same digits, each image changed by `disguise`."""
        return Rows(disguise(self.images), self.labels)


@dataclass(frozen=True)
class Digits:
    """Three parts without a common image. Models train on `train`; settings and the best merge are chosen on
    `validation`; `test` is for the table alone."""

    train: Rows
    validation: Rows
    test: Rows


def load_rows(seed: int) -> Digits:
    """The 1797 digits that ship with scikit-learn, parted by `seed` into 1000, 297 and 500.

    Raises:
        InputError: when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError('the demo needs the digits in scikit-learn: pip install "hf-fda[demo]"') from None
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(digits, dtype=torch.long)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split([TRAIN, TRAIN + VALIDATION])
    return Digits(*(Rows(images[part], labels[part]) for part in parts))


def rotated(images: Tensor) -> Tensor:
    """A quarter turn."""
    return images.rot90(1, (2, 3))


def inverted(images: Tensor) -> Tensor:
    """Black for white."""
    return -images


def mirrored(images: Tensor) -> Tensor:
    """Left for right."""
    return images.flip(3)


def shuffled(images: Tensor) -> Tensor:
    """The sixteen blocks of 2 x 2 pixels in another order, the same for every image."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    blocks = images.unfold(2, 2, 2).unfold(3, 2, 2).reshape(-1, 16, 2, 2)[:, order]
    return blocks.reshape(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 1, 8, 8)


TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotated": rotated,
    "inverted": inverted,
    "mirrored": mirrored,
    "shuffled": shuffled,
}
"""Tasks that conflict: one digit has to be recognised from four images that have nothing in common."""
