"""Blocks: found, named, made one at a time, and called exactly as the model calls them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from conftest import FAMILIES, TEXT, make_model
from torch import Tensor, nn

from hf_fda.blocks import capture, capture_calls, find_blocks, find_units, make_unit, regions
from hf_fda.blocks.discovery import example_inputs, family_of
from hf_fda.checkpoint import ModelLayout, open_checkpoint
from hf_fda.checkpoint.layout import meta_model
from hf_fda.errors import InputError

Library = Callable[[str], tuple[Path, list[Path]]]
CPU = torch.device("cpu")
DECODERS = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "mixtral", "qwen2-moe", "qwen3-moe"]
BLOCKS = {
    "bert": ["bert.encoder.layer"],
    "bert-mlm": ["bert.encoder.layer"],
    "roberta": ["roberta.encoder.layer"],
    "electra": ["electra.encoder.layer"],
    "deberta-v2": ["deberta.encoder.layer"],
    "mpnet": ["mpnet.encoder.layer"],
    "vit": ["vit.layers"],
    "clip-vision": ["encoder.layers"],
    "clip-image": ["vision_model.encoder.layers"],
    "clip-text": ["encoder.layers"],
    "clip": ["text_model.encoder.layers", "vision_model.encoder.layers"],
    "gpt2": ["transformer.h"],
    "t5": ["encoder.block", "decoder.block"],
    **{family: ["model.layers"] for family in DECODERS},
}
SUBMODULES = [
    *((family, unit) for family in DECODERS for unit in [("mlp",), ("self_attn", "mlp")]),
    ("gpt2", ("mlp",)),
    ("gpt2", ("attn", "mlp")),
    ("vit", ("mlp",)),
    ("vit", ("attention", "mlp")),
    ("clip-vision", ("mlp",)),
    ("clip-vision", ("self_attn", "mlp")),
    ("clip-text", ("self_attn", "mlp")),
    ("clip", ("mlp",)),
    ("bert", ("attention",)),
    ("bert", ("intermediate",)),
    ("t5", ("layer.0",)),
]


def layout_of(family: str) -> ModelLayout:
    """The layout of a family's tiny model."""
    model_class, config = FAMILIES[family]
    return ModelLayout(config(), model_class)


def eager(family: str) -> Any:
    """A family's model under the eager implementations of attention and experts."""
    model = make_model(family)
    model.set_attn_implementation("eager")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def seen_by(model: nn.Module, names: list[str], inputs: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Hidden states in and out of submodules while a model runs."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[name] = (hidden.clone(), (output[0] if isinstance(output, tuple) else output).clone())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True) for name in names]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def replay_difference(
    family: str, folder: Path, unit: tuple[str, ...], batch: int, tokens: int = 5
) -> dict[str, float]:
    """Largest difference, by unit, between the real model's outputs and those of the unit made and called alone."""
    checkpoint = open_checkpoint(folder)
    units = find_units(checkpoint.layout, unit)
    calls = capture_calls(checkpoint, units, tokens, CPU).calls
    model = eager(family)
    inputs = example_inputs(model.base_model, batch, tokens, CPU)
    if batch > 1:
        noise = torch.Generator().manual_seed(3)
        inputs = {
            name: torch.randn(value.shape, generator=noise)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in inputs.items()
        }
    seen = seen_by(model, [unit.name for unit in units], inputs)
    assert seen.keys() == {one.name for one in units}
    found = {}
    for one in units:
        module = make_unit(checkpoint.layout, one, {name: checkpoint.read(name) for name in one.tensors}, CPU)
        hidden, output = seen[one.name]
        with torch.no_grad():
            replayed = calls[one.name](module, hidden)
        assert replayed.shape == output.shape
        found[one.name] = float((replayed - output).abs().max())
    return found


