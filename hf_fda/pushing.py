"""Uploading a finished folder to the Hub: a merged model, or anchors as a dataset."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi

from hf_fda.errors import InputError
from hf_fda.hub import hub_errors

REPLACED = {
    "model": (
        "model*.safetensors",
        "model.safetensors.index.json",
        "task_heads/*",
        "anchors/*",
        "scores.json",
        ".eval_results/*",
    ),
    "dataset": ("blocks/*", "index/*"),
}
"""What an earlier upload may have left on the Hub and a new one replaces as a whole."""


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload a merged folder, or an anchors folder (then as a dataset), to the Hub.

    Returns:
        the address of the commit.

    Raises:
        InputError: when the folder is neither, or the merge in it is not finished.
    """
    path = Path(folder)
    kind = "dataset" if (path / "anchors.json").is_file() else "model"
    if kind == "model" and not all((path / name).is_file() for name in ("config.json", "merge_config.yaml")):
        raise InputError(f"{folder}: neither a finished merge nor anchors; run its merge to the end first")
    api = HfApi(token=token)
    with hub_errors(repo_id):
        api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=kind,
            folder_path=path,
            revision=revision,
            delete_patterns=list(REPLACED[kind]),
            commit_message="Upload merged model" if kind == "model" else "Upload anchors",
        )
    return str(commit)
