"""Models whose blocks do something else, or nothing, where they run apart from the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from conftest import TEXT, fine_tune

import hf_fda
from hf_fda.errors import RunError

SETTINGS: dict[str, Any] = {
    "data": "anchors",
    "num_anchors": 4,
    "steps": 2,
    "epochs": 1,
    "quiet": True,
    "device": "cpu",
}


def merge(base: Any, folder: Path) -> hf_fda.Merged:
    base.save_pretrained(folder / "base")
    for number in (1, 2):
        fine_tune(base, number).save_pretrained(folder / f"source{number}")
    sources = {name: folder / name for name in ("source1", "source2")}
    return hf_fda.merge(folder / "base", sources, output=folder / "out", **SETTINGS)


def test_sparse_attention_of_few_tokens_is_full(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = t.BigBirdConfig(**TEXT, attention_type="block_sparse", pad_token_id=0, sep_token_id=1)
    merged = merge(t.BigBirdForSequenceClassification(config), tmp_path)
    assert merged.block_losses is not None
    assert t.AutoConfig.from_pretrained(merged.folder).attention_type == "block_sparse"


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("IBert", "blocks of IBertForSequenceClassification cannot be run apart"),
        ("Mra", "block 'mra.encoder.layer.0', source 'source1': it cannot be run apart"),
        ("Longformer", "block 'longformer.encoder.layer.0', source 'source1': the gradient of .* is not finite"),
    ],
)
def test_what_fails_apart_is_named_with_the_way_out(kind: str, what: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(t, f"{kind}Config")(**TEXT, attention_window=4, max_position_embeddings=64)
    with pytest.raises(RunError, match=f"{what}.*parameter-space method"):
        merge(getattr(t, f"{kind}ForSequenceClassification")(config), tmp_path)
    base, sources = tmp_path / "base", [tmp_path / "source1", tmp_path / "source2"]
    assert hf_fda.merge(base, sources, "isotropic", output=tmp_path / "other", quiet=True).folder.exists()
