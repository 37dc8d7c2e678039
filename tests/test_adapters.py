"""Adapters as sources: every kind that PEFT saves does to a merge what it does in PEFT."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import KINDS, LINEAR, NORM, make_base, outputs, relative, save, train
from conftest import fine_tune, make_model
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

import hf_fda
from hf_fda.adapters import open_adapter
from hf_fda.checkpoint import open_checkpoint
from hf_fda.checkpoint.location import locate
from hf_fda.merge_methods import method_class

CASES = [
    *(("bert", kind) for kind in KINDS),
    *((family, kind) for family in ("llama", "gpt2", "vit", "t5") for kind in ("plain", "rslora", "modules_to_save")),
    *(("gpt2", kind) for kind in ("dora", "lora_bias", "bias-all", "embedding", "pissa")),
    *(("llama", kind) for kind in ("dora", "patterns", "layers", "olora", "loha", "lokr", "ia3", "vera", "oft")),
    ("llama", "embedding"),  # which PEFT saves with the base's own
]

EXACT = ["iso_cts", "ace", "sce", "model_stock", "slerp", "nuslerp", "multislerp", "karcher", "passthrough"]
"""Methods whose merge of adapters differs from that of dense task vectors by rounding alone."""


def merge(base: Path, sources: Any, output: Path, **arguments: Any) -> Any:
    return hf_fda.merge(str(base), sources, output=output, quiet=True, **arguments)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_one_adapter_with_weight_one_gives_its_own_function(family: str, kind: str, tmp_path: Path) -> None:
    base = make_base(family)
    base.save_pretrained(tmp_path / "base")
    adapter = save(base, KINDS[kind](family), tmp_path / "adapter")
    merged = merge(tmp_path / "base", {"own": str(adapter)}, tmp_path / "merged", method="task_arithmetic", scaling=1.0)
    task = "own" if (tmp_path / "merged/task_heads/own").is_dir() else None
    reference = PeftModel.from_pretrained(copy.deepcopy(base), adapter)
    expected = outputs(reference, family)
    assert relative(outputs(base, family), expected) > 1e-3, "the adapter does nothing, so that the test shows nothing"
    assert relative(outputs(merged.load(task), family), expected) <= 1e-5


@pytest.mark.parametrize("method", [*EXACT, "linear", "task_arithmetic", "tsv", "isotropic", "wudi"])
def test_adapters_merge_as_their_dense_task_vectors_do(method: str, tmp_path: Path) -> None:
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    adapters, dense = {}, {}
    for seed, kind in enumerate(("patterns", "plain", "rslora")):
        adapters[kind] = str(save(base, KINDS[kind]("llama"), tmp_path / kind, seed))
        whole = PeftModel.from_pretrained(copy.deepcopy(base).double(), tmp_path / kind).merge_and_unload()
        whole.save_pretrained(tmp_path / f"{kind}-whole")
        dense[kind] = str(tmp_path / f"{kind}-whole")
    names = list(adapters)[: method_class(method).max_sources]
    for folder, sources in (("thin", adapters), ("dense", dense)):
        merge(tmp_path / "base", {name: sources[name] for name in names}, tmp_path / folder, method=method)
    thin, full = (load_file(tmp_path / folder / "model.safetensors") for folder in ("thin", "dense"))
    start = load_file(tmp_path / "base/model.safetensors")
    assert thin.keys() == full.keys()
    moved = sum(float((full[name] - start[name]).square().sum()) for name in full) ** 0.5
    apart = sum(float((full[name] - thin[name]).square().sum()) for name in full) ** 0.5
    assert moved > 0.1
    assert apart < 1e-5 * moved


def test_adapters_and_full_checkpoints_merge_together_in_any_order(tmp_path: Path) -> None:
    base = make_base("bert")
    base.save_pretrained(tmp_path / "base")
    fine_tune(base, seed=4).save_pretrained(tmp_path / "full")
    adapter = save(base, KINDS["dora"]("bert"), tmp_path / "adapter")
    sources = {"adapter": str(adapter), "full": str(tmp_path / "full")}
    first = merge(tmp_path / "base", sources, tmp_path / "first", method="task_arithmetic", scaling=0.5)
    turned = dict(reversed(sources.items()))
    second = merge(tmp_path / "base", turned, tmp_path / "second", method="task_arithmetic", scaling=0.5)
    left, right = (load_file(merged.folder / "model.safetensors") for merged in (first, second))
    assert all(torch.allclose(left[name], right[name], rtol=1e-6, atol=1e-8) for name in left)
    weight = "bert.encoder.layer.0.attention.self.value.weight"
    whole = PeftModel.from_pretrained(copy.deepcopy(base), adapter).merge_and_unload().state_dict()[weight]
    start, full = (load_file(tmp_path / name / "model.safetensors")[weight] for name in ("base", "full"))
    torch.testing.assert_close(left[weight], start + 0.5 * (full - start) + 0.5 * (whole - start))


def test_a_model_in_memory_gives_its_active_adapter_and_keeps_it(tmp_path: Path) -> None:
    base = make_base("bert")
    base.save_pretrained(tmp_path / "base")
    model = train(base, KINDS["plain"]("bert"), seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = outputs(model, "bert")
    merged = merge(tmp_path / "base", {"own": model}, tmp_path / "merged", method="task_arithmetic", scaling=1.0)
    assert relative(outputs(merged.load("own"), "bert"), expected) <= 1e-6
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_classifiers_as_adapters_of_a_bare_encoder_keep_their_heads(tmp_path: Path) -> None:
    whole = make_base("bert")
    whole.bert.save_pretrained(tmp_path / "base")
    expected, sources = {}, {}
    for labels in (2, 3):
        model = make_model("bert", num_labels=labels)
        model.bert.load_state_dict(whole.bert.state_dict())
        config = LoraConfig(r=3, target_modules=["value", "dense"], task_type="SEQ_CLS")
        sources[f"of{labels}"] = str(save(model, config, tmp_path / f"of{labels}", labels))
        expected[f"of{labels}"] = PeftModel.from_pretrained(model, sources[f"of{labels}"])
    alone = merge(tmp_path / "base", {"of3": sources["of3"]}, tmp_path / "alone", method="task_arithmetic", scaling=1.0)
    assert relative(outputs(alone.load("of3"), "bert"), outputs(expected["of3"], "bert")) <= 1e-6
    merged = merge(tmp_path / "base", sources, tmp_path / "merged", method="tsv")
    assert merged.tasks == ["of2", "of3"]
    assert [merged.load(task).num_labels for task in merged.tasks] == [2, 3]
    head = load_file(tmp_path / "merged/task_heads/of2/model.safetensors")
    saved = load_file(tmp_path / "of2/adapter_model.safetensors")
    assert torch.equal(head["classifier.weight"], saved["base_model.model.classifier.weight"])


def test_experts_as_parameters_are_merged(tmp_path: Path) -> None:
    base = make_base("qwen3-moe")
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    adapter = save(base, config, tmp_path / "adapter")
    expected = outputs(PeftModel.from_pretrained(copy.deepcopy(base), adapter), "qwen3-moe")
    merged = merge(tmp_path / "base", {"own": str(adapter)}, tmp_path / "merged", method="task_arithmetic", scaling=1.0)
    assert relative(outputs(base, "qwen3-moe"), expected) > 1e-3
    assert relative(outputs(merged.load(), "qwen3-moe"), expected) <= 1e-6


def test_convolutions_are_merged(tmp_path: Path) -> None:
    base = make_base("vit")
    base.save_pretrained(tmp_path / "base")
    for name, dora in (("plain", False), ("dora", True)):
        config = LoraConfig(r=3, target_modules=["projection", "v_proj"], use_dora=dora)
        adapter = save(base, config, tmp_path / name)
        expected = outputs(PeftModel.from_pretrained(copy.deepcopy(base), adapter), "vit")
        merged = merge(
            tmp_path / "base", {"own": str(adapter)}, tmp_path / f"m-{name}", method="task_arithmetic", scaling=1.0
        )
        assert relative(outputs(merged.load("own"), "vit"), expected) <= 1e-6


def test_thin_adapters_stay_thin(tmp_path: Path) -> None:
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    opened = open_checkpoint(tmp_path / "base")
    weight = "model.layers.0.self_attn.q_proj.weight"
    for kind, rank in (("plain", 3), ("patterns", 5), ("pissa", 6)):
        folder = save(base, KINDS[kind]("llama"), tmp_path / kind)
        source = open_adapter(folder, opened, locate(folder))
        factors = source.factors(weight)
        assert factors is not None
        assert factors.rank == rank
        torch.testing.assert_close(factors.dense(), source.task(weight, opened.read(weight)))
        assert source.factors("model.norm.weight") is None
        flat = source.task(weight, opened.read(weight, slice(70, 700)), slice(70, 700))
        torch.testing.assert_close(flat, factors.dense().flatten()[70:700])
    dora = save(base, KINDS["dora"]("llama"), tmp_path / "dora")
    assert open_adapter(dora, opened, locate(dora)).factors(weight) is None


def test_fda_merges_adapters(tmp_path: Path) -> None:
    base = make_base("bert")
    base.save_pretrained(tmp_path / "base")
    sources = {
        kind: str(save(base, KINDS[kind]("bert"), tmp_path / kind, seed))
        for seed, kind in enumerate(("plain", "dora", "ia3"))
    }
    options = {"num_anchors": 4, "num_tokens": 3, "steps": 3, "epochs": 2}
    merged = merge(tmp_path / "base", sources, tmp_path / "merged", method="fda", **options)
    assert merged.tasks == ["dora", "ia3", "plain"]
    assert all(outputs(merged.load(task), "bert").isfinite().all() for task in merged.tasks)


THIN = (
    "plain",
    "rslora",
    "lora_bias",
    "bias-all",
    "patterns",
    "layers",
    "modules_to_save",
    "embedding",
    "pissa",
    "olora",
)
SYMMETRIC = ("linear", "task_arithmetic", "cat", "svd", "ties", "magnitude_prune", "tsv", "isotropic", "wudi", "knots")


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A base and an adapter of every kind."""
    folder = tmp_path_factory.mktemp("kinds")
    base = make_base("bert")
    base.save_pretrained(folder / "base")
    kinds = enumerate(sorted(KINDS))
    return folder / "base", {kind: str(save(base, KINDS[kind]("bert"), folder / kind, seed)) for seed, kind in kinds}


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        *(pytest.param(method, THIN, id=f"{method}-thin") for method in SYMMETRIC),
        # KnOTS elects signs in a basis of singular vectors, and many close singular values leave these to rounding
        *(pytest.param(method, tuple(sorted(KINDS)), id=f"{method}-all") for method in SYMMETRIC if method != "knots"),
    ],
)
def test_the_order_of_adapters_does_not_matter(
    method: str, kinds: tuple[str, ...], all_kinds: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    base, folders = all_kinds
    names, found = sorted(kinds), []
    for place, order in (("there", names), ("back", names[::-1]), ("turned", names[4:] + names[:4])):
        sources = {name: folders[name] for name in order}
        found.append(load_file(merge(base, sources, tmp_path / place, method=method).folder / "model.safetensors"))
    start = load_file(base / "model.safetensors")
    moved = sum(float((found[0][name] - start[name]).square().sum()) for name in start) ** 0.5
    assert moved > 0.1
    for other in found[1:]:
        apart = sum(float((found[0][name] - other[name]).square().sum()) for name in start) ** 0.5
        assert apart < 1e-4 * moved


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "qwen2", "t5"])
@pytest.mark.parametrize("as_adapter", [False, True])
def test_adapters_that_train_some_tokens_are_merged(family: str, as_adapter: bool, tmp_path: Path) -> None:
    base = make_base(family)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=LINEAR.get(family, ["q_proj"]), trainable_token_indices=[1, 5, 7])
    folder = save(base, config, tmp_path / "adapter")
    options = {"method": "task_arithmetic", "scaling": 1.0, "as_adapter": as_adapter}
    merged = merge(tmp_path / "base", {"own": str(folder)}, tmp_path / "merged", **options)
    expected = outputs(PeftModel.from_pretrained(copy.deepcopy(base), folder), family)
    assert relative(outputs(base, family), expected) > 1e-3
    assert relative(outputs(merged.load("own" if merged.tasks else None), family), expected) <= 1e-5
    if as_adapter:
        assert merged.report.ranks == "2 to 3"


