"""What the command line and a configuration file say, as keyword arguments of the public functions."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_fda.data.request import WORDS, said_on_command_line
from hf_fda.errors import InputError, nearest

ROWS = re.compile(r"(?P<path>.+?)(?::(?P<split>[\w.-]+(?:\[[^\]]*\])?))?")
"""Rows on a command line: "rows.jsonl", "org/name", "org/name:test", "org/name:config:test[:100]"."""

SETTINGS = (
    *("as_adapter", "rank", "energy", "device", "dtype", "seed", "heads", "max_shard_bytes", "trust_remote_code"),
    *("tokenizer", "chat_template", "pad_to_multiple_of"),
)
CONFIG_KEYS = ("base", "sources", "method", "options", "data", "anchors", "tokens", "force", *SETTINGS)


def merge_arguments(arguments: argparse.Namespace, loose: list[tuple[str, str]]) -> dict[str, Any]:
    """What `merge` and `plan` get: the configuration file, overruled by what the command line says."""
    given = read_config(Path(arguments.config)) if arguments.config else {}
    options = {**read_options(given.pop("options", None)), **method_options(loose)}
    for name in ("base", "method", "output", "force", *SETTINGS):
        value = getattr(arguments, name)
        if value is not None and value is not False:
            given[name] = value
    if arguments.source:
        given["sources"] = _named(arguments.source)
    if arguments.anchors:
        given["anchors"] = dict(_split(item, "--anchors") for item in arguments.anchors)
    data = _data(arguments)
    if data is not None:
        given["data"] = data
    for name in ("base", "sources"):
        if name not in given:
            raise InputError(f"no {name}: pass a configuration file, or --base and --source")
    return {**given, **options}


def document_arguments(arguments: argparse.Namespace, loose: list[tuple[str, str]]) -> dict[str, Any]:
    """What the command line says beside a configuration of mergekit's, which says the rest itself.

    Raises:
        InputError: when the command line says some of the rest too.
    """
    said = [name for name in ("base", "source", "method", "anchors", "force") if getattr(arguments, name)]
    said += [name for name, _ in loose]
    if said:
        raise InputError(f"--{said[0].replace('_', '-')}: {arguments.config} says that itself; change it there")
    given = {name: getattr(arguments, name) for name in ("output", *SETTINGS)}
    given["data"] = _data(arguments)
    return {name: value for name, value in given.items() if value is not None and value is not False}


def read_text(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        InputError: when it is not there, or no text.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: is no text, so no configuration") from None


def read_config(path: Path) -> dict[str, Any]:
    """A configuration of our own as arguments of `merge` and `plan`; the method's options under `options`.

    Raises:
        InputError: when it is no YAML, or has unknown keys.
    """
    from hf_fda.checkpoint.untrusted import parse_yaml

    text = read_text(path)
    try:
        given = parse_yaml(text)
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(given, dict):
        raise InputError(f"{path}: must be a mapping with the keys {', '.join(CONFIG_KEYS)}")
    for name in given:
        if name not in CONFIG_KEYS:
            raise InputError(f"{path}: unknown key '{name}': {nearest(str(name), CONFIG_KEYS)}")
    return given


def read_options(options: Any) -> dict[str, Any]:
    """The method's options in a configuration file; a name that is an argument of its own is not one."""
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise InputError("options must be a mapping from option to value")
    for name in options:
        if not isinstance(name, str) or name in CONFIG_KEYS:
            raise InputError(f"options: '{name}' is no option of a method")
    return options


def _data(arguments: argparse.Namespace) -> dict[str, dict[str, Any]] | str | None:
    """The rows of data that a command line names, or the word for what takes their place."""
    if arguments.data and len(arguments.data) == 1 and arguments.data[0] in WORDS:
        return str(arguments.data[0])
    words = arguments.data or (), arguments.columns or (), arguments.split or ()
    return said_on_command_line(*words) if any(words) else None


def advice_arguments(arguments: argparse.Namespace, loose: list[tuple[str, str]]) -> dict[str, Any]:
    """What `advise` gets: what `merge` would, and the rows to try candidates on."""
    given = merge_arguments(arguments, loose)
    held = scored_data(arguments.held or (), arguments.try_columns or (), arguments.label or (), "--try")
    said = {
        "try_data": held or None,
        "metrics": asked_metrics(arguments.metric or (), held),
        **{name: getattr(arguments, name) for name in ("keep", "try_rows", "seconds")},
    }
    return {**given, **{name: value for name, value in said.items() if value is not None}}


def scored_data(
    tasks: Sequence[str], columns: Sequence[str], labels: Sequence[str], flag: str = "--task"
) -> dict[str, dict[str, Any]]:
    """What `evaluate`, `advise` and `analyze` get for data.

    >>> scored_data(["sst2=nyu-mll/glue:sst2:validation"], [], ["sst2=label"])
    {'sst2': {'path': 'nyu-mll/glue:sst2', 'split': 'validation', 'label': 'label'}}

    Args:
        tasks: "TASK=ROWS" or "TASK=ROWS:SPLIT" for each task; what is there under the whole name has no split.
        columns: "TASK=COLUMN" or "TASK=COLUMN,COLUMN".
        labels: "TASK=COLUMN".
        flag: by which `tasks` were said.

    Raises:
        InputError: when a word is written otherwise, or says something of a task without rows.
    """
    found = said_on_command_line(tasks, columns, flag=flag)
    for own in found.values():
        split = ROWS.fullmatch(own["path"])
        if split is not None and split["split"] is not None and not Path(own["path"]).expanduser().exists():
            own["path"], own["split"] = split["path"], split["split"]
    for word in labels:
        task, column = _split(word, "--label")
        if task not in found:
            raise InputError(f"--label {word}: '{task}' has no rows: {nearest(task, found)}")
        found[task]["label"] = column
    return found


def asked_metrics(words: Sequence[str], tasks: Iterable[str]) -> dict[str, list[str]] | None:
    """The metrics that a command line names for each task; None where it names none.

    >>> asked_metrics(["accuracy", "sts=pearsonr"], ["sst2", "sts"])
    {'sst2': ['accuracy'], 'sts': ['accuracy', 'pearsonr']}

    Args:
        words: "NAME" for all tasks, "TASK=NAME" for one.
        tasks: all of them.

    Raises:
        InputError: when there is no such task.
    """
    names = list(tasks)
    asked: dict[str, list[str]] = {}
    for word in words:
        task, equals, metric = word.partition("=")
        if equals and task not in names:
            raise InputError(f"--metric {word}: '{task}' has no rows: {nearest(task, names)}")
        for name in [task] if equals else names:
            asked.setdefault(name, []).append(metric if equals else word)
    return asked or None


def _named(sources: list[str]) -> dict[str, str] | list[str]:
    """Sources as given: all with names, or none."""
    if not any("=" in source for source in sources):
        return sources
    pairs = [_split(source, "--source") for source in sources]
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two sources are named '{name}'; give each a name of its own")
    return dict(pairs)


def _split(item: str, flag: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals:
        raise InputError(f"{flag} {item}: write it as TASK=... (either all sources have a name or none)")
    return name, value


def method_options(loose: list[tuple[str, str]]) -> dict[str, Any]:
    """Method options as keyword arguments."""
    return {name.replace("-", "_"): value for name, value in loose}
