"""The function a user calls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_fda.checkpoint.writer import MAX_SHARD_BYTES
from hf_fda.engine import run
from hf_fda.merge_methods import MethodConfig
from hf_fda.merged import Merged
from hf_fda.planning import plan
from hf_fda.processes import together

if TYPE_CHECKING:
    import torch


def merge(
    base: Any,
    sources: Any,
    method: str | MethodConfig = "fda",
    output: str | os.PathLike[str] = "merged",
    as_adapter: bool = False,
    data: Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
    dtype: str = "float32",
    seed: int = 0,
    *,
    anchors: Mapping[str, Any] | None = None,
    heads: str = "keep",
    rank: int | None = None,
    energy: float | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trust_remote_code: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Merged:
    """Merge models that were fine-tuned from one base into a folder that transformers loads.

    All arguments but `quiet` (show no progress) are those of `hf_fda.plan`, which runs first: what cannot be used is
    refused before anything is written. Interrupted, the same call goes on where it stopped.

    Launched in several processes (`torchrun`, `accelerate launch`), on one machine or on several that share the
    output folder, the processes do the work together: each calls this with the same arguments and gets the result.

    Returns:
        the merged model; `.load(task)` gives it as a transformers model.

    Raises:
        InputError: naming the argument, source or tensor that cannot be used, and the way out.
        RunError: when the work fails on the way.

    Example:
        >>> merged = merge("base/", {"sst2": "sst2/", "trec": "trec/"}, output="merged/")  # doctest: +SKIP
        >>> model = merged.load(task="sst2")  # doctest: +SKIP
    """
    with together(device) as team:
        checked = team.agree(
            lambda: plan(
                base,
                sources,
                method,
                output,
                as_adapter,
                data,
                device,
                dtype,
                seed,
                anchors=anchors,
                heads=heads,
                rank=rank,
                energy=energy,
                max_shard_bytes=max_shard_bytes,
                trust_remote_code=trust_remote_code,
                **options,
            )
        )
        return Merged(run(checked, quiet, team))
