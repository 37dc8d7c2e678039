"""Tiny real transformers models of every family, and fine-tunes of them made by small random steps."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

torch.set_num_threads(1)  # threads make models of this size slower, and fight with those of parallel tests

SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**SIZE, "vocab_size": 99}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2}
HEADED: dict[str, Any] = {**GROUPED, "head_dim": 8}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
IMAGE: dict[str, Any] = {**SIZE, "image_size": 16, "patch_size": 4}
T5: dict[str, Any] = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 99}


def _clip() -> t.CLIPConfig:
    return t.CLIPConfig(vision_config=IMAGE, text_config={**TEXT, "max_position_embeddings": 20})


FAMILIES: dict[str, tuple[Any, Callable[[], Any]]] = {
    "bert": (t.BertForSequenceClassification, lambda: t.BertConfig(**TEXT, max_position_embeddings=40)),
    "bert-mlm": (t.BertForMaskedLM, lambda: t.BertConfig(**TEXT, max_position_embeddings=40)),
    "roberta": (t.RobertaForSequenceClassification, lambda: t.RobertaConfig(**TEXT, max_position_embeddings=40)),
    "electra": (  # embedded text is narrower than the blocks
        t.ElectraForSequenceClassification,
        lambda: t.ElectraConfig(**TEXT, embedding_size=16, max_position_embeddings=40),
    ),
    "deberta-v2": (  # a table is used without being called, and goes into every block
        t.DebertaV2ForSequenceClassification,
        lambda: t.DebertaV2Config(
            **TEXT,
            max_position_embeddings=40,
            relative_attention=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            type_vocab_size=0,
        ),
    ),
    "mpnet": (  # marks no blocks
        t.MPNetForSequenceClassification,
        lambda: t.MPNetConfig(**TEXT, max_position_embeddings=40),
    ),
    "vit": (t.ViTForImageClassification, lambda: t.ViTConfig(**IMAGE)),
    "clip-vision": (t.CLIPVisionModel, lambda: t.CLIPVisionConfig(**IMAGE)),
    "clip-image": (t.CLIPForImageClassification, _clip),
    "clip-text": (t.CLIPTextModel, lambda: t.CLIPTextConfig(**TEXT, max_position_embeddings=20)),
    "clip": (t.CLIPModel, _clip),
    "llama": (t.LlamaForCausalLM, lambda: t.LlamaConfig(**GROUPED)),
    "qwen2": (t.Qwen2ForCausalLM, lambda: t.Qwen2Config(**GROUPED, tie_word_embeddings=True)),
    "qwen3": (t.Qwen3ForCausalLM, lambda: t.Qwen3Config(**HEADED)),
    "mistral": (t.MistralForCausalLM, lambda: t.MistralConfig(**GROUPED)),
    "gemma": (t.GemmaForCausalLM, lambda: t.GemmaConfig(**HEADED)),
    "gemma2": (t.Gemma2ForCausalLM, lambda: t.Gemma2Config(**HEADED)),
    "gemma3": (t.Gemma3ForCausalLM, lambda: t.Gemma3TextConfig(**HEADED)),
    "gpt2": (
        t.GPT2LMHeadModel,
        lambda: t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=40),
    ),
    "t5": (t.T5ForConditionalGeneration, lambda: t.T5Config(**T5)),
    "mixtral": (t.MixtralForCausalLM, lambda: t.MixtralConfig(**GROUPED, num_local_experts=4)),
    "qwen2-moe": (
        t.Qwen2MoeForCausalLM,
        lambda: t.Qwen2MoeConfig(**GROUPED, shared_expert_intermediate_size=32, **EXPERTS),
    ),
    "qwen3-moe": (t.Qwen3MoeForCausalLM, lambda: t.Qwen3MoeConfig(**HEADED, **EXPERTS)),
}


def make_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny model of a family with random weights; `changes` overrule fields of its configuration."""
    model_class, config = FAMILIES[family]
    configuration = config()
    for name, value in changes.items():
        setattr(configuration, name, value)
    torch.manual_seed(seed)
    return model_class(configuration).eval()


def fine_tune(model: Any, seed: int, size: float = 0.02) -> Any:
    """A copy of a model with every parameter moved a little, as training would; tied parameters stay tied."""
    import copy

    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return tuned


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    t.utils.logging.disable_progress_bar()
    t.utils.logging.set_verbosity_error()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Path, list[Path]]]:
    """Saves a family's base and some fine-tunes of it: `saved("llama", 2)` gives (base folder, [source folders])."""

    def save(family: str, sources: int = 2, **changes: Any) -> tuple[Path, list[Path]]:
        base = make_model(family, **changes)
        base.save_pretrained(tmp_path / "base")
        folders = []
        for number in range(sources):
            folder = tmp_path / f"source{number}"
            fine_tune(base, seed=number + 1).save_pretrained(folder)
            folders.append(folder)
        return tmp_path / "base", folders

    return save


@pytest.fixture
def classifiers(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """A bare BERT encoder and three classifiers fine-tuned from it, with heads of different sizes."""
    base = t.BertModel(t.BertConfig(**TEXT, max_position_embeddings=40)).eval()
    base.save_pretrained(tmp_path / "base")
    folders = {}
    for number, (task, labels) in enumerate({"two": 2, "three": 3, "four": 4}.items()):
        config = t.BertConfig(**TEXT, max_position_embeddings=40, num_labels=labels)
        torch.manual_seed(number)
        model = t.BertForSequenceClassification(config).eval()
        model.bert.load_state_dict(fine_tune(base, seed=number + 1).state_dict())
        folders[task] = tmp_path / task
        model.save_pretrained(folders[task])
    return tmp_path / "base", folders


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Path]]]:
    """A family's base and two fine-tunes of it, saved once for all tests that only read them:
    `library("llama")` gives (base folder, [source folders])."""
    made: dict[str, tuple[Path, list[Path]]] = {}

    def take(family: str) -> tuple[Path, list[Path]]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            base = make_model(family)
            base.save_pretrained(folder / "base")
            sources = [folder / "one", folder / "two"]
            for seed, source in enumerate(sources, 1):
                fine_tune(base, seed=seed).save_pretrained(source)
            made[family] = folder / "base", sources
        return made[family]

    return take
