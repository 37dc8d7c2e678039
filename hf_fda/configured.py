"""Merges from configuration files: our own, as every merge leaves one, and mergekit's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_fda.arguments import read_config, read_options, read_text
from hf_fda.merged import Merged
from hf_fda.mergekit import is_mergekit, merge_documents, plan_documents
from hf_fda.merging import merge
from hf_fda.planning import plan
from hf_fda.plans import Plan


def merge_config(
    config: str | os.PathLike[str] | Mapping[str, Any],
    output: str | os.PathLike[str] = "merged",
    *,
    quiet: bool = False,
    **settings: Any,
) -> Merged:
    """Merge what a configuration describes: one of mergekit's, or the `merge_config.yaml` of an earlier merge.

    A configuration of mergekit's may hold several documents of which later ones use the results of earlier ones by
    `name`; all are checked before the first is merged.

    Args:
        config: a YAML file, or its content as a mapping.
        output: the folder to write.
        quiet: show no progress.
        settings: arguments of `hf_fda.merge` that say where and how to write (`device`, `dtype`, `seed`, `heads`,
            `as_adapter`, `rank`, `energy`, `max_shard_bytes`, `trust_remote_code`); they win over the file's.

    Returns:
        the merged model.

    Raises:
        InputError: naming line and key that cannot be used, and the way out.
        RunError: when the work fails on the way; the same call goes on from there.

    Example:
        >>> merged = merge_config("ties.yaml", "merged/")  # doctest: +SKIP
    """
    text, file = _text(config)
    if is_mergekit(text):
        return merge_documents(text, file, output, quiet=quiet, **settings)
    return merge(**{**_arguments(config), "output": output, "quiet": quiet, **settings})


def plan_config(
    config: str | os.PathLike[str] | Mapping[str, Any],
    output: str | os.PathLike[str] = "merged",
    *,
    processes: int | None = None,
    **settings: Any,
) -> tuple[Plan, ...]:
    """Check what a configuration describes; as `hf_fda.plan`, with nothing written. Arguments as `merge_config`.

    Args:
        config: a YAML file, or its content as a mapping.
        output: the folder of the result.
        processes: predict how long the merge takes on so many.
        settings: as `merge_config`.

    Returns:
        a plan for each of its documents, in the order in which they are merged.

    Raises:
        InputError: naming line and key that cannot be used, and the way out.
    """
    text, file = _text(config)
    if is_mergekit(text):
        return plan_documents(text, file, output, processes=processes, **settings)
    return (plan(**{**_arguments(config), "output": output, "processes": processes, **settings}),)


def _text(config: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, str]:
    """A configuration as text, and what to call it."""
    if isinstance(config, Mapping):
        return yaml.safe_dump(dict(config), sort_keys=False), "configuration"
    return read_text(Path(config)), os.fspath(config)


def _arguments(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of our own as arguments of `merge` and `plan`."""
    given = dict(config) if isinstance(config, Mapping) else read_config(Path(config))
    options = read_options(given.pop("options", None))
    return {**given, **options}
