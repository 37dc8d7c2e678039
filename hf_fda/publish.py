"""The last step of a merge: heads, tokenizer, configuration and card, then everything put in its place at once."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_fda.adapters.files import CONFIG, WEIGHTS
from hf_fda.adapters.report import REPORT
from hf_fda.anchors.beside import config_text
from hf_fda.card_record import record_card
from hf_fda.cards import shown
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.location import INDEX
from hf_fda.checkpoint.named import HeldTensors, Tensors, write_tensors
from hf_fda.checkpoint.writer import shard_index
from hf_fda.findings import write_findings
from hf_fda.heads import TaskHead, head_files
from hf_fda.input_cards import UNKNOWN, languages_of, licences_of
from hf_fda.inputs import Inputs, Source
from hf_fda.plans import Plan
from hf_fda.provenance import pinned
from hf_fda.store import WORK, Store
from hf_fda.version import versions
from hf_fda.vocabulary.output import GENERATION, TokenizerFiles
from hf_fda.vocabulary.tokens import TOKENIZER_FILES

PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    GENERATION,
)
"""Files beside weights and tokenizer that a merged model takes over from its base."""


def publish(plan: Plan, store: Store, prints: Mapping[str, str], spent: Mapping[str, Any] | None) -> None:
    """Move finished weight files into place and write everything around them; `config.json` comes last.

    Until it is there no library takes the folder for a model, so an interruption leaves nothing that looks finished.

    Args:
        plan: what was done.
        store: the output folder.
        prints: hashes of the rows of data, by task.
        spent: what the run took (`Run.spent`); None where it had nothing to do.
    """
    folder = plan.output
    weights = {sha_name: store.work / "staged" / sha_name for sha_name in (shard.file for shard in plan.shards)}
    if any(path.exists() for path in weights.values()):
        (folder / "config.json").unlink(missing_ok=True)
    for name, staged in weights.items():
        if staged.exists():
            store.move(f"{WORK}/staged/{name}", name)
    _remove_stale(plan, store)
    if len(plan.shards) > 1:
        store.write_text(INDEX, shard_index(plan.shards))
    write_heads(plan, store)
    copy_processors(plan)
    config = _output_config(plan)
    write_record(plan, store, prints, spent)
    store.write_text("config.json", config)
    clean(store)


def write_record(plan: Plan, store: Store, prints: Mapping[str, str], spent: Mapping[str, Any] | None) -> None:
    """Write how the merge is made again, and the card; weights and what was found on the way are in their places.

    Args:
        plan: what was done.
        store: the output folder.
        prints: hashes of the rows of data, by task.
        spent: as `publish`.
    """
    store.write_text("merge_config.yaml", merge_yaml(plan, prints))
    write_findings(plan, store)
    record_card(store, plan.arguments, card_facts(plan), spent)


def clean(store: Store) -> None:
    """Remove the work in progress of a merge that is finished."""
    for name in ("staged", "blocks", "counts", "targets", "outputs", "learning", "states", "statistics", "partial"):
        shutil.rmtree(store.work / name, ignore_errors=True)
    shutil.rmtree(store.work / "records" / WORK, ignore_errors=True)


def write_heads(plan: Plan, store: Store) -> None:
    """Write what is each task's own, and remove the heads of an earlier merge."""
    heads = {head.task: head for head in plan.result.heads}
    for source in plan.inputs.sources:
        if source.name in heads:
            _write_head(store, source, heads[source.name])
    for folder in (plan.output / "task_heads").glob("*"):
        if folder.name not in heads:
            store.remove(str(Path("task_heads") / folder.name))