# -- discovery -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_in_the_order_of_the_model(family: str) -> None:
    layout = layout_of(family)
    assert list(find_blocks(layout.model)) == [f"{path}.{at}" for path in BLOCKS[family] for at in (0, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_units_of_whole_blocks_hold_all_tensors_of_the_blocks(family: str) -> None:
    layout = layout_of(family)
    units = find_units(layout, ("block",))
    assert [unit.name for unit in units] == [unit.block for unit in units] == list(find_blocks(layout.model))
    where = regions(layout)
    assert [name for unit in units for name in unit.tensors] == [
        name for unit in units for name in layout.names if name.startswith(f"{unit.name}.")
    ]
    assert {name for unit in units for name in unit.tensors} == {name for name in where if where[name] == "block"}


def test_units_may_be_several_submodules_of_every_block() -> None:
    units = find_units(layout_of("llama"), ("self_attn", "mlp"))
    assert [unit.name for unit in units] == [
        "model.layers.0.self_attn",
        "model.layers.0.mlp",
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
    ]
    assert {unit.block for unit in units} == {"model.layers.0", "model.layers.1"}
    assert units[1].tensors == tuple(
        f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")
    )


def test_a_wrong_unit_is_refused_and_the_nearest_suggested() -> None:
    with pytest.raises(InputError, match=r"did you mean 'mlp'.*self_attn"):
        find_units(layout_of("llama"), ("mpl",))


@pytest.mark.parametrize("unit", [("block", "mlp"), ("mlp", "block"), ("mlp", "mlp"), ("mlp", "mlp.up_proj")])
def test_overlapping_units_are_refused(unit: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="overlap"):
        find_units(layout_of("llama"), unit)


def test_a_model_of_sounds_is_sent_to_other_methods() -> None:
    config = t.Wav2Vec2Config(**TEXT, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    with pytest.raises(InputError, match=r"Wav2Vec2Model takes neither.*parameter-space"):
        find_units(ModelLayout(config, t.Wav2Vec2Model), ("block",))


def test_a_model_without_blocks_is_sent_to_other_methods() -> None:
    layout = ModelLayout(t.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]), t.ResNetModel)
    with pytest.raises(InputError, match=r"no repeated blocks.*parameter-space"):
        find_units(layout, ("block",))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "decoder") for family in [*DECODERS, "gpt2"]),
        *((family, "vision") for family in ["vit", "clip-vision", "clip-image", "clip"]),
        *((family, "encoder") for family in ["bert", "bert-mlm", "roberta", "clip-text", "t5"]),
    ],
)
def test_published_settings_are_chosen_by_kind_of_model(family: str, kind: str) -> None:
    assert family_of(layout_of(family)) == kind


# -- regions ---------------------------------------------------------------------------------------------------------

BERT_BEFORE = {
    f"bert.embeddings.{name}"
    for name in (
        "word_embeddings.weight",
        "position_embeddings.weight",
        "token_type_embeddings.weight",
        "LayerNorm.weight",
        "LayerNorm.bias",
    )
}


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        (
            "bert",
            BERT_BEFORE,
            {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"},
        ),
        (
            "vit",
            {
                "vit.embeddings.cls_token",
                "vit.embeddings.position_embeddings",
                "vit.embeddings.patch_embeddings.projection.weight",
                "vit.embeddings.patch_embeddings.projection.bias",
            },
            {"vit.layernorm.weight", "vit.layernorm.bias", "classifier.weight", "classifier.bias"},
        ),
        ("llama", {"model.embed_tokens.weight"}, {"model.norm.weight", "lm_head.weight"}),
        (
            "gpt2",
            {"transformer.wte.weight", "transformer.wpe.weight"},
            {"transformer.ln_f.weight", "transformer.ln_f.bias"},
        ),
        ("t5", {"shared.weight", "encoder.final_layer_norm.weight"}, {"decoder.final_layer_norm.weight"}),
        ("mixtral", {"model.embed_tokens.weight"}, {"model.norm.weight", "lm_head.weight"}),
    ],
)
def test_what_lies_before_and_after_the_blocks(family: str, before: set[str], after: set[str]) -> None:
    where = regions(layout_of(family))
    assert {name for name, region in where.items() if region == "before"} == before
    assert {name for name, region in where.items() if region == "after"} == after


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_lies_in_one_region(family: str) -> None:
    layout = layout_of(family)
    assert list(regions(layout)) == list(layout.names)


