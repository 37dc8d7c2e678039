"""Checkpoints of every family: names in memory, reading, writing back, odd layouts on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from conftest import FAMILIES, TEXT, fine_tune, make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_fda.checkpoint import FileCheckpoint, ModelCheckpoint, ModelLayout, open_checkpoint
from hf_fda.checkpoint.alignment import align
from hf_fda.checkpoint.writer import SafetensorsWriter, TensorSpec, plan_shards, save_tensors, shard_index
from hf_fda.errors import InputError

Library = Callable[[str], tuple[Path, list[Path]]]
every_family = pytest.mark.parametrize("family", FAMILIES)


def stored(model: Any) -> dict[str, Tensor]:
    """A model's tensors by name, without those that are tied to another."""
    return {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}


def on_disk(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder's safetensors files by their names there."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names, types, shapes and bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def everything(checkpoint: FileCheckpoint | ModelCheckpoint) -> dict[str, Tensor]:
    """All tensors that a checkpoint holds by their names in memory."""
    return {name: checkpoint.read(name) for name in checkpoint.names}


def rewritten(checkpoint: FileCheckpoint | ModelCheckpoint) -> dict[str, Tensor]:
    """All tensors of a checkpoint converted to disk layout, group by group."""
    result: dict[str, Tensor] = {}
    for group in checkpoint.layout.save_groups(checkpoint.names):
        converted = checkpoint.layout.to_disk({name: checkpoint.read(name) for name in group})
        assert not result.keys() & converted.keys()
        result.update(converted)
    return result


# -- every family --------------------------------------------------------------------------------------------------


@every_family
def test_names_in_memory_are_those_of_the_model_without_tied_ones(family: str, library: Library) -> None:
    checkpoint = open_checkpoint(library(family)[0])
    model = make_model(family)
    assert set(checkpoint.names) == set(stored(model))
    assert list(checkpoint.names) == [name for name in model.state_dict() if name in checkpoint.names]
    assert not checkpoint.missing
    assert not checkpoint.unexpected


@every_family
def test_each_tensor_is_read_as_the_model_holds_it(family: str, library: Library) -> None:
    checkpoint = open_checkpoint(library(family)[0])
    model = stored(make_model(family))
    assert same_bits(everything(checkpoint), model)
    for name, tensor in model.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype


@every_family
def test_tensors_can_be_read_in_any_order_and_twice(family: str, library: Library) -> None:
    checkpoint = open_checkpoint(library(family)[0])
    first = {name: checkpoint.read(name) for name in reversed(checkpoint.names)}
    for tensor in first.values():
        assert tensor.is_contiguous()
    kept = {name: tensor.clone() for name, tensor in first.items()}
    for tensor in first.values():
        tensor.zero_()  # what was read belongs to the caller
    assert same_bits({name: checkpoint.read(name) for name in kept}, kept)


@every_family
def test_a_part_is_a_slice_of_the_flattened_tensor(family: str, library: Library) -> None:
    checkpoint = open_checkpoint(library(family)[0])
    model = stored(make_model(family))
    for name in checkpoint.names:
        flat = model[name].flatten()
        size = len(flat)
        for part in (slice(0, size), slice(size // 3, max(size // 3 + 1, size // 2)), slice(size - 1, size)):
            assert torch.equal(checkpoint.read(name, part), flat[part])


@every_family
def test_written_back_it_is_what_save_pretrained_wrote(family: str, library: Library) -> None:
    base, _ = library(family)
    assert same_bits(rewritten(open_checkpoint(base)), on_disk(base))


@every_family
def test_a_model_in_memory_is_the_same_as_its_files(family: str, library: Library) -> None:
    base, _ = library(family)
    file, memory = open_checkpoint(base), open_checkpoint(make_model(family))
    assert isinstance(file, FileCheckpoint)
    assert isinstance(memory, ModelCheckpoint)
    assert memory.names == file.names
    assert same_bits(everything(memory), everything(file))
    assert same_bits(rewritten(memory), on_disk(base))
    for name in file.names:
        assert memory.shape(name) == file.shape(name)
        assert memory.dtype(name) == file.dtype(name)
        assert torch.equal(memory.read(name, slice(0, 1)), file.read(name, slice(0, 1)))


@every_family
def test_a_sharded_checkpoint_reads_as_a_single_file(family: str, library: Library, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sharded, single = open_checkpoint(tmp_path), open_checkpoint(library(family)[0])
    assert sharded.names == single.names
    assert same_bits(everything(sharded), everything(single))
    assert same_bits(rewritten(sharded), on_disk(library(family)[0]))


@every_family
def test_shapes_of_groups_follow_without_reading_any_weight(family: str, library: Library) -> None:
    base, _ = library(family)
    layout = open_checkpoint(base).layout
    found = {}
    for group in layout.save_groups(layout.names):
        meta = {name: torch.empty(layout.shapes[name], device="meta") for name in group}
        found.update({name: tuple(tensor.shape) for name, tensor in layout.to_disk(meta).items()})
    assert found == {name: tuple(tensor.shape) for name, tensor in on_disk(base).items()}


def test_experts_lie_one_by_one_on_disk_and_stacked_in_memory(library: Library) -> None:
    base, _ = library("qwen2-moe")
    checkpoint = open_checkpoint(base)
    assert checkpoint.shape("model.layers.0.mlp.experts.down_proj") == (4, 32, 16)
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in on_disk(base)
    assert checkpoint.layout.roles["model.layers.0.mlp.experts.gate_up_proj"] == "stack"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_types_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("llama").to(dtype)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert {checkpoint.dtype(name) for name in checkpoint.names} == {dtype}
    assert same_bits(everything(checkpoint), stored(model))


# -- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "role"),
    [
        ("bert", "bert.embeddings.word_embeddings.weight", "embedding"),
        ("bert", "bert.encoder.layer.0.output.dense.weight", "linear"),
        ("bert", "bert.encoder.layer.0.output.dense.bias", "other"),
        ("vit", "vit.embeddings.patch_embeddings.projection.weight", "other"),
        ("vit", "vit.embeddings.position_embeddings", "other"),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", "conv1d"),
        ("t5", "shared.weight", "embedding"),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj", "stack"),
        ("clip", "logit_scale", "other"),
    ],
)
def test_each_tensor_has_the_role_of_its_module(family: str, name: str, role: str, library: Library) -> None:
    assert open_checkpoint(library(family)[0]).layout.roles[name] == role


# -- odd files on disk -----------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace a folder's single weight file by `change` of its tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **changes: Any) -> None:
    """Change fields of a folder's config.json."""
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, **changes}))


