"""Merges that mergekit configurations describe: planned, and run document by document."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.reader import open_checkpoint
from hf_fda.engine import run
from hf_fda.errors import InputError, nearest
from hf_fda.inputs import open_inputs
from hf_fda.merged import Merged
from hf_fda.mergekit.groups import groups_of
from hf_fda.mergekit.opening import Models, open_groups
from hf_fda.mergekit.parameters import Parameters
from hf_fda.mergekit.schema import Document, read_document
from hf_fda.mergekit.views import Nothing, Planned
from hf_fda.mergekit.vocabulary import vocabulary_of
from hf_fda.mergekit.yamlnodes import read_documents
from hf_fda.plan_data import PlanData
from hf_fda.planning import check_merge, make_plan
from hf_fda.plans import Plan
from hf_fda.prediction import predict
from hf_fda.processes import together
from hf_fda.provenance import Described
from hf_fda.refusals import check_wants_data
from hf_fda.settings import Settings
from hf_fda.store import WORK, new_folder

MARKS = re.compile(r"^(merge_method|slices|models|modules)\s*:", re.MULTILINE)
"""Keys that only mergekit's configurations have."""


def is_mergekit(text: str) -> bool:
    """Whether the text of a configuration file is mergekit's.

    >>> is_mergekit("merge_method: linear"), is_mergekit("method: linear")
    (True, False)
    """
    return MARKS.search(text) is not None


EVERYWHERE = ("device", "seed", "trust_remote_code")
"""Settings that hold for every document of a configuration."""


VOCABULARY = ("tokenizer", "tokens", "chat_template", "pad_to_multiple_of")
"""Settings of the vocabulary, in which models are called by their names in the merge."""

KNOWN = (*EVERYWHERE, "dtype", "heads", "max_shard_bytes", "as_adapter", "rank", "energy", "data", *VOCABULARY)
"""Settings that may be given beside a configuration."""


@dataclass(frozen=True)
class Stage:
    """A document and the folder that its result goes to."""

    document: Document
    output: Path


def stages_of(text: str, file: str, output: str | os.PathLike[str]) -> tuple[Stage, ...]:
    """The documents of a configuration in the order in which they can be merged; the last gives the result.

    Args:
        text: of the configuration.
        file: what to call it in messages.
        output: the folder of the result. What earlier documents give lies in its work folder meanwhile.

    Raises:
        InputError: naming the line, for what is wrong with a document or with how they use each other.
    """
    documents = [read_document(node) for node in read_documents(text, file)]
    unnamed = [document for document in documents if document.name is None]
    if len(unnamed) > 1:
        unnamed[1].node.refuse("a second merge without a name; give all but the last one a name")
    last = unnamed[0] if unnamed else documents[-1]
    named: dict[str, Document] = {}
    for document in documents:
        if document.name is None:
            continue
        if document.name in named or not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", document.name):
            document.node.refuse(f"name '{document.name}': use letters, digits, '.', '_' and '-', and each name once")
        named[document.name] = document
    ordered: list[Document] = []
    _visit(last, named, ordered, ())
    for document in documents:
        if document not in ordered:
            document.node.refuse(f"nothing uses the result of '{document.name}'; give it a file of its own")
    folder = new_folder(output)
    between = folder / WORK / "stages"
    return tuple(Stage(own, folder if own is last else between / str(own.name)) for own in ordered)


def _visit(document: Document, named: Mapping[str, Document], ordered: list[Document], above: Sequence[str]) -> None:
    """Put a document behind all that it uses."""
    if document in ordered:
        return
    for reference in document.references:
        if reference.model in (*above, document.name):
            reference.node.refuse(f"'{reference.model}' would be made from itself")
        if reference.model in named:
            _visit(named[reference.model], named, ordered, (*above, *([document.name] if document.name else [])))
    ordered.append(document)


def plan_documents(
    text: str, file: str, output: str | os.PathLike[str], *, processes: int | None = None, **settings: Any
) -> tuple[Plan, ...]:
    """Check every merge of a configuration; as `hf_fda.plan`, with nothing written.

    Args:
        text: of the configuration.
        file: what to call it in messages.
        output: the folder of the result.
        processes: predict how long the merges take on so many.
        settings: arguments of `hf_fda.plan` that are no inputs, method or options; they win over the file's.

    Raises:
        InputError: naming line and key that cannot be used, and the way out.
    """
    plans: list[Plan] = []
    promised: dict[str, Checkpoint] = {}
    stages = stages_of(text, file, output)
    for stage in stages:
        checked = _plan(stage, promised, _settings_of(stage, stages, settings))
        plans.append(checked if processes is None else replace(checked, time=predict(checked, processes)))
        promised[str(stage.document.name)] = Planned(plans[-1])
    return tuple(plans)


