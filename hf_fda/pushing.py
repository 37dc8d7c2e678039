"""Uploading a finished folder to the Hub: a merged model, or anchors as a dataset."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TypedDict

from huggingface_hub import HfApi

from hf_fda.adapters.files import CONFIG
from hf_fda.card_check import check_card
from hf_fda.errors import InputError
from hf_fda.hub import hub_errors
from hf_fda.patience import TRIES, patiently

REPLACED = {
    "model": (
        "model*.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "adapter_*",
        "task_heads/*",
        "anchors/*",
        "coefficients.*",
        "block_losses.*",
        "scores.*",
        "analysis/*",
        ".eval_results/*",
    ),
    "dataset": ("blocks/*", "index/*", "snapshots/*", "analysis/*", "anchors.png", "rest.safetensors", "task_head/*"),
}
"""What an earlier upload may have left on the Hub and a new one replaces as a whole."""


class PushOptions(TypedDict, total=False):
    """The arguments that `push` takes by name, as the methods take them that call it."""

    private: bool | None
    token: str | None
    revision: str | None
    commit_message: str | None
    create_pr: bool


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a merged folder, or an anchors folder (then as a dataset), to the Hub.

    Args:
        folder: what to upload.
        repo_id: "org/name"; made if it is not there.
        private: make it private.
        token: an access token; the saved one if None.
        revision: a branch; the main one if None.
        commit_message: of the commit.
        create_pr: open a pull request with it.

    Returns:
        the address of the commit, or of the pull request.

    Raises:
        InputError: when the folder is neither, the merge in it is not finished, its card is broken, or the Hub refuses
            it; the folder stays as it is. What was uploaded by then is not uploaded again, and readers see nothing
            before all is there.
    """
    path = Path(folder)
    kind = "dataset" if (path / "anchors.json").is_file() else "model"
    if kind == "model" and not _is_finished(path):
        raise InputError(f"{folder}: neither a finished merge nor anchors; run its merge to the end first")
    check_card(path, kind)
    api = HfApi(token=token)
    make = partial(api.create_repo, repo_id, repo_type=kind, private=private, exist_ok=True)
    upload = partial(
        api.upload_folder,
        repo_id=repo_id,
        repo_type=kind,
        folder_path=path,
        revision=revision,
        delete_patterns=list(REPLACED[kind]),
        commit_message=commit_message or ("Upload merged model" if kind == "model" else "Upload anchors"),
        create_pr=create_pr,
    )
    with hub_errors(repo_id):
        patiently(make, repo_id)
        if revision is not None and not revision.startswith("refs/pr"):
            patiently(partial(api.create_branch, repo_id, branch=revision, repo_type=kind, exist_ok=True), repo_id)
        commit = patiently(upload, repo_id, tries=1 if create_pr else TRIES)  # asked twice, it might open two
    return str(commit.pr_url or commit)


def _is_finished(folder: Path) -> bool:
    """Whether a folder holds a finished merge: the configuration of a model, or of an adapter, comes last."""
    last = any((folder / name).is_file() for name in ("config.json", CONFIG))
    return last and (folder / "merge_config.yaml").is_file()