class TestFolders:
    """PEFT saves adapters that are not called "default" in folders of their names."""

    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        base = make_base("llama")
        base.save_pretrained(tmp_path / "base")
        model: Any = train(base, KINDS["plain"]("llama"), seed=1)
        model.add_adapter("second", KINDS["rslora"]("llama"))
        model.save_pretrained(tmp_path / "both", selected_adapters=["second"])
        return tmp_path / "both"

    def test_the_only_one_is_found_and_each_can_be_named(self, saved: Path, tmp_path: Path) -> None:
        direct = merge(tmp_path / "base", {"own": str(saved / "second")}, tmp_path / "direct", method="linear")
        found = merge(tmp_path / "base", {"own": str(saved)}, tmp_path / "found", method="linear")
        files = [folder / "model.safetensors" for folder in (direct.folder, found.folder)]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert f"{saved}/second" in (found.folder / "merge_config.yaml").read_text()

    def test_several_are_listed(self, saved: Path, tmp_path: Path) -> None:
        save(make_base("llama"), KINDS["plain"]("llama"), saved / "first")
        with pytest.raises(hf_fda.InputError) as caught:
            merge(tmp_path / "base", {"own": str(saved)}, tmp_path / "out", method="linear")
        assert f"say which: '{saved}/first', '{saved}/second'" in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_an_adapter_beside_folders_of_others_is_the_one(self, saved: Path, tmp_path: Path) -> None:
        plain = save(make_base("llama"), KINDS["plain"]("llama"), tmp_path / "plain")
        save(make_base("llama"), KINDS["plain"]("llama"), saved)
        merged = [
            merge(tmp_path / "base", {"own": str(folder)}, tmp_path / f"m-{folder.name}", method="linear").folder
            for folder in (plain, saved)
        ]
        assert len({(folder / "model.safetensors").read_bytes() for folder in merged}) == 1