@pytest.mark.parametrize(
    ("family", "prefixed"),
    [
        ("gpt2", "GPT2LMHeadModel"),
        ("bert", "BertForSequenceClassification"),
        ("vit", "ViTForImageClassification"),
        ("llama", "LlamaForCausalLM"),
        ("roberta", "RobertaForMaskedLM"),
    ],
)
def test_a_bare_checkpoint_is_read_by_a_class_with_a_prefix(family: str, prefixed: str, tmp_path: Path) -> None:
    body = make_model(family).base_model
    body.save_pretrained(tmp_path)
    set_config(tmp_path, architectures=[prefixed])
    checkpoint = open_checkpoint(tmp_path)
    prefix = f"{body.base_model_prefix}."
    held = everything(checkpoint)
    expected = {f"{prefix}{name}": tensor for name, tensor in body.state_dict().items()}
    assert held
    assert all(torch.equal(tensor, expected[name]) for name, tensor in held.items())
    assert all(not name.startswith(prefix) for name in checkpoint.missing)


def test_legacy_gamma_and_beta_are_read_as_weight_and_bias(tmp_path: Path) -> None:
    model = make_model("bert")
    model.save_pretrained(tmp_path)

    def age(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        def old(name: str) -> str:
            return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

        return {old(name): tensor for name, tensor in tensors.items()}

    new = on_disk(tmp_path)
    rewrite(tmp_path, age)
    assert any(name.endswith("LayerNorm.gamma") for name in on_disk(tmp_path))
    checkpoint = open_checkpoint(tmp_path)
    assert same_bits(everything(checkpoint), stored(model))
    assert not checkpoint.unexpected
    assert same_bits(rewritten(checkpoint), new)


@pytest.mark.parametrize("family", ["qwen2", "t5", "gpt2", "bert-mlm"])
def test_redundant_copies_of_tied_tensors_are_left_out(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path)
    clean = on_disk(tmp_path)
    state = model.state_dict()
    rewrite(
        tmp_path, lambda tensors: {**tensors, **{name: state[name].clone() for name in model.all_tied_weights_keys}}
    )
    assert len(on_disk(tmp_path)) > len(clean)
    checkpoint = open_checkpoint(tmp_path)
    assert same_bits(everything(checkpoint), stored(model))
    assert not checkpoint.unexpected
    assert same_bits(rewritten(checkpoint), clean)


def test_a_tied_tensor_saved_under_the_other_name_is_found(tmp_path: Path) -> None:
    model = make_model("qwen2")
    model.save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: {"lm_head.weight": tensors.pop("model.embed_tokens.weight"), **tensors},
    )
    checkpoint = open_checkpoint(tmp_path)
    assert same_bits(everything(checkpoint), stored(model))