def merge_yaml(plan: Plan, prints: Mapping[str, str]) -> str:
    """The text of `merge_config.yaml`: `hf-fda merge merge_config.yaml --output DIR` makes the same model again, or
    says that a task's rows are others now.

    Args:
        plan: what was done.
        prints: hashes of the rows of data, by task.
    """
    document = copy.deepcopy(plan.arguments.get("mergekit", plan.arguments))
    recorded = document.get("hf_fda", document).get("data", {})
    for task, found in prints.items():
        recorded[task]["fingerprint"] = found
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def card_facts(plan: Plan) -> dict[str, object]:
    """What the card states beside the arguments: recorded facts only."""
    checkpoints: dict[str, Checkpoint] = {
        "base": plan.inputs.base,
        **{source.name: source.checkpoint for source in plan.inputs.weighted},
    }
    anchored = {
        source.name: source.anchors.info.source.get("licences") or [UNKNOWN]
        for source in plan.inputs.sources
        if source.weights is None and source.anchors is not None
    }
    return {
        "model_class": (plan.adapter or plan.result).layout.model_class.__name__,
        "model_type": plan.result.layout.config.model_type,
        "heads": [head.task for head in plan.result.heads],
        "summary": plan.config.summary,
        "paper": plan.config.paper,
        "notes": list(plan.notes),
        "licences": {name: licences_of(checkpoint) for name, checkpoint in checkpoints.items()} | anchored,
        "languages": list(dict.fromkeys(own for one in checkpoints.values() for own in languages_of(one))),
        "models": [pinned(own.id, own.commit) for one in checkpoints.values() for own in one.origins],
        "shown": {name: _shown(checkpoint, plan.inputs) for name, checkpoint in checkpoints.items()},
        "data": {task: rows.shown for task, rows in plan.data.items()},
        "synthetic": bool(plan.data) and all(rows.drawn for rows in plan.data.values()),
        "datasets": [str(rows.record["path"]) for rows in plan.data.values() if rows.on_hub],
        "anchors": [source.name for source in plan.anchors_made],
        "versions": versions(),
    }


def _shown(checkpoint: Checkpoint, inputs: Inputs) -> str:
    """What a checkpoint is made of, in words for readers elsewhere."""
    names = ", ".join(dict.fromkeys(shown(pinned(own.id, own.commit)) for own in checkpoint.origins))
    if checkpoint is inputs.base and not inputs.with_base:
        return f"none; configuration and tokenizer are those of {names}"
    return names if len(checkpoint.origins) == 1 else f"made of {names}"


def _output_config(plan: Plan) -> str:
    facts = plan.result.layout.written_config()
    if plan.dtype is not None:
        facts["dtype"] = str(plan.dtype).removeprefix("torch.")
    return json.dumps(facts, indent=2, sort_keys=True) + "\n"


def _write_head(store: Store, source: Source, head: TaskHead) -> None:
    """Write a task's own tensors, in the layout of its own checkpoint, with its own configuration."""
    if source.weights is not None:
        held, config = head_files(source.weights, head)
        tensors: Tensors = HeldTensors(held)
    else:
        assert source.anchors is not None and source.anchors.beside.head is not None
        tensors, config = source.anchors.beside.head
    folder = f"task_heads/{head.task}"
    store.write(f"{folder}/model.safetensors", "head", lambda path: write_tensors(path, tensors))
    store.write_text(f"{folder}/config.json", config_text(config))


def copy_processors(plan: Plan) -> None:
    """Write the tokenizer, and copy from the base what else goes with a model: the code that it refers to, too."""
    location = plan.inputs.base.location
    files = plan.inputs.vocabulary.files or TokenizerFiles(location)
    contents = {name: files.content(name) for name in files.names}
    if location is not None:
        written = plan.result.layout.written_config()
        code = [name for name in location.names if name.endswith(".py") and "/" not in name and "auto_map" in written]
        copied = (name for name in (*PROCESSORS, *code) if name in location.names and name not in contents)
        contents |= {name: location.path(name).read_bytes() for name in copied}
    if plan.adapter is not None:
        contents.pop(GENERATION, None)
    for name in (*TOKENIZER_FILES, GENERATION) if files.names else ():
        if name not in contents:
            (plan.output / name).unlink(missing_ok=True)
    for name, content in contents.items():
        partial = plan.output / WORK / "partial" / name
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, plan.output / name)


def remove_model(folder: Path, store: Store) -> None:
    """Remove the whole model of an earlier merge in this folder: libraries would load it in place of the adapter."""
    (folder / "config.json").unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):
        store.remove(path.name)
    (folder / INDEX).unlink(missing_ok=True)


def _remove_adapter(folder: Path, store: Store) -> None:
    """Remove the adapter of an earlier merge in this folder: libraries would put it on the merged model."""
    (folder / CONFIG).unlink(missing_ok=True)
    if (folder / WEIGHTS).is_file():
        store.remove(WEIGHTS)
    (folder / REPORT).unlink(missing_ok=True)


def _remove_stale(plan: Plan, store: Store) -> None:
    """Remove weight files of an earlier merge in this folder that this one does not have."""
    _remove_adapter(plan.output, store)
    files = {shard.file for shard in plan.shards}
    for path in plan.output.glob("model*.safetensors"):
        if path.name not in files:
            store.remove(path.name)
    if len(plan.shards) == 1:
        (plan.output / INDEX).unlink(missing_ok=True)