class TestRefusals:
    """Adapters that cannot be merged rightly are refused by name, with nothing written."""

    def refused(self, tmp_path: Path, folder: Path, *said: str) -> None:
        with pytest.raises(hf_fda.InputError) as caught:
            merge(tmp_path / "base", {"bad": str(folder)}, tmp_path / "merged", method="linear")
        for words in ("source 'bad'", *said):
            assert words in str(caught.value)
        assert not (tmp_path / "merged").exists()

    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        base = make_base("bert")
        base.save_pretrained(tmp_path / "base")
        return save(base, KINDS["plain"]("bert"), tmp_path / "adapter")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"peft_type": "PROMPT_TUNING"}, ["PROMPT_TUNING", "do not merge into weights"]),
            ({"use_qalora": True}, ["use_qalora", "not understood"]),
            ({"alora_invocation_tokens": [1, 2]}, ["alora_invocation_tokens"]),
            ({"layer_replication": [[0, 1]]}, ["layer_replication"]),
            ({"trainable_token_indices": [1]}, ["trainable_tokens_delta"]),
            ({"init_lora_weights": "corda"}, ["corda", "path_initial_model_for_weight_conversion"]),
            ({"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4"]),
            ({"of_the_future": 1}, ["of_the_future", "update peft"]),
            ({"r": 5}, ["does not fit the base"]),
            ({"target_modules": ["value"]}, ["has no place"]),
        ],
    )
    def test_options(self, tmp_path: Path, adapter: Path, changes: dict[str, Any], said: list[str]) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        self.refused(tmp_path, adapter, *said)

    def test_another_architecture(self, tmp_path: Path, adapter: Path) -> None:
        other = save(make_base("llama"), KINDS["plain"]("llama"), tmp_path / "other")
        self.refused(tmp_path, other, "LlamaForCausalLM")

    def test_another_width(self, tmp_path: Path, adapter: Path) -> None:
        wide = make_model("bert", hidden_size=48)
        other = save(wide, LoraConfig(r=3, target_modules=LINEAR["bert"]), tmp_path / "other")
        self.refused(tmp_path, other, "does not fit the base")

    @pytest.mark.parametrize("options", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
    def test_one_of_two_tied_tensors(self, tmp_path: Path, options: dict[str, Any]) -> None:
        base = make_base("qwen2")
        base.save_pretrained(tmp_path / "base")
        config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
        folder = save(base, config, tmp_path / "adapter")
        self.refused(tmp_path, folder, "embed_tokens", "lm_head", "as_adapter=True")
        merged = merge(tmp_path / "base", {"own": str(folder)}, tmp_path / "out", method="cat", as_adapter=True)
        expected = outputs(PeftModel.from_pretrained(make_base("qwen2"), folder), "qwen2")
        assert relative(outputs(merged.load(), "qwen2"), expected) <= 1e-5

    def test_pickled_weights(self, tmp_path: Path, adapter: Path) -> None:
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        self.refused(tmp_path, adapter, "adapter_model.safetensors", "never opened")

    def test_a_tensor_that_is_missing(self, tmp_path: Path, adapter: Path) -> None:
        from safetensors.torch import save_file

        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors.pop(next(iter(tensors)))
        save_file(tensors, path)
        self.refused(tmp_path, adapter, "lacks tensors")

    def test_a_bias_that_the_base_does_not_have(self, tmp_path: Path) -> None:
        base = make_base("llama")
        base.save_pretrained(tmp_path / "base")
        folder = save(base, KINDS["lora_bias"]("llama"), tmp_path / "adapter")
        self.refused(tmp_path, folder, "bias", "does not have")


def test_norm_names_are_those_of_the_families() -> None:
    for family, norm in NORM.items():
        assert any(name.endswith(norm) or f".{norm}." in name for name, _ in make_model(family).named_modules())


def test_another_process_knows_an_adapter_again(tmp_path: Path) -> None:
    base = make_base("bert")
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["query", "key", "value"], modules_to_save=["LayerNorm", "pooler"])
    adapter = save(base, config, tmp_path / "adapter")
    code = (
        "from hf_fda.adapters.files import read_files; from hf_fda.checkpoint.location import locate; "
        f"print(read_files(locate({str(adapter)!r})).fingerprint())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
