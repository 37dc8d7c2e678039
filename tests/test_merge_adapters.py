"""`merge_adapters`: a new adapter beside the others in a PEFT model, and nothing else changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapters import KINDS, LINEAR, make_base, outputs, relative, train
from conftest import make_model
from peft import LoftQConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor

import hf_fda


def model_with(family: str, *kinds: str) -> PeftModel:
    """A model with an adapter of each kind, named by it."""
    base = make_base(family)
    model: Any = None
    for seed, kind in enumerate(kinds):
        config = KINDS[kind](family)
        if model is None:
            model = train(base, config, seed)
            default = model.peft_config["default"]
            state = {name: value.clone() for name, value in adapter_state(model, "default").items()}
            model.add_adapter(kind, copy.deepcopy(default))
            load(model, kind, state)
            model.set_adapter(kind)
            model.delete_adapter("default")
            continue
        model.add_adapter(kind, copy.deepcopy(config))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if f".{kind}" in name:
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapter_state(model: PeftModel, name: str) -> dict[str, Tensor]:
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=name)


def load(model: PeftModel, name: str, state: dict[str, Tensor]) -> None:
    from peft.utils import set_peft_model_state_dict

    set_peft_model_state_dict(model, state, name)


def snapshot(model: PeftModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: PeftModel, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("bert", kind) for kind in ("plain", "rslora", "dora", "lora_bias", "patterns", "layers", "embedding")),
        *(("llama", kind) for kind in ("plain", "dora", "pissa", "olora", "embedding")),
        *(("gpt2", kind) for kind in ("plain", "rslora", "dora")),
    ],
)
def test_one_adapter_gives_itself_and_nothing_else_changes(family: str, kind: str) -> None:
    model = model_with(family, kind, "plain" if kind != "plain" else "rslora")
    model.set_adapter(kind)
    expected, before = outputs(model, family), snapshot(model)
    report = hf_fda.merge_adapters(model, [kind], "merged")
    assert unchanged(model, before)
    assert model.active_adapter == kind
    assert relative(outputs(model, family), expected) == 0
    model.set_adapter("merged")
    assert relative(outputs(model, family), expected) <= 1e-5
    assert report.error < 1e-5
    with model.disable_adapter():
        assert relative(outputs(model, family), expected) > 1e-3


def prepared(base: Any, start: str) -> LoraConfig:
    """A configuration whose initialisation changes the base, after what that needs to see."""
    ids = torch.randint(1, 99, (1, 8), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"r": 3, "init_lora_weights": start, "target_modules": LINEAR["llama"]}
    if start == "corda":
        config = LoraConfig(**options, corda_config=CordaConfig(corda_method="kpm"))
        preprocess_corda(base, config, run_model=lambda: base(ids))
        return config
    if start == "lora_ga":
        config = LoraConfig(**options, lora_ga_config=LoraGAConfig())
        preprocess_loraga(base, config, lambda: base(ids, labels=ids).loss.backward())
        return config
    return LoraConfig(**options, loftq_config=LoftQConfig() if start == "loftq" else {})


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_adapters_whose_initialisation_nobody_can_repeat_merge_where_it_was_done(
    start: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if start == "loftq":  # what it does to the base needs a GPU's quantisation: some change stands for it
        monkeypatch.setattr(LoraLayer, "loftq_init", lambda layer, *_: layer.get_base_layer().weight.data.mul_(0.9))
    base = make_base("llama")
    before = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    config = prepared(base, start)
    model: Any = get_peft_model(base, config, "own")
    layers = [own for own in model.modules() if isinstance(own, LoraLayer)]
    assert relative(layers[0].base_layer.weight, before) > 1e-3
    model.add_adapter("plain", KINDS["plain"]("llama"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.set_adapter("own")
    expected, whole = outputs(model, "llama"), snapshot(model)
    with caplog.at_level("WARNING", logger="hf_fda"):
        hf_fda.merge_adapters(model, ["own"], "alone")
    assert f"initialised by '{start}'" in caplog.text
    hf_fda.merge_adapters(model, ["own", "plain"], "both", "task_arithmetic", scaling=1.0)
    assert unchanged(model, whole)
    model.set_adapter("alone")
    assert relative(outputs(model, "llama"), expected) <= 1e-5
    for own in layers:
        sum_of_both = own.get_delta_weight("own") + own.get_delta_weight("plain")
        assert relative(own.get_delta_weight("both"), sum_of_both) < 1e-5


def test_a_scale_that_was_set_counts() -> None:
    model: Any = model_with("llama", "plain", "rslora")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("plain", 3.0)
    model.set_adapter("plain")
    expected = outputs(model, "llama")
    hf_fda.merge_adapters(model, ["plain"], "merged")
    model.set_adapter("merged")
    assert relative(outputs(model, "llama"), expected) <= 1e-5


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft", "vera", "ia3"])
def test_adapters_that_are_no_lora_are_refused_beside_it(kind: str) -> None:
    model = train(make_base("llama"), KINDS[kind]("llama"), 1)
    before = snapshot(model)
    with pytest.raises(hf_fda.InputError, match="of one kind"):
        hf_fda.merge_adapters(model, ["default"], "merged")
    assert unchanged(model, before)
    assert list(model.peft_config) == ["default"]


def test_a_difference_of_adapters_is_exact() -> None:
    model = model_with("llama", "plain", "rslora", "patterns")
    before = snapshot(model)
    weights = {"plain": 0.7, "rslora": -0.4, "patterns": 1.3}
    report = hf_fda.merge_adapters(model, list(weights), "mixed", "linear", weights=weights, normalize=False)
    assert unchanged(model, before)
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "mixed" in module.lora_A:
            expected = sum(weight * module.get_delta_weight(name) for name, weight in weights.items())
            assert relative(module.get_delta_weight("mixed"), expected) < 1e-5, path
    assert {own.rank for own in report.modules} == {9, 11}


@pytest.mark.parametrize(
    "method", ["tsv", "isotropic", "task_arithmetic", "wudi", "fda", "della", "model_stock", "iso_cts"]
)
def test_every_method_makes_an_adapter_within_its_rank(method: str) -> None:
    model = model_with("llama", "plain", "rslora")
    options = {"num_anchors": 4, "num_tokens": 1, "steps": 2, "epochs": 1} if method == "fda" else {}
    report = hf_fda.merge_adapters(model, ["plain", "rslora"], "merged", method, rank=4, **options)
    assert {own.rank for own in report.modules} == {4}
    model.set_adapter("merged")
    assert outputs(model, "llama").isfinite().all()


def test_a_merged_adapter_is_saved_and_loaded_by_plain_peft(tmp_path: Any) -> None:
    model = model_with("llama", "plain", "dora")
    hf_fda.merge_adapters(model, ["plain", "dora"], "merged", "tsv")
    model.set_adapter("merged")
    expected = outputs(model, "llama")
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    again = PeftModel.from_pretrained(make_base("llama"), tmp_path / "merged")
    assert relative(outputs(again, "llama"), expected) < 1e-6


def test_heads_of_one_task_can_be_averaged() -> None:
    model: Any = train(make_model("bert"), LoraConfig(r=2, target_modules=["value"], task_type="SEQ_CLS"), 1)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["value"], task_type="SEQ_CLS"))
    head = model.base_model.model.classifier.modules_to_save
    hf_fda.merge_adapters(model, ["default", "second"], "kept")
    assert "kept" not in head
    hf_fda.merge_adapters(model, ["default", "second"], "averaged", heads="merge")
    expected = (head["default"].weight + head["second"].weight) / 2
    torch.testing.assert_close(head["averaged"].weight, expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"adapters": ["plain", "plan"]}, ["no adapter 'plan'", "did you mean 'plain'"]),
        ({"adapters": []}, ["list of names"]),
        ({"adapter_name": "plain"}, ["'plain' already"]),
        ({"adapter_name": "a.b"}, ["a.b", "letters"]),
        ({"rank": 0}, ["rank", "at least 1"]),
        ({"energy": 0}, ["energy"]),
        ({"method": "linaer"}, ["did you mean 'linear'"]),
        ({"weights": [1, 2, 3]}, ["weights", "3 given for 2"]),
    ],
)
def test_bad_arguments_are_refused_and_the_model_is_as_it_was(arguments: Any, said: list[str]) -> None:
    model = model_with("llama", "plain", "rslora")
    before = snapshot(model)
    with pytest.raises(hf_fda.InputError) as caught:
        hf_fda.merge_adapters(**{"peft_model": model, "adapters": ["plain", "rslora"], "adapter_name": "m"} | arguments)
    assert all(words in str(caught.value) for words in said)
    assert unchanged(model, before)
    assert list(model.peft_config) == ["plain", "rslora"]


def test_an_adapter_that_is_merged_into_the_weights_is_refused() -> None:
    model = model_with("llama", "plain", "rslora")
    model.merge_adapter(["plain"])
    with pytest.raises(hf_fda.InputError, match="unmerge_adapter"):
        hf_fda.merge_adapters(model, ["plain"], "merged")