def test_tensors_without_a_place_are_reported(tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {**tensors, "bert.embeddings.position_ids": torch.arange(40)})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.unexpected) == ["bert.embeddings.position_ids"]


def test_tensors_that_are_not_there_are_reported(tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {name: value for name, value in tensors.items() if "classifier" not in name})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.missing == ("classifier.weight", "classifier.bias")
    assert "classifier.weight" not in checkpoint.names


def test_a_config_that_contradicts_the_weights_is_refused(tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    set_config(tmp_path, intermediate_size=48)
    with pytest.raises(InputError, match=r"config\.json says"):
        open_checkpoint(tmp_path)


def test_a_config_without_architectures_means_the_bare_model(tmp_path: Path) -> None:
    body = make_model("bert").base_model
    body.save_pretrained(tmp_path)
    set_config(tmp_path, architectures=None)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout.model_class is t.BertModel
    assert same_bits(everything(checkpoint), body.state_dict())


def test_fingerprints_change_with_the_weights(tmp_path: Path) -> None:
    model = make_model("bert")
    tuned = fine_tune(model, seed=1)
    assert open_checkpoint(model).fingerprint() == open_checkpoint(make_model("bert")).fingerprint()
    assert open_checkpoint(model).fingerprint() != open_checkpoint(tuned).fingerprint()
    model.save_pretrained(tmp_path)
    before = open_checkpoint(tmp_path).fingerprint()
    assert open_checkpoint(tmp_path).fingerprint() == before
    tuned.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).fingerprint() != before


def test_a_model_in_memory_is_left_as_it_is() -> None:
    model = make_model("bert")
    before = model.config.to_dict()
    open_checkpoint(model)
    assert model.config.to_dict() == before


# -- alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama", "clip-image", "roberta"])
def test_bare_and_prefixed_models_are_matched_both_ways(family: str) -> None:
    full = make_model(family)
    prefix = next(name for name, module in full.named_children() if isinstance(module, t.PreTrainedModel))
    body = open_checkpoint(full.get_submodule(prefix))
    whole = open_checkpoint(full)
    down = align(body, whole, "source")
    shared = set(body.names) - set(down.absent)
    assert {name: f"{prefix}.{name}" for name in shared} == down.tensor_of
    assert all(not name.startswith(f"{prefix}.") for name in down.extra)
    up = align(whole, body, "source")
    assert up.tensor_of == {theirs: own for own, theirs in down.tensor_of.items()}
    assert set(up.absent) == set(down.extra)


def test_a_vision_tower_is_matched_to_its_place_in_a_whole_clip() -> None:
    whole, tower = open_checkpoint(make_model("clip")), open_checkpoint(make_model("clip-vision"))
    aligned = align(whole, tower, "source")
    assert set(aligned.tensor_of.values()) == set(tower.names)
    assert all(name.startswith("vision_model.") for name in aligned.tensor_of)
    assert not aligned.extra


# -- writing ---------------------------------------------------------------------------------------------------------

MIXED = {
    "flag": torch.tensor([True, False, True]),
    "half": torch.arange(5, dtype=torch.bfloat16),
    "byte": torch.arange(7, dtype=torch.uint8),
    "double": torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "scalar": torch.tensor(1.5),
    "index": torch.arange(4),
    "empty": torch.empty(0, 3),
}


