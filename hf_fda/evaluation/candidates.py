"""The models that are scored: a merged one under a task's own head, and the fine-tune that it was merged from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_fda.adapters import open_source
from hf_fda.adapters.checkpoint import find_adapter, is_adapter, open_adapter
from hf_fda.adapters.files import CONFIG
from hf_fda.card_record import RECORD
from hf_fda.checkpoint.alignment import align
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.location import Location, locate
from hf_fda.checkpoint.reader import FileCheckpoint, open_checkpoint
from hf_fda.errors import InputError, nearest
from hf_fda.evaluation.headed import WithHead
from hf_fda.inputs import Inputs, Source, open_inputs
from hf_fda.merged import tasks_of


def merged_model(location: Location, task: str, base: Any = None, trust_remote_code: bool = False) -> Inputs:
    """A merged model, or any other, as the only source of a base that is its own body.

    Args:
        location: where it is.
        task: whose head it gets, where it has heads.
        base: of a merged adapter, where its base is now; None: where it was when the adapter was made.
        trust_remote_code: run model code that comes with it.

    Raises:
        InputError: when it cannot be opened, or has neither head nor source of that name.
    """
    heads = tasks_of(location)
    known = [*heads, *(name for name in recorded(location).get("sources", {}) if name not in heads)]
    if heads and task not in known:
        raise InputError(f"{location.id}: it has no task '{task}': {nearest(task, known)}")
    adapter = CONFIG in location.names and "config.json" not in location.names
    if base is not None and not adapter:
        raise InputError(f"{location.id}: is a whole model; base is for merged adapters")
    body = _base_of(location, base, trust_remote_code) if adapter else FileCheckpoint(location, trust_remote_code)
    own: Checkpoint = WithHead(body, location, task, trust_remote_code) if task in heads else body
    if adapter:
        own = open_adapter(location.id, own, location)
    return Inputs(body, (Source(task, location.id, align(body, own, task)),))


def individual_model(location: Location, task: str, body: Checkpoint, trust_remote_code: bool = False) -> Inputs:
    """The fine-tune that a merged model was made of for a task.

    Args:
        location: of the merged model.
        task: the source's name.
        body: the merged model, whose tokenizer serves a fine-tune without one.
        trust_remote_code: run model code that comes with it.

    Raises:
        InputError: when the merge has no such source, or it is not to be found any more.
    """
    record = recorded(location)
    sources = record.get("sources", {})
    if task not in sources:
        way_out = nearest(task, sources) if sources else f"no {RECORD} in it says which models it was made of."
        raise InputError(f"{location.id}: no fine-tune '{task}' went into it: {way_out}")
    id = sources[task]
    try:
        found = find_adapter(locate(id))
        if is_adapter(id, found):
            tokens = task if "tokenizer" in record else None
            inputs = open_inputs(record["base"], {task: id}, trust_remote_code=trust_remote_code, tokenizer=tokens)
        else:
            own = open_source(body, id, trust_remote_code, f"source '{task}'")
            inputs = Inputs(body, (Source(task, own.id, align(body, own, task)),))
    except InputError as error:
        raise InputError(
            f"the fine-tune of '{task}' cannot be scored ({error}); put it back where it was, or leave individual out"
        ) from None
    if not inputs.weighted:
        raise InputError(f"source '{task}' is anchors only, which cannot be scored; leave individual out")
    return inputs


def recorded(location: Location) -> Mapping[str, Any]:
    """How a merged model was made, as its card's record says it; nothing of other models.

    Raises:
        InputError: when the record is damaged.
    """
    if RECORD not in location.names:
        return {}
    record = location.json(RECORD)
    arguments = record.get("arguments") if isinstance(record, dict) else None
    if not isinstance(arguments, dict):
        raise InputError(f"{location.id}: {RECORD} is damaged; run the merge again")
    return arguments


def generation_settings(inputs: Inputs) -> dict[str, Any]:
    """What the model's files say of how it writes, as the tokens that end a text; nothing where they say nothing."""
    (source,) = inputs.weighted
    for place in (source.checkpoint.location, inputs.base.location):
        if place is not None and "generation_config.json" in place.names:
            return dict(place.json("generation_config.json"))
    return {}


def _base_of(location: Location, base: Any, trust_remote_code: bool) -> Checkpoint:
    """The base of a merged adapter."""
    config = location.json(CONFIG)
    stated = str(config["base_model_name_or_path"]) + (f"@{config['revision']}" if config.get("revision") else "")
    try:
        return open_checkpoint(stated if base is None else base, trust_remote_code=trust_remote_code)
    except InputError as error:
        raise InputError(f"{location.id}: its base cannot be opened ({error}); say where it is: base=...") from None
