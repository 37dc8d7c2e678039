"""A merge written down as plain values, so that it can be made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_fda.inputs import Inputs, Source
from hf_fda.lowrank import Budget
from hf_fda.merge_methods import MethodConfig


def record(
    inputs: Inputs,
    config: MethodConfig,
    dtype: str,
    seed: int,
    heads: str,
    max_shard_bytes: int,
    budget: Budget | None,
) -> dict[str, Any]:
    """The merge as plain values: the content of `merge_config.yaml`."""
    record: dict[str, Any] = {
        "base": pinned(inputs.base.id, inputs.base.commit),
        "sources": {
            source.name: pinned(source.id, source.weights.checkpoint.commit)
            if source.weights is not None
            else anchors_id(source)
            for source in inputs.sources
        },
        "method": config.name,
        "options": stated_options(config),
        "dtype": dtype,
        "seed": int(seed),
        "heads": heads,
        "max_shard_bytes": max_shard_bytes,
    }
    if budget is not None:
        record |= {"as_adapter": True, "rank": budget.rank, "energy": budget.energy}
    given = {source.name: anchors_id(source) for source in inputs.sources if source.weights and source.anchors}
    return {**record, "anchors": given} if given else record


def stated(**arguments: Any) -> dict[str, Any]:
    """The arguments that were given, as plain values: what is None is left out."""
    given = {name: value for name, value in arguments.items() if value is not None}
    return {name: _plain(value) for name, value in given.items()}


def _plain(value: Any) -> Any:
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def stated_options(config: MethodConfig) -> dict[str, Any]:
    """The options that have to be stated to get the same config again."""
    fields = config.option_fields()
    return {
        name: value for name, value in config.options().items() if value is not None or fields[name].default is not None
    }


def anchors_id(source: Source) -> str:
    """Where a source's given anchors can be found again."""
    origin = source.anchors.origin if source.anchors is not None else None
    return origin or f"anchors of {source.id}, in memory only"


def pinned(id: str, commit: str | None) -> str:
    """A Hub id with the commit that was used; a folder as it was given."""
    return f"{id.partition('@')[0]}@{commit}" if commit else id