def test_a_written_file_opens_with_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_tensors(path, MIXED, {"words": "here"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "words": "here"}
        assert same_bits({name: file.get_tensor(name) for name in file.keys()}, MIXED)  # noqa: SIM118 (no mapping)


def test_tensors_of_mixed_types_are_aligned(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_tensors(path, MIXED)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 8 == 0
    ends = []
    for name, tensor in MIXED.items():
        start, end = header[name]["data_offsets"]
        assert start % tensor.dtype.itemsize == 0
        assert end - start == tensor.nbytes
        ends.append(end)
    assert 8 + length + max(ends) == len(raw)


def test_tensors_may_be_written_in_any_order_and_are_cast(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.bfloat16, (2, 3)), "b": TensorSpec(torch.float32, (4,))}
    with SafetensorsWriter(tmp_path / "file.safetensors", specs) as file:
        file.write("b", torch.arange(4.0))
        file.write("a", torch.arange(6.0).view(3, 2).T)  # not contiguous
    found = load_file(tmp_path / "file.safetensors")
    assert torch.equal(found["a"], torch.arange(6.0).view(3, 2).T.bfloat16())
    assert torch.equal(found["b"], torch.arange(4.0))


def test_tensors_may_be_written_piece_by_piece(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.bfloat16, (2, 3)), "b": TensorSpec(torch.float32, (4,))}
    with SafetensorsWriter(tmp_path / "file.safetensors", specs) as file:
        file.append("a", torch.arange(4.0))
        file.append("b", torch.arange(4.0))
        file.append("a", torch.arange(4.0, 6.0))
        with pytest.raises(ValueError, match="0 are missing"):
            file.append("a", torch.zeros(1))
    found = load_file(tmp_path / "file.safetensors")
    assert torch.equal(found["a"], torch.arange(6.0).view(2, 3).bfloat16())
    assert torch.equal(found["b"], torch.arange(4.0))
    with pytest.raises(ValueError, match="not written"), SafetensorsWriter(tmp_path / "half", specs) as file:
        file.append("a", torch.arange(4.0))


def test_the_writer_refuses_what_was_not_promised(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.float32, (2,))}

    def write(*tensors: Tensor) -> None:
        with SafetensorsWriter(tmp_path / "file.safetensors", specs) as file:
            for tensor in tensors:
                file.write("a", tensor)

    with pytest.raises(ValueError, match="promised"):
        write(torch.zeros(3))
    with pytest.raises(ValueError, match="once"):
        write(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="not written"):
        write()


def test_the_same_tensors_make_the_same_bytes(tmp_path: Path) -> None:
    save_tensors(tmp_path / "one", MIXED)
    save_tensors(tmp_path / "two", MIXED)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def groups_of(*sizes: int) -> list[tuple[tuple[str, ...], dict[str, TensorSpec]]]:
    """Groups of one uint8 tensor each."""
    return [((f"t{at}",), {f"t{at}": TensorSpec(torch.uint8, (size,))}) for at, size in enumerate(sizes)]


def test_shards_are_filled_in_order_up_to_their_size() -> None:
    shards = plan_shards(groups_of(4, 4, 4, 20, 1), max_bytes=10)
    assert [[name for group in shard.groups for name in group] for shard in shards] == [
        ["t0", "t1"],
        ["t2"],
        ["t3"],  # larger than a shard: one of its own
        ["t4"],
    ]
    assert [shard.nbytes for shard in shards] == [8, 4, 20, 1]
    assert [shard.file for shard in shards] == [f"model-{at:05d}-of-00004.safetensors" for at in (1, 2, 3, 4)]


def test_what_fits_goes_into_one_file_without_numbers() -> None:
    shards = plan_shards(groups_of(4, 4), max_bytes=8)
    assert [shard.file for shard in shards] == ["model.safetensors"]


def test_a_group_is_never_split_over_shards() -> None:
    specs = {f"e{at}": TensorSpec(torch.float32, (10,)) for at in range(4)}
    shards = plan_shards([*groups_of(4), (("stack",), specs)], max_bytes=50)
    assert [shard.groups for shard in shards] == [(("t0",),), (("stack",),)]
    assert shards[1].specs == specs


def test_the_index_names_the_file_of_every_tensor() -> None:
    shards = plan_shards(groups_of(4, 4, 4), max_bytes=8)
    index = json.loads(shard_index(shards))
    assert index["metadata"]["total_size"] == 12
    assert index["weight_map"] == {name: shard.file for shard in shards for name in shard.specs}


# -- the layout alone ------------------------------------------------------------------------------------------------


def test_a_layout_holds_no_weights() -> None:
    layout = ModelLayout(t.BertConfig(**TEXT), t.BertForSequenceClassification)
    assert all(parameter.is_meta for parameter in layout.model.parameters())
    assert sum(prod(shape) for shape in layout.shapes.values()) > 0