def test_an_image_token_that_is_never_used_counts_as_before() -> None:
    layout = ModelLayout(t.ViTConfig(**{**TEXT, "image_size": 16, "patch_size": 4}), t.ViTForMaskedImageModeling)
    assert regions(layout)["vit.embeddings.mask_token"] == "before"


# -- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_alone_gives_exactly_what_it_gives_in_the_model(family: str, library: Library) -> None:
    differences = replay_difference(family, library(family)[0], ("block",), batch=1)
    assert differences == dict.fromkeys(differences, 0.0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_replay_is_exact_for_other_inputs_than_the_captured(family: str, library: Library) -> None:
    differences = replay_difference(family, library(family)[0], ("block",), batch=3)
    assert differences == dict.fromkeys(differences, 0.0)


def test_t5_replays_batches_up_to_rounding_of_the_encoder(library: Library) -> None:
    checkpoint = open_checkpoint(library("t5")[0])
    units = find_units(checkpoint.layout, ("block",))
    calls = capture_calls(checkpoint, units, 5, CPU).calls
    for unit in units:
        module = make_unit(checkpoint.layout, unit, {name: checkpoint.read(name) for name in unit.tensors}, CPU)
        x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
        together = calls[unit.name](module, x)
        alone = torch.cat([calls[unit.name](module, one) for one in x.split(1)])
        torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(("family", "unit"), SUBMODULES, ids=str)
def test_a_submodule_alone_gives_exactly_what_it_gives_in_the_model(
    family: str, unit: tuple[str, ...], library: Library
) -> None:
    differences = replay_difference(family, library(family)[0], unit, batch=1)
    assert differences == dict.fromkeys(differences, 0.0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_replay_of_a_decoder_is_causal(family: str, library: Library) -> None:
    checkpoint = open_checkpoint(library(family)[0])
    (unit, *_) = find_units(checkpoint.layout, ("block",))
    call = capture_calls(checkpoint, (unit,), 5, CPU).calls[unit.name]
    module = make_unit(checkpoint.layout, unit, {name: checkpoint.read(name) for name in unit.tensors}, CPU)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        assert torch.equal(call(module, x)[:, :-1], call(module, changed)[:, :-1])
        assert not torch.equal(call(module, x)[:, -1], call(module, changed)[:, -1])


def test_each_layer_is_captured_with_its_own_mask() -> None:
    model = make_model(
        "gemma2", sliding_window=2, layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2
    )
    model.set_attn_implementation("eager")
    checkpoint = open_checkpoint(model)
    units = find_units(checkpoint.layout, ("block",))
    calls = capture_calls(checkpoint, units, 6, CPU).calls
    seen = seen_by(model, [unit.name for unit in units], example_inputs(model.base_model, 1, 6, CPU))
    for unit in units:
        module = make_unit(checkpoint.layout, unit, {name: checkpoint.read(name) for name in unit.tensors}, CPU)
        hidden, output = seen[unit.name]
        with torch.no_grad():
            assert torch.equal(calls[unit.name](module, hidden), output)


class Watched:
    """A checkpoint that notes which tensors are read."""

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint, self.seen = checkpoint, set[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoint, name)

    def read(self, name: str) -> Tensor:
        self.seen.add(name)
        return self.checkpoint.read(name)


@pytest.mark.parametrize("family", ["bert", "clip-text", "gpt2", *DECODERS])
def test_calls_of_text_blocks_are_captured_without_their_weights(family: str, library: Library) -> None:
    checkpoint = Watched(open_checkpoint(library(family)[0]))
    units = find_units(checkpoint.layout, ("block",))
    capture_calls(checkpoint, units, 5, CPU)
    assert not checkpoint.seen & {name for unit in units for name in unit.tensors}


def test_blocks_run_where_calls_depend_on_them(library: Library) -> None:
    checkpoint = Watched(open_checkpoint(library("t5")[0]))  # its first block makes what all others are called with
    units = find_units(checkpoint.layout, ("block",))
    capture_calls(checkpoint, units, 5, CPU)
    assert checkpoint.seen >= {name for unit in units for name in unit.tensors}


def test_blocks_run_where_a_call_moves_with_their_hidden_states(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lean(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args[0], args[0].mean().expand(1, 1, 5, 5), *args[2:]), kwargs

    def leaning(config: Any, model_class: Any) -> Any:
        model = meta_model(config, model_class)
        for block in find_blocks(model):
            model.get_submodule(block).register_forward_pre_hook(lean, with_kwargs=True)
        return model

    checkpoint = Watched(open_checkpoint(library("bert")[0]))
    units = find_units(checkpoint.layout, ("block",))
    monkeypatch.setattr(capture, "meta_model", leaning)
    capture_calls(checkpoint, units, 5, CPU)
    assert checkpoint.seen & set(units[0].tensors)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "mixtral"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_units_are_called_with_the_number_of_tokens_asked_for(family: str, tokens: int, library: Library) -> None:
    differences = replay_difference(family, library(family)[0], ("block",), batch=1, tokens=tokens)
    assert differences == dict.fromkeys(differences, 0.0)


@pytest.mark.parametrize(("family", "tokens"), [("vit", 17), ("clip-vision", 17), ("clip-image", 17)])
@pytest.mark.parametrize("unit", ["block", "mlp"])
def test_images_set_the_number_of_tokens_themselves(family: str, tokens: int, unit: str, library: Library) -> None:
    checkpoint = open_checkpoint(library(family)[0])
    units = find_units(checkpoint.layout, (unit,))
    calls = capture_calls(checkpoint, units, None, CPU).calls
    assert {(call.tokens, call.size) for call in calls.values()} == {(tokens, 32)}


def test_towers_of_different_width_are_called_with_their_own() -> None:
    image = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = {**image, "image_size": 16, "patch_size": 4}
    config = t.CLIPConfig(vision_config=vision, text_config={**TEXT, "max_position_embeddings": 20})
    torch.manual_seed(0)
    checkpoint = open_checkpoint(t.CLIPModel(config).eval())
    for unit in ("block", "mlp"):
        calls = capture_calls(checkpoint, find_units(checkpoint.layout, (unit,)), 5, CPU).calls
        sizes = {name.partition(".")[0]: call.size for name, call in calls.items()}
        assert sizes == {"text_model": 32, "vision_model": 48}


def test_position_ids_of_text_are_captured(library: Library) -> None:
    for family, name, first in [
        ("bert", "bert.embeddings.position_embeddings.weight", 0),
        ("roberta", "roberta.embeddings.position_embeddings.weight", 2),
        ("clip-text", "embeddings.position_embedding.weight", 0),
    ]:
        checkpoint = open_checkpoint(library(family)[0])
        capture = capture_calls(checkpoint, find_units(checkpoint.layout, ("block",)), 4, CPU)
        assert list(capture.positions) == [name]
        assert capture.positions[name].flatten().tolist() == [first, first + 1, first + 2, first + 3]


def test_a_made_unit_is_frozen_and_leaves_the_layout_without_weights(library: Library) -> None:
    checkpoint = open_checkpoint(library("llama")[0])
    (unit, *_) = find_units(checkpoint.layout, ("mlp",))
    module = make_unit(checkpoint.layout, unit, {name: checkpoint.read(name) for name in unit.tensors}, CPU)
    assert not module.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())
    assert all(parameter.is_meta for parameter in checkpoint.layout.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_have_second_derivatives(family: str, library: Library) -> None:
    checkpoint = open_checkpoint(library(family)[0])
    units = find_units(checkpoint.layout, ("block",))
    calls = capture_calls(checkpoint, units, 5, CPU).calls
    for unit in units[-1:]:
        module = make_unit(checkpoint.layout, unit, {name: checkpoint.read(name) for name in unit.tensors}, CPU)
        call = calls[unit.name]
        shape = (2, call.tokens, call.size)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(True)  # type: ignore[arg-type]
        parameters = [parameter.requires_grad_(True) for parameter in module.parameters()]
        gradients = torch.autograd.grad(
            call(module, x).square().mean(), parameters, create_graph=True, materialize_grads=True
        )
        (outer,) = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), x)
        assert bool(outer.isfinite().all())
        assert float(outer.abs().max()) > 0
