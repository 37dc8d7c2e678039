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
    data: Mapping[str, Any] | str | None = None,
    device: str | torch.device = "auto",
    dtype: str = "float32",
    seed: int = 0,
    *,
    anchors: Mapping[str, Any] | None = None,
    heads: str = "keep",
    rank: int | None = None,
    energy: float | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: str | None = None,
    tokens: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    pad_to_multiple_of: int | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
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
                tokenizer=tokenizer,
                tokens=tokens,
                chat_template=chat_template,
                pad_to_multiple_of=pad_to_multiple_of,
                trust_remote_code=trust_remote_code,
                force=force,
                **options,
            )
        )
        return Merged(run(checked, quiet, team))


def extract(
    base: Any,
    source: Any,
    output: str | os.PathLike[str] = "adapter",
    rank: int | None = None,
    energy: float | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str = "float32",
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Merged:
    """Make a PEFT adapter of a full fine-tune: the factors of each weight's task vector that are nearest to it.

    What is no matrix (norms, biases) is kept whole, and a task's own head beside the adapter. Of a weight that a model
    ties to others all of them get the same factors, which PEFT's `merge_and_unload` would add to it several times.

    Args:
        base: what the fine-tune was trained from: a Hub id, a folder or a model in memory.
        source: the fine-tune.
        output: the folder to write.
        rank: of the factors, at most.
        energy: the fraction of the squared norm that the factors keep, module by module. Without rank and energy the
            adapter is exact, and as large as the fine-tune; tied weights come whole, and PEFT merges it rightly, too.
        device: "auto" (Accelerate's choice) or a torch device.
        dtype: type of the written weights.
        tokenizer: "base" of a fine-tune with other tokens than the base: those that the base lacks are left out.
        trust_remote_code: run model code that comes with the checkpoints.
        quiet: show no progress.

    Returns:
        the adapter; its `report` says by module what the factors leave out.

    Raises:
        InputError: naming the argument, source or tensor that cannot be used, and the way out.
        RunError: when the work fails on the way; the same call goes on from there.
    """
    return merge(
        base,
        [source],
        "task_arithmetic",
        output,
        as_adapter=True,
        device=device,
        dtype=dtype,
        rank=rank,
        energy=energy,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
        scaling=1.0,
    )
