"""The result of a merge: a folder that loads as the model of each of its tasks, and goes to the Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hf_fda.adapters.files import CONFIG, WEIGHTS
from hf_fda.adapters.report import REPORT, AdapterReport, read_report
from hf_fda.block_losses import LOSSES, BlockLosses
from hf_fda.checkpoint.alignment import match_names
from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.layout import ModelLayout, model_class_of
from hf_fda.checkpoint.location import Location, locate
from hf_fda.checkpoint.reader import FileCheckpoint, is_unknown
from hf_fda.checkpoint.untrusted import parse_yaml
from hf_fda.coefficients import COEFFICIENTS, Coefficients
from hf_fda.errors import InputError, few, nearest
from hf_fda.evaluation.scores import Scores, read_scores
from hf_fda.printing import html_table
from hf_fda.pushing import PushOptions, push

HEADS = "task_heads"


@dataclass(frozen=True)
class Merged:
    """A merged model in a folder."""

    folder: Path

    @property
    def tasks(self) -> list[str]:
        """Tasks whose own heads lie beside the merged body."""
        return sorted(path.parent.name for path in self.folder.glob(f"{HEADS}/*/config.json"))

    @property
    def report(self) -> AdapterReport | None:
        """Of a merged adapter, what its factors leave out; None of a whole model."""
        path = self.folder / REPORT
        return read_report(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def coefficients(self) -> Coefficients | None:
        """The coefficients of the task vectors, of a merge that learnt them."""
        path = self.folder / COEFFICIENTS
        return Coefficients.read(path) if path.is_file() else None

    @property
    def block_losses(self) -> BlockLosses | None:
        """How well its blocks were fitted, of a merge that fits blocks."""
        path = self.folder / LOSSES
        return BlockLosses.read(path) if path.is_file() else None

    @property
    def scores(self) -> Scores | None:
        """What `hf_fda.evaluate` found of these weights; None where they were not scored."""
        return read_scores(self.folder)

    def __repr__(self) -> str:
        return f"Merged({str(self.folder)!r}, {', '.join(f'{label}: {text}' for label, text in self._facts())})"

    def _repr_html_(self) -> str:
        return html_table(f"Merged model in {self.folder}", self._facts())

    def _facts(self) -> list[tuple[str, str]]:
        """What it is, in words, from what it was recorded as."""
        path = self.folder / "merge_config.yaml"
        if not path.is_file():
            return [("state", "not finished")]
        record = parse_yaml(path.read_text(encoding="utf-8"))
        names = {"method": "method", "merge_method": "method", "base": "base", "base_model": "base"}
        facts = [(label, str(record[name])) for name, label in names.items() if name in record]
        facts += [("sources", ", ".join(record["sources"]))] if "sources" in record else []
        kind = "adapter" if self.report is not None else "whole model"
        return [*facts, ("kind", kind), *([("task heads", ", ".join(self.tasks))] if self.tasks else [])]

    def load(self, task: str | None = None, **kwargs: Any) -> PreTrainedModel:
        """The transformers model, as `load`."""
        return load(self.folder, task, **kwargs)

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Upload the folder as a Hub model.

        Args:
            repo_id: "org/name"; made if it is not there.
            options: private, token, revision, commit_message and create_pr, as `hf_fda.pushing.push`.

        Returns:
            the address of the commit, or of the pull request.
        """
        return push(self.folder, repo_id, **options)


