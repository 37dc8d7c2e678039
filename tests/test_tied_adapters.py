"""Adapters of models that tie weights: in PEFT each module that has one is changed on its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_base, outputs, relative, train
from conftest import fine_tune, make_model
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import hf_fda

EMBEDDINGS = {
    "llama": ["model.embed_tokens"],
    "gemma3": ["model.embed_tokens"],
    "gpt2": ["transformer.wte"],
    "bert-mlm": ["bert.embeddings.word_embeddings"],
    "t5": ["shared", "encoder.embed_tokens", "decoder.embed_tokens"],
}
HEAD = {family: "lm_head" for family in EMBEDDINGS} | {"bert-mlm": "cls.predictions.decoder"}
INSIDE = {"llama": "q_proj", "gemma3": "v_proj", "gpt2": "c_attn", "bert-mlm": "value", "t5": "v"}
FAMILIES = list(HEAD)
BIASED = ("gpt2", "bert-mlm")
"""Families whose linear layers have biases: an adapter of these has embeddings whole."""


def factors(where: str, **options: Any) -> Callable[[str], LoraConfig]:
    """Adapters with factors of a layer inside, and of "embeddings", "head" or both."""

    def make(family: str) -> LoraConfig:
        return LoraConfig(r=3, target_modules=[INSIDE[family], *_modules(family, where)], **options)

    return make


def whole(where: str, **options: Any) -> Callable[[str], LoraConfig]:
    """The same with these modules whole."""

    def make(family: str) -> LoraConfig:
        modules = _modules(family, where)
        return LoraConfig(r=3, target_modules=[INSIDE[family]], modules_to_save=modules, **options)

    return make


def _modules(family: str, where: str) -> list[str]:
    own = {"embeddings": EMBEDDINGS[family], "head": [HEAD[family]]}
    return [module for part in where.split("+") for module in own[part]]


def tokens(family: str) -> LoraConfig:
    """Some tokens of the embeddings, and others of the head."""
    rows = {module: [1, 5] for module in EMBEDDINGS[family]} | {HEAD[family]: [2, 5, 7]}
    return LoraConfig(r=3, target_modules=[INSIDE[family]], trainable_token_indices=rows)


APART: dict[str, Callable[[str], LoraConfig]] = {
    "both": factors("embeddings+head"),
    "head": factors("head"),
    "embeddings": factors("embeddings"),
    "dora": factors("embeddings+head", use_dora=True),
    "whole-both": whole("embeddings+head"),
    "whole-head": whole("head"),
    "whole-embeddings": whole("embeddings"),
    "tokens": tokens,
}
ENSURED: dict[str, Callable[[str], LoraConfig]] = {
    "factors": factors("embeddings+head", ensure_weight_tying=True),
    "whole": whole("embeddings+head", ensure_weight_tying=True),
}


def on_base(base: Any, folder: Path, family: str) -> Tensor:
    """What plain PEFT makes of an adapter."""
    return outputs(PeftModel.from_pretrained(copy.deepcopy(base), folder), family)


def unloaded(base: Any, folder: Path, family: str) -> Tensor:
    """What plain PEFT makes of an adapter that it merges into the weights."""
    return outputs(PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload(), family)


def as_whole(base: Path, adapter: Any, output: Path) -> PreTrainedModel:
    """An adapter merged into a full checkpoint, in which what was tied is tied."""
    source = str(adapter) if isinstance(adapter, Path) else adapter
    model = hf_fda.merge(str(base), {"own": source}, "passthrough", output, quiet=True).load()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def as_adapter(base: Path, adapter: Any, output: Path) -> Path:
    """An adapter merged into another one, alone."""
    source = str(adapter) if isinstance(adapter, Path) else adapter
    return hf_fda.merge(str(base), {"own": source}, "passthrough", output, as_adapter=True, quiet=True).folder


def make(family: str, folder: Path) -> Any:
    """A base with tied weights, saved too."""
    base = make_base(family, tie_word_embeddings=True)
    base.save_pretrained(folder / "base")
    return base


class TestExtraction:
    """A full fine-tune of a model with tied weights as an adapter."""

    @pytest.fixture(params=FAMILIES)
    def tied(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Any]:
        base = make(request.param, tmp_path)
        tuned = fine_tune(base, seed=2)
        tuned.save_pretrained(tmp_path / "tuned")
        return request.param, base, tuned

    def check(self, family: str, base: Any, adapter: Path, expected: Tensor) -> None:
        """The adapter is right in PEFT, when PEFT has saved it again, and as a full checkpoint."""
        folder = adapter.parent
        assert relative(on_base(base, adapter, family), expected) <= 1e-5
        PeftModel.from_pretrained(copy.deepcopy(base), adapter).save_pretrained(folder / "again")
        assert relative(on_base(base, folder / "again", family), expected) <= 1e-5
        assert relative(outputs(as_whole(folder / "base", adapter, folder / "back"), family), expected) <= 1e-5

    def test_an_exact_one_is_the_fine_tune_also_where_peft_merges_it(
        self, tied: tuple[str, Any, Any], tmp_path: Path
    ) -> None:
        family, base, tuned = tied
        expected = outputs(tuned, family)
        adapter = hf_fda.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", quiet=True).folder
        assert relative(outputs(base, family), expected) > 1e-2
        self.check(family, base, adapter, expected)
        assert relative(unloaded(base, adapter, family), expected) <= 1e-5
        assert "merge_and_unload" not in (adapter / "README.md").read_text()

    @pytest.mark.parametrize("rank", [1, 4])
    def test_a_thin_one_has_the_same_factors_in_all_places(
        self, rank: int, tied: tuple[str, Any, Any], tmp_path: Path
    ) -> None:
        family, base, tuned = tied
        adapter = hf_fda.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=rank, quiet=True)
        assert adapter.report is not None
        cut = {f"{own.module}.weight" for own in adapter.report.modules}
        nearest, start = copy.deepcopy(tuned), base.state_dict()
        with torch.no_grad():
            for name, weight in nearest.named_parameters():
                if name in cut:
                    u, s, vh = torch.linalg.svd(weight - start[name], full_matrices=False)
                    weight.copy_(start[name] + (u[:, :rank] * s[:rank]) @ vh[:rank])
        expected = outputs(nearest, family)
        assert relative(outputs(tuned, family), expected) > 1e-3
        self.check(family, base, adapter.folder, expected)
        doubled = relative(unloaded(base, adapter.folder, family), expected) > 1e-5
        assert doubled == (family not in BIASED)
        assert doubled == ("merge_and_unload" in (adapter.folder / "README.md").read_text())


class TestSources:
    """Adapters of models with tied weights do in a merge what they do in PEFT, or are refused."""

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("kind", APART)
    def test_what_is_changed_apart_stays_apart(self, kind: str, family: str, tmp_path: Path) -> None:
        base = make(family, tmp_path)
        train(base, APART[kind](family), seed=1).save_pretrained(tmp_path / "own")
        if kind == "tokens" and family == "bert-mlm":  # PEFT's trained tokens of a layer forget its bias till merged
            torch.nn.init.zeros_(base.cls.predictions.bias)
            base.save_pretrained(tmp_path / "base")
        expected = on_base(base, tmp_path / "own", family)
        assert relative(outputs(base, family), expected) > 1e-2
        again = as_adapter(tmp_path / "base", tmp_path / "own", tmp_path / "out")
        assert relative(on_base(base, again, family), expected) <= 1e-5
        with pytest.raises(hf_fda.InputError, match=r"'own'.*ties '.*' and '.*alike.*as_adapter=True"):
            as_whole(tmp_path / "base", tmp_path / "own", tmp_path / "whole")
        assert not (tmp_path / "whole").exists()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_what_is_changed_alike_stays_tied(self, family: str, tmp_path: Path) -> None:
        base = make(family, tmp_path)
        model = train(base, APART["both"](family), seed=1)
        modules: dict[str, Any] = dict(model.base_model.model.named_modules())
        first = modules[EMBEDDINGS[family][0]]
        left, right = (first.lora_embedding_A.default, first.lora_embedding_B.default)
        with torch.no_grad():
            for other in EMBEDDINGS[family]:
                modules[other].lora_embedding_A.default.copy_(left)
                modules[other].lora_embedding_B.default.copy_(right)
            modules[HEAD[family]].lora_A.default.weight.copy_(right.mT)
            modules[HEAD[family]].lora_B.default.weight.copy_(left.mT)
        model.save_pretrained(tmp_path / "own")
        self.check(base, tmp_path / "own", outputs(model, family), family)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_tokens_that_are_trained_stay_tied(self, family: str, tmp_path: Path) -> None:
        base = make(family, tmp_path)
        config = LoraConfig(r=3, target_modules=[INSIDE[family]], trainable_token_indices=[1, 5, 7])
        train(base, config, seed=1).save_pretrained(tmp_path / "own")
        # merged, as PEFT's trained tokens of a layer forget its bias until then
        self.check(base, tmp_path / "own", unloaded(base, tmp_path / "own", family), family)

    @pytest.mark.parametrize("kind", ENSURED)
    def test_ties_that_peft_ensures_are_kept(self, kind: str, tmp_path: Path) -> None:
        base = make("llama", tmp_path)
        train(base, ENSURED[kind]("llama"), seed=1).save_pretrained(tmp_path / "own")
        self.check(base, tmp_path / "own", on_base(base, tmp_path / "own", "llama"), "llama")

    def check(self, base: Any, adapter: Path, expected: Tensor, family: str) -> None:
        """An adapter that keeps ties is right as another one, and as a full checkpoint."""
        folder = adapter.parent
        assert relative(outputs(base, family), expected) > 1e-2
        again = as_adapter(folder / "base", adapter, folder / "out")
        assert relative(on_base(base, again, family), expected) <= 1e-5
        assert relative(outputs(as_whole(folder / "base", adapter, folder / "back"), family), expected) <= 1e-5

    @pytest.mark.parametrize("family", ["gpt2", "t5"])
    def test_ties_that_peft_ensures_until_it_saves_are_kept_in_memory(self, family: str, tmp_path: Path) -> None:
        base = make(family, tmp_path)
        model = train(base, ENSURED["factors"](family), seed=1)
        expected = outputs(model, family)
        model.save_pretrained(tmp_path / "own")
        assert relative(on_base(base, tmp_path / "own", family), expected) > 1e-2
        with pytest.raises(hf_fda.InputError, match=r"'own'.*ensure_weight_tying=True.*in memory"):
            as_adapter(tmp_path / "base", tmp_path / "own", tmp_path / "refused")
        again = as_adapter(tmp_path / "base", model, tmp_path / "out")
        assert relative(on_base(base, again, family), expected) <= 1e-5

    def test_initialisations_from_a_tied_weight_are_refused(self, tmp_path: Path) -> None:
        base = make("llama", tmp_path)
        config = factors("head", init_lora_weights="pissa")("llama")
        train(base, config, seed=1).save_pretrained(tmp_path / "own")
        with pytest.raises(hf_fda.InputError, match=r"'own'.*'pissa'.*'lm_head.weight'.*merge_adapters"):
            as_adapter(tmp_path / "base", tmp_path / "own", tmp_path / "out")

    def test_a_base_that_does_not_tie_is_asked_for(self, tmp_path: Path) -> None:
        make("llama", tmp_path)
        train(make_base("llama"), APART["both"]("llama"), seed=1).save_pretrained(tmp_path / "own")
        with pytest.raises(hf_fda.InputError, match=r"'own'.*'lm_head.weight'.*does not tie them"):
            as_adapter(tmp_path / "base", tmp_path / "own", tmp_path / "out")

    def test_another_base_than_the_one_in_the_file_is_refused_but_for_rounding(self, tmp_path: Path) -> None:
        base = make("llama", tmp_path)
        model = train(base, LoraConfig(r=3, target_modules=["embed_tokens"]), seed=1)
        model.save_pretrained(tmp_path / "own")
        name = "base_model.model.model.embed_tokens.base_layer.weight"
        tensors = load_file(tmp_path / "own/adapter_model.safetensors")
        save_file(tensors | {name: tensors[name].bfloat16()}, tmp_path / "own/adapter_model.safetensors")
        again = as_adapter(tmp_path / "base", tmp_path / "own", tmp_path / "out")
        assert relative(on_base(base, again, "llama"), outputs(model, "llama")) <= 1e-5
        save_file(tensors | {name: 1.1 * tensors[name]}, tmp_path / "own/adapter_model.safetensors")
        with pytest.raises(hf_fda.RunError, match=r"own: the adapter comes with embeddings that are not"):
            as_adapter(tmp_path / "base", tmp_path / "own", tmp_path / "other")

    def test_a_base_without_the_head_is_refused_where_the_head_is_changed(self, tmp_path: Path) -> None:
        base = make("llama", tmp_path)
        base.model.save_pretrained(tmp_path / "bare")
        for kind in ("head", "whole-head", "embeddings"):
            config = APART[kind]("llama")
            config.task_type = "CAUSAL_LM"
            train(base, config, seed=1).save_pretrained(tmp_path / kind)
        for kind in ("head", "whole-head"):
            with pytest.raises(
                hf_fda.InputError, match=r"'lm_head.weight', which the base does not have.*LlamaForCaus"
            ):
                as_adapter(tmp_path / "bare", tmp_path / kind, tmp_path / "out")
        again = as_adapter(tmp_path / "bare", tmp_path / "embeddings", tmp_path / "out")
        expected = on_base(base, tmp_path / "embeddings", "llama")
        assert relative(on_base(base, again, "llama"), expected) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tunes_and_adapters_merge_into_what_is_apart(family: str, tmp_path: Path) -> None:
    base = make(family, tmp_path)
    tuned = fine_tune(base, seed=2)
    tuned.save_pretrained(tmp_path / "tuned")
    own = train(base, APART["head"](family), seed=1)
    own.save_pretrained(tmp_path / "own", save_embedding_layers=False)  # which would take the place of the halves
    sources = {name: str(tmp_path / name) for name in ("tuned", "own")}
    options: Any = {"scaling": 0.5, "as_adapter": True, "quiet": True}
    merged = hf_fda.merge(str(tmp_path / "base"), sources, "task_arithmetic", tmp_path / "out", **options)
    half = copy.deepcopy(base)  # PEFT's own adapter at half its strength, on half of what the fine-tune changed
    with torch.no_grad():
        for weight, other in zip(half.parameters(), tuned.parameters(), strict=True):
            weight.lerp_(other, 0.5)
    expected: Any = PeftModel.from_pretrained(half, tmp_path / "own")
    for module in expected.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    assert relative(on_base(base, merged.folder, family), outputs(expected, family)) <= 1e-5


@pytest.mark.parametrize("method", ["tsv", "ties", "dare_linear"])
def test_a_merge_of_fine_tunes_is_the_same_as_an_adapter(method: str, tmp_path: Path) -> None:
    base = make("llama", tmp_path)
    sources = {}
    for seed in (1, 2):
        fine_tune(base, seed).save_pretrained(tmp_path / f"tuned{seed}")
        sources[f"tuned{seed}"] = str(tmp_path / f"tuned{seed}")
    full = hf_fda.merge(str(tmp_path / "base"), sources, method, tmp_path / "full", quiet=True)
    thin = hf_fda.merge(str(tmp_path / "base"), sources, method, tmp_path / "thin", as_adapter=True, quiet=True)
    assert relative(on_base(base, thin.folder, "llama"), outputs(full.load(), "llama")) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["both", "head", "whole-both"])
def test_adapters_in_memory_merge_apart(kind: str, family: str) -> None:
    base = make_base(family, tie_word_embeddings=True)
    model = train(base, APART[kind](family), seed=1)
    expected = outputs(model, family)
    hf_fda.merge_adapters(model, ["default"], "again", method="passthrough")
    model.set_adapter("again")
    assert relative(outputs(model, family), expected) <= 1e-5


def test_the_factors_of_a_tied_weight_are_counted_once(tmp_path: Path) -> None:
    base = make("t5", tmp_path)
    fine_tune(base, seed=2).save_pretrained(tmp_path / "tuned")
    adapter = hf_fda.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2, quiet=True)
    assert adapter.report is not None
    assert [own.module for own in adapter.report.modules].count("shared") == 1
    tensors = load_file(adapter.folder / "adapter_model.safetensors")
    places = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    assert places.issuperset([*EMBEDDINGS["t5"], HEAD["t5"]])


def test_a_model_that_an_adapter_is_put_on_keeps_its_ties(tmp_path: Path) -> None:
    base = make("llama", tmp_path)
    train(base, APART["head"]("llama"), seed=1).save_pretrained(tmp_path / "own")
    text = f"merge_method: passthrough\nmodels:\n  - model: {tmp_path}/base+{tmp_path}/own\n"
    (tmp_path / "document.yml").write_text(text)
    with pytest.raises(hf_fda.InputError, match=r"ties 'model.embed_tokens.weight' and 'lm_head.weight'.*alike"):
        hf_fda.merge_config(tmp_path / "document.yml", tmp_path / "out")


def test_names_of_tied_weights_are_those_of_the_families() -> None:
    for family in FAMILIES:
        model = make_model(family, tie_word_embeddings=True)
        shared = {id(model.get_submodule(name).weight) for name in (*EMBEDDINGS[family], HEAD[family])}
        assert len(shared) == 1
