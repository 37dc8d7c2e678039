"""What of a merge is neither inputs nor method: where it goes, in which type, on which device, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from hf_fda.checkpoint.writer import MAX_SHARD_BYTES
from hf_fda.devices import resolve_device
from hf_fda.errors import InputError, nearest
from hf_fda.lowrank import Budget
from hf_fda.recipes import Heads
from hf_fda.store import new_folder

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Settings:
    """Where and how a merge is written.

    `dtype` is the type of the written weights by name, "auto" for the base's; `budget` that of a merged adapter, None
    where a whole checkpoint is written. `force` lets anchors of another revision of the base be merged.
    """

    output: Path
    device: torch.device
    dtype: str
    seed: int
    heads: Heads
    max_shard_bytes: int
    budget: Budget | None
    force: bool = False

    @classmethod
    def checked(
        cls,
        output: str | os.PathLike[str],
        device: str | torch.device = "auto",
        dtype: Any = "float32",
        seed: Any = 0,
        heads: Any = "keep",
        max_shard_bytes: Any = MAX_SHARD_BYTES,
        as_adapter: Any = False,
        rank: Any = None,
        energy: Any = None,
    ) -> Settings:
        """Settings from what a user says; the arguments are those of `hf_fda.plan`.

        Raises:
            InputError: naming the argument that cannot be used.
        """
        if not isinstance(dtype, str) or dtype not in ("auto", *DTYPES):
            raise InputError(f"dtype '{dtype}': {nearest(str(dtype), ['auto', *DTYPES])}")
        if heads not in ("keep", "merge"):
            raise InputError(f"heads '{heads}': {nearest(str(heads), ['keep', 'merge'])}")
        for name, value, least in (("seed", seed, 0), ("max_shard_bytes", max_shard_bytes, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} must be a whole number, at least {least}, not {value!r}")
        budget = _budget(as_adapter, rank, energy)
        folder = new_folder(output)
        return cls(folder, resolve_device(device), dtype, seed, cast(Heads, heads), max_shard_bytes, budget)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The type of the written weights; None for the base's."""
        return DTYPES.get(self.dtype)


def _budget(as_adapter: Any, rank: Any, energy: Any) -> Budget | None:
    """How large a merged adapter's factors may be; None where no adapter is written."""
    if not as_adapter:
        for name, value in (("rank", rank), ("energy", energy)):
            if value is not None:
                raise InputError(f"{name} is of a merged adapter's factors; it needs as_adapter=True (--as-adapter)")
        return None
    return Budget.checked(rank, energy)
