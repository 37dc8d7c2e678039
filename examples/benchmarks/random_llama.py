"""Random checkpoints in the shape of Llama or Mixtral, written tensor by tensor in shards as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig

from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.checkpoint.writer import SafetensorsWriter, TensorSpec, plan_shards, shard_index

SHARD_BYTES = 500_000_000


def llama(hidden: int = 2048, layers: int = 22, vocabulary: int = 32000) -> LlamaConfig:
    """By default the shape of TinyLlama: 1.1 billion parameters."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 512, 1),
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )


def mixtral(tensors: int, experts: int = 64, hidden: int = 64) -> MixtralConfig:
    """About so many small tensors on disk: three for each expert of each layer."""
    return MixtralConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=max(round(tensors / (3 * experts + 7)), 1),
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=experts,
        vocab_size=1000,
    )


def write_random(folder: Path, config: PretrainedConfig, seed: int) -> int:
    """A checkpoint of N(0, 0.02) entries in bfloat16; the number of tensors in its files."""
    folder.mkdir(parents=True, exist_ok=True)
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    config.architectures, config.dtype = [model_class.__name__], torch.bfloat16
    config.save_pretrained(folder)
    layout = ModelLayout(config, model_class)
    groups = []
    for names in layout.save_groups(layout.names):
        meta = {name: torch.empty(layout.shapes[name], dtype=torch.bfloat16, device="meta") for name in names}
        on_disk = layout.to_disk(meta)
        groups.append((names, {name: TensorSpec(torch.bfloat16, tuple(own.shape)) for name, own in on_disk.items()}))
    shards = plan_shards(groups, SHARD_BYTES)
    generator = torch.Generator().manual_seed(seed)
    for shard in shards:
        specs = {name: shard.specs[name] for name in sorted(shard.specs)}
        with SafetensorsWriter(folder / shard.file, specs) as file:
            for name, spec in specs.items():
                random = torch.empty(spec.shape, dtype=spec.dtype).normal_(0, 0.02, generator=generator)
                file.write(name, random)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(shard_index(shards), encoding="utf-8")
    return sum(len(shard.specs) for shard in shards)
