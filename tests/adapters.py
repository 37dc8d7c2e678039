"""PEFT adapters of every kind on tiny models, with weights as if they had been trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import make_model
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor

LINEAR: dict[str, list[str]] = {
    "bert": ["value", "intermediate.dense"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "vit": ["v_proj", "fc1"],
    "t5": ["v", "wo"],
}
EMBEDDING = {"bert": "word_embeddings", "llama": "embed_tokens", "gpt2": "wpe"}
NORM = {"bert": "LayerNorm", "llama": "norm", "gpt2": "ln_1", "vit": "layernorm_before", "t5": "final_layer_norm"}

KINDS: dict[str, Callable[[str], PeftConfig]] = {
    "plain": lambda f: LoraConfig(r=3, lora_alpha=7, target_modules=LINEAR[f]),
    "rslora": lambda f: LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=LINEAR[f]),
    "dora": lambda f: LoraConfig(r=3, use_dora=True, target_modules=LINEAR[f]),
    "lora_bias": lambda f: LoraConfig(r=3, lora_bias=True, target_modules=LINEAR[f]),
    "bias-all": lambda f: LoraConfig(r=3, bias="all", target_modules=LINEAR[f]),
    "bias-lora_only": lambda f: LoraConfig(r=3, bias="lora_only", target_modules=LINEAR[f]),
    "patterns": lambda f: LoraConfig(
        r=3, target_modules=LINEAR[f], rank_pattern={LINEAR[f][0]: 5}, alpha_pattern={LINEAR[f][1]: 11}
    ),
    "layers": lambda f: LoraConfig(r=3, target_modules=LINEAR[f], layers_to_transform=[1]),
    "modules_to_save": lambda f: LoraConfig(r=3, target_modules=LINEAR[f], modules_to_save=[NORM[f]]),
    "embedding": lambda f: LoraConfig(r=3, target_modules=[*LINEAR[f], EMBEDDING[f]]),
    "embedding-dora": lambda f: LoraConfig(r=3, use_dora=True, target_modules=[*LINEAR[f], EMBEDDING[f]]),
    "pissa": lambda f: LoraConfig(r=3, init_lora_weights="pissa", target_modules=LINEAR[f]),
    "olora": lambda f: LoraConfig(r=3, init_lora_weights="olora", target_modules=LINEAR[f]),
    "loha": lambda f: LoHaConfig(r=3, target_modules=LINEAR[f]),
    "lokr": lambda f: LoKrConfig(r=3, target_modules=LINEAR[f]),
    "ia3": lambda f: IA3Config(target_modules=LINEAR[f], feedforward_modules=LINEAR[f][-1:]),
    "vera": lambda f: VeraConfig(r=3, target_modules=LINEAR[f][:1]),
    "oft": lambda f: OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR[f]),
}


def train(base: Any, config: PeftConfig, seed: int, size: float = 0.1) -> PeftModel:
    """A copy of a base with an adapter of random weights."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(base: Any, config: PeftConfig, folder: Path, seed: int = 1) -> Path:
    """The folder of a trained adapter."""
    train(base, config, seed).save_pretrained(folder)
    return folder


def make_base(family: str, **changes: Any) -> Any:
    """A tiny base whose parameters are all random, biases and norms too."""
    model = make_model(family, **changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def outputs(model: Any, family: str) -> Tensor:
    """What a model says to some input, in float32."""
    generator = torch.Generator().manual_seed(3)
    model = model.eval()
    with torch.no_grad():
        if family == "vit":
            return model(pixel_values=torch.randn(2, 3, 16, 16, generator=generator)).logits
        ids = torch.randint(1, 99, (2, 7), generator=generator)
        extra = {"decoder_input_ids": ids} if family == "t5" else {}
        return model(input_ids=ids, **extra).logits


def relative(found: Tensor, expected: Tensor) -> float:
    """The error as a fraction of what is expected."""
    return float((found - expected).norm() / expected.norm())
