"""A merge written down as plain values, so that it can be made again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_fda.inputs import Inputs, Source
from hf_fda.merge_methods import MethodConfig
from hf_fda.plan_data import PlanData
from hf_fda.settings import Settings


@dataclass(frozen=True)
class Described:
    """What a configuration file of another tool says of a merge beyond base, sources and one config for all.

    `document` is its content as plain values; `at` gives the config for one of the base's tensors by name, None where
    it is everywhere the same; `varying` are the options that are not.
    """

    document: dict[str, Any]
    at: Callable[[str], MethodConfig] | None = None
    varying: tuple[str, ...] = ()


def record(
    inputs: Inputs,
    config: MethodConfig,
    settings: Settings,
    data: PlanData,
    described: Described | None = None,
) -> dict[str, Any]:
    """The merge as plain values: the content of `merge_config.yaml`.

    Args:
        inputs: base and sources.
        config: the merge method, complete.
        settings: where and how it is written.
        data: what it looks at beside weights.
        described: what the configuration says that it was read from.
    """
    budget = settings.budget
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
        "dtype": settings.dtype,
        "seed": settings.seed,
        "heads": settings.heads,
        "max_shard_bytes": settings.max_shard_bytes,
    }
    if budget is not None:
        record |= {"as_adapter": True, "rank": budget.rank, "energy": budget.energy}
    given = {source.name: anchors_id(source) for source in inputs.sources if source.weights and source.anchors}
    if given:
        record["anchors"] = given
    record |= data.recorded
    if settings.force:
        record["force"] = True
    record |= inputs.asked
    if described is not None:
        record["options"] |= dict.fromkeys(described.varying, "differs by tensor, see merge_config.yaml")
        record["mergekit"] = described.document
    return record


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