def load(
    source: str | os.PathLike[str],
    task: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    base: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a merged model, or a merged adapter on its base, with a task's own head where it has heads.

    Args:
        source: the merged folder, or its Hub id.
        task: one of the heads in `task_heads/`; None gives the merged body alone (of an adapter whose tasks have heads,
            one has to be named).
        revision: Hub revision.
        trust_remote_code: run model code that comes with the checkpoint.
        base: of a merged adapter, where its base is now; None: where it was when the adapter was made.
        kwargs: passed on to `from_pretrained` (dtype, device_map, attn_implementation).

    Returns:
        the model, in evaluation mode; of a merged adapter a `PeftModel`.

    Raises:
        InputError: when there is no such model, task or base.
    """
    location = locate(source, revision)
    if CONFIG in location.names and "config.json" not in location.names:
        return _adapted(location, task, base, trust_remote_code, kwargs)
    if base is not None:
        raise InputError(f"{source}: is a whole model; base is for merged adapters")
    if "config.json" not in location.names:
        raise InputError(f"{source}: no finished model in it (no config.json); run its merge to the end first")
    if is_unknown(location, trust_remote_code):
        raise InputError(
            f"{source}: transformers does not know its architecture; pass trust_remote_code=True if it comes with code "
            "that you trust, else open its tensors by safetensors"
        )
    if task is None:
        config = _config(location, "config.json", trust_remote_code)
        where = str(location.folder or location.repo_id)
        model_class = model_class_of(config, where, trust_remote_code, location.commit)
        if location.folder is None:
            kwargs["revision"] = location.commit
        return model_class.from_pretrained(where, config=config, **kwargs)
    _check_task(location, task)
    return _with_head(location, task, FileCheckpoint(location, trust_remote_code), trust_remote_code, kwargs)


def _check_task(location: Location, task: str) -> None:
    known = tasks_of(location)
    if task not in known:
        listed = nearest(task, known) if known else "it has no task heads; leave the task out."
        raise InputError(f"{location.id}: no head for task '{task}': {listed}")


def _adapted(
    location: Location, task: str | None, base: str | os.PathLike[str] | None, trust_remote_code: bool, kwargs: Any
) -> Any:
    """A merged adapter on its base, with a task's own head."""
    from peft import PeftModel

    config = location.json(CONFIG)
    stated = config["base_model_name_or_path"] + (f"@{config['revision']}" if config.get("revision") else "")
    try:
        body = FileCheckpoint(locate(base or stated), trust_remote_code)
    except InputError as error:
        raise InputError(f"{location.id}: its base cannot be opened ({error}); say where it is: base=...") from None
    known = tasks_of(location)
    if task is None and known:
        raise InputError(f"{location.id}: the adapter's tasks have heads of their own; say which: {', '.join(known)}")
    if task is None:
        where = body.location
        assert where is not None
        model_class = getattr(transformers, config["auto_mapping"]["base_model_class"])
        kwargs = {"revision": where.commit, **kwargs} if where.folder is None else kwargs
        model = model_class.from_pretrained(str(where.folder or where.repo_id), **kwargs)
    else:
        _check_task(location, task)
        model = _with_head(location, task, body, trust_remote_code, kwargs)
    location.path(WEIGHTS)
    return PeftModel.from_pretrained(model, str(location.path(CONFIG).parent)).eval()


def tasks_of(location: Location) -> list[str]:
    """Tasks with a head in a merged folder or repository."""
    if location.folder is not None:
        return Merged(location.folder).tasks
    parts = [name.split("/") for name in location.names]
    return sorted(part[1] for part in parts if len(part) == 3 and part[0] == HEADS and part[2] == "config.json")


def _config(location: Location, name: str, trust_remote_code: bool) -> Any:
    path = location.path(name)
    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def _with_head(
    location: Location, task: str, body: FileCheckpoint, trust_remote_code: bool, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """The task's own class, its body from a checkpoint and everything after the last block from its head.

    Both are brought to the class's names in memory first: on disk they may bear other prefixes, and where both hold a
    tensor it is the head's that counts.
    """
    head = f"{HEADS}/{task}"
    config = _config(location, f"{head}/config.json", trust_remote_code)
    where = str(location.folder or location.repo_id)
    model_class = model_class_of(config, where, trust_remote_code, location.commit)
    layout = ModelLayout(config, model_class)
    names = match_names(layout.names, layout.body_prefixes, body.names, body.layout.body_prefixes)
    own = head_tensors(location.path(f"{head}/model.safetensors"), layout)
    state = own | {name: body.read(other) for name, other in names.items() if name not in own}
    kwargs = {"dtype": _stored_dtype(body), **kwargs}
    loaded: Any = model_class.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, **kwargs)
    model, report = loaded
    if report["missing_keys"]:
        missing = few(sorted(report["missing_keys"]))
        raise InputError(f"{location.id}: body and head of task '{task}' lack {missing}; the folder is incomplete")
    return model.eval()


def head_tensors(path: Path, layout: ModelLayout) -> dict[str, Tensor]:
    """A task's own tensors by their names in memory."""
    entries = read_header(path)
    stored = {name: read_tensor(path, entry) for name, entry in entries.items()}
    groups, _ = layout.groups(stored)
    tensors: dict[str, Tensor] = {}
    for group in groups:
        tensors.update(group.to_memory(stored, layout.model))
    return tensors


def _stored_dtype(body: FileCheckpoint) -> torch.dtype:
    """The type of the merged weights."""
    return next((body.dtype(name) for name in body.names if body.dtype(name).is_floating_point), torch.float32)