def merge_documents(
    text: str, file: str, output: str | os.PathLike[str], *, quiet: bool = False, **settings: Any
) -> Merged:
    """Merge what a configuration describes. All its documents are checked before the first is merged.

    Args:
        text: of the configuration.
        file: what to call it in messages.
        output: the folder of the result.
        quiet: show no progress.
        settings: as `plan_documents`.

    Raises:
        InputError: naming line and key that cannot be used, and the way out.
        RunError: when the work fails on the way; the same call goes on from there.
    """
    with together(settings.get("device") or "auto") as team:
        plans = team.agree(lambda: plan_documents(text, file, output, **settings))
        stages = stages_of(text, file, output)
        done: dict[str, Checkpoint] = {}
        for stage, checked in zip(stages, plans, strict=True):
            if done:  # what was promised is there now
                checked = team.agree(partial(_plan, stage, done, _settings_of(stage, stages, settings)))
            folder = run(checked, quiet, team)
            if stage is not stages[-1]:
                done[str(stage.document.name)] = open_checkpoint(folder)
        if team.main:
            shutil.rmtree(stages[-1].output / WORK / "stages", ignore_errors=True)
    return Merged(stages[-1].output)


def _settings_of(stage: Stage, stages: Sequence[Stage], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that hold for a document: how the result is written is none of the earlier ones' business.

    Raises:
        InputError: when there is no such setting.
    """
    for name in settings:
        if name not in KNOWN:
            raise InputError(f"there is no setting '{name}' beside a configuration: {nearest(name, KNOWN)}")
    given = {name: value for name, value in settings.items() if value is not None}
    return given if stage is stages[-1] else {name: given[name] for name in EVERYWHERE if name in given}


def _plan(stage: Stage, results: Mapping[str, Checkpoint], settings: Mapping[str, Any]) -> Plan:
    """The plan of one document; what earlier ones give is open."""
    document = stage.document
    given = {**document.settings, **settings}
    said = {name: given.pop(name) for name in VOCABULARY if name in given}
    trust, data = bool(given.pop("trust_remote_code", False)), given.pop("data", None)
    given.setdefault("dtype", document.dtype or "auto")
    checked = Settings.checked(stage.output, **given)
    groups = groups_of(document)
    parameters = Parameters(document, groups)
    models = Models(results, trust)
    opened = open_groups(document, groups, models)
    wanted = {**vocabulary_of(document, opened), **said}
    with_base = document.base is not None  # tokens are taken from it also where it is a model among others
    inputs = open_inputs(opened.base, opened.sources, None, trust, **wanted, with_base=with_base)
    if not opened.with_base:
        inputs = replace(inputs, base=Nothing(inputs.base), with_base=False)
    varying = parameters.varying
    at = parameters.at(inputs) if varying else None
    check_wants_data(parameters.general, data)
    if varying and parameters.general.data != "never":
        raise InputError(f"method '{parameters.general.name}': {varying[0]} must be the same for all tensors")

    def describe(found: PlanData) -> Described:
        return Described(_record(document, models.pinned(), checked, found), at, varying)

    # Results of earlier documents cannot be read when this one is planned, so nothing is drawn from them unasked.
    if data is None and any(reference.model in results for reference in document.references):
        return make_plan(inputs, parameters.general, checked, PlanData(), describe(PlanData()))
    return check_merge(inputs, parameters.general, checked, data, trust, describe)


def _record(document: Document, pinned: Mapping[str, str], settings: Settings, data: PlanData) -> dict[str, Any]:
    """The document as plain values, with what it leaves open: commits, the type, and our own settings."""

    def fixed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fixed(item) for name, item in value.items()}
        if isinstance(value, list):
            return [fixed(item) for item in value]
        return pinned.get(value, value) if isinstance(value, str) else value

    budget = settings.budget
    own: dict[str, Any] = {"seed": settings.seed, "heads": settings.heads, "max_shard_bytes": settings.max_shard_bytes}
    if budget is not None:
        own |= {"as_adapter": True, "rank": budget.rank, "energy": budget.energy}
    own |= data.recorded
    written = {} if settings.dtype == "auto" else {"out_dtype": settings.dtype}
    return {**fixed(document.plain), **written, "hf_fda": own}
