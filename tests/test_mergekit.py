"""mergekit's configurations: the numbers they mean, and refusals that name the line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
import transformers as t
import yaml
from checks import assert_near, assert_same, files, weights
from conftest import fine_tune, make_model
from peft import LoraConfig, PeftModel
from tokenizers import AddedToken
from torch import Tensor
from vocabularies import bpe
from vocabularies import llama as speaker

import hf_fda
from hf_fda.cli import main
from hf_fda.errors import InputError

Library = Callable[[str], tuple[Path, list[Path]]]


def run(config: dict[str, Any] | str, output: Path, **settings: Any) -> dict[str, Tensor]:
    """The tensors that a configuration's merge writes."""
    if isinstance(config, str):
        path = output.parent / f"{output.name}.yaml"
        path.write_text(config, encoding="utf-8")
        return weights(hf_fda.merge_config(path, output, device="cpu", quiet=True, **settings).folder)
    return weights(hf_fda.merge_config(config, output, device="cpu", quiet=True, **settings).folder)


def layer(name: str) -> int | None:
    """The number of the layer that a tensor of a Llama is in."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


@pytest.fixture
def llama(library: Library) -> tuple[Path, Path, Path]:
    """A Llama of two layers and two fine-tunes of it."""
    base, (one, two) = library("llama")
    return base, one, two


@pytest.fixture
def deep(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A Llama of four layers and two fine-tunes of it."""
    base = make_model("llama", num_hidden_layers=4)
    folders = tuple(tmp_path / name for name in ("deep", "one", "two"))
    for seed, folder in enumerate(folders):
        (fine_tune(base, seed) if seed else base).save_pretrained(folder)
    return folders  # type: ignore[return-value]


def test_linear_without_a_base(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The weighted mean of the models; not normalised, their weighted sum."""
    _, one, two = llama
    models = [{"model": str(one), "parameters": {"weight": 3}}, {"model": str(two), "parameters": {"weight": 1}}]
    config = {"merge_method": "linear", "models": models}
    a, b = weights(one), weights(two)
    assert_near(run(config, tmp_path / "mean"), {name: 0.75 * a[name] + 0.25 * b[name] for name in a})
    config["parameters"] = {"normalize": False}
    assert_near(run(config, tmp_path / "sum"), {name: 3 * a[name] + b[name] for name in a})


def test_linear_counts_the_base_as_a_model(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, _ = llama
    config = {
        "merge_method": "linear",
        "base_model": str(base),
        "models": [{"model": str(one)}],
        "parameters": {"weight": 1},
    }
    o, a = weights(base), weights(one)
    assert_near(run(config, tmp_path / "out"), {name: (o[name] + a[name]) / 2 for name in a})


def test_filters_and_gradients(deep: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The first filter that fits gives the value; a list of values is spread over the layers."""
    base, one, two = deep
    config = f"""
merge_method: task_arithmetic
base_model: {base}
models:
  - model: {one}
    parameters:
      weight:
        - filter: self_attn
          value: [0, 0.5, 1e0]
        - filter: mlp
          value: 2
  - model: {two}
    parameters: {{weight: [0.2, 0.8]}}
parameters:
  weight: 0.7
"""
    o, a, b = weights(base), weights(one), weights(two)
    expected = {}
    for name in o:
        depth = (layer(name) or 0) / 3
        first = (2 * depth * 0.5) if "self_attn" in name else 2.0 if "mlp" in name else 0.7
        expected[name] = o[name] + first * (a[name] - o[name]) + (0.2 + 0.6 * depth) * (b[name] - o[name])
    assert_near(run(config, tmp_path / "out"), expected)


def test_slices_pass_layers_through(deep: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A frankenmerge: its layers are the models' own, embeddings the first slice's, norm and head the last one's."""
    _, one, two = deep
    slices = [
        {"sources": [{"model": str(one), "layer_range": [0, 3]}]},
        {"sources": [{"model": str(two), "layer_range": [1, 4]}]},
    ]
    config = {"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}}
    found = run(config, tmp_path / "out")
    a, b = weights(one), weights(two)
    for name, tensor in found.items():
        number = layer(name)
        if number is None:
            expected = a[name] if "embed" in name else b[name]
        elif number < 3:
            expected = a[name]
        else:
            expected = b[name.replace(f"layers.{number}.", f"layers.{number - 2}.")]
        assert torch.equal(tensor, expected), name
    model = hf_fda.load(tmp_path / "out")
    assert model.config.num_hidden_layers == 6
    assert model(torch.arange(5)[None]).logits.isfinite().all()


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma3", "bert", "mixtral"])
def test_slices_of_many_families(family: str, library: Library, tmp_path: Path) -> None:
    _, (one, two) = library(family)
    slices = [{"sources": [{"model": str(source), "layer_range": [0, 2]}]} for source in (one, two)]
    run({"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}}, tmp_path / "out")
    model = hf_fda.load(tmp_path / "out")
    assert model.config.num_hidden_layers == 4
    assert model(torch.arange(5)[None])[0].isfinite().all()


def test_slices_with_parameters_of_their_own(deep: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Each slice has its sources, its base layers, and parameters that win over the merge's."""
    base, one, two = deep

    def source(model: Path, start: int, stop: int, **parameters: Any) -> dict[str, Any]:
        return {"model": str(model), "layer_range": [start, stop], "parameters": parameters}

    slices = [
        {"sources": [source(base, 0, 2), source(one, 0, 2, weight=0.2), source(two, 2, 4)]},
        {
            "sources": [source(base, 1, 2), source(two, 1, 2), source(one, 0, 1, weight=0.5)],
            "parameters": {"weight": 3},
        },
    ]
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "slices": slices,
        "parameters": {"weight": 0.4, "lambda": 0.5},
    }
    o, a, b = weights(base), weights(one), weights(two)
    expected = {}
    for name in run(config, tmp_path / "out"):
        number = layer(name)

        def at(tensors: dict[str, Tensor], of: int, name: str = name, number: int | None = number) -> Tensor:
            return tensors[name if number is None else name.replace(f"layers.{number}.", f"layers.{of}.")]

        if number == 2 or (number is None and "embed" not in name):
            origin = at(o, 1)
            moves = 3 * (at(b, 1) - origin) + 0.5 * (at(a, 0) - origin)
        else:
            origin = at(o, number or 0)
            moves = 0.2 * (at(a, number or 0) - origin) + 0.4 * (at(b, (number or 0) + 2) - origin)
        expected[name] = origin + 0.5 * moves
    assert_near(weights(tmp_path / "out"), expected)


def test_an_adapter_on_a_model(library: Library, tmp_path: Path) -> None:
    """`model+adapter` is the model with the adapter merged into it, whether the model is the base or not."""
    base, (one, _) = library("llama")
    targets = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    adapter = adapters.save(t.AutoModelForCausalLM.from_pretrained(base), targets, tmp_path / "adapter")
    merged = {}
    for name, folder in (("base", base), ("one", one)):
        model = PeftModel.from_pretrained(t.AutoModelForCausalLM.from_pretrained(folder), str(adapter))
        model.merge_and_unload().save_pretrained(tmp_path / f"with-{name}")
        merged[name] = weights(tmp_path / f"with-{name}")
    o, a = weights(base), weights(one)
    models = [{"model": f"{base}+{adapter}"}, {"model": f"{one}+{adapter}"}]
    config = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models, "parameters": {"weight": 1}}
    expected = {name: merged["base"][name] + merged["one"][name] - o[name] for name in o}
    assert_near(run(config, tmp_path / "sum"), expected)
    config = {"merge_method": "linear", "models": [*models, {"model": str(one)}], "parameters": {"weight": 1}}
    expected = {name: (merged["base"][name] + merged["one"][name] + a[name]) / 3 for name in o}
    assert_near(run(config, tmp_path / "mean"), expected)


def test_function_space_is_one_word_away(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """`merge_method: fda` gives the bytes of the same merge from Python."""
    base, one, two = llama
    options = {"num_anchors": 4, "steps": 3, "epochs": 2, "initial": "task_arithmetic", "scaling": 0.5}
    models = [{"model": str(one)}, {"model": str(two)}]
    config = {"merge_method": "fda", "base_model": str(base), "models": models, "parameters": options}
    found = run(config, tmp_path / "document")
    sources = {one.name: one, two.name: two}
    merged = hf_fda.merge(base, sources, "fda", tmp_path / "python", device="cpu", quiet=True, dtype="auto", **options)
    assert_same(found, weights(merged.folder))


def test_later_documents_use_earlier_results(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Documents are merged in the order of their use; only the last one's result stays."""
    base, one, two = llama
    last = {"merge_method": "linear", "models": [{"model": "half"}, {"model": str(one)}], "parameters": {"weight": 1}}
    models = [{"model": str(base)}, {"model": str(two)}]
    half = {
        "name": "half",
        "merge_method": "linear",
        "models": models,
        "parameters": {"weight": 1},
        "dtype": "bfloat16",
    }
    text = yaml.safe_dump_all([last, half])
    found = run(text, tmp_path / "out", dtype="float32")
    o, a, b = weights(base), weights(one), weights(two)
    middle = {name: ((o[name] + b[name]) / 2).bfloat16().float() for name in o}
    assert_near(found, {name: (middle[name] + a[name]) / 2 for name in o})
    assert not list(tmp_path.glob("out/**/stages"))


def test_what_is_written_makes_it_again(deep: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """`merge_config.yaml` is the configuration with all that was decided; it gives the same bytes."""
    base, one, two = deep
    models = [{"model": str(one), "parameters": {"weight": [0.1, 0.9], "density": 0.5}}, {"model": str(two)}]
    config = {
        "merge_method": "dare_ties",
        "base_model": str(base),
        "models": models,
        "parameters": {"weight": 0.4, "density": [0.3, 0.8], "int8_mask": True},
        "dtype": "bfloat16",
    }
    run(config, tmp_path / "out", seed=7)
    again = hf_fda.merge_config(tmp_path / "out" / "merge_config.yaml", tmp_path / "again", device="cpu", quiet=True)
    assert files(tmp_path / "out") == files(again.folder)
    assert all(tensor.dtype is torch.bfloat16 for tensor in weights(again.folder).values())
    assert "differs by tensor" in (tmp_path / "out" / "README.md").read_text()


def test_from_the_command_line(
    llama: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, one, two = llama
    models = [{"model": str(one)}, {"model": str(two), "parameters": {"weight": [0.5, 1]}}]
    config = {"merge_method": "ties", "base_model": str(base), "models": models, "parameters": {"density": 0.5}}
    path = tmp_path / "ties.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["plan", str(path), "--output", str(tmp_path / "out")]) == 0
    assert "weights=differs by tensor" in capsys.readouterr().out
    assert main(["merge", str(path), "--output", str(tmp_path / "out"), "--quiet", "--device", "cpu"]) == 0
    assert_same(weights(tmp_path / "out"), run(config, tmp_path / "python"))
    assert main(["merge", str(path), "--output", str(tmp_path / "other"), "--method", "linear"]) == 2
    assert "--method" in capsys.readouterr().err


BASE, ONE, TWO = "BASE", "ONE", "TWO"
GOOD = f"""merge_method: ties
base_model: {BASE}
models:
  - model: {ONE}
    parameters:
      weight: 0.5
  - model: {TWO}
parameters:
  density: 0.5
"""

BAD: dict[str, tuple[str, str, int, str]] = {
    "unknown key": ("base_model", "base_modle", 2, "did you mean 'base_model'"),
    "unknown method": ("ties", "tise", 1, "did you mean 'ties'"),
    "unknown parameter": ("density", "densty", 9, "did you mean 'density'"),
    "no number": ("weight: 0.5", "weight: half", 6, "a number"),
    "negative density": ("density: 0.5", "density: -0.5", 9, "at least 0"),
    "negative density by filter": ("density: 0.5", "density: [{filter: mlp, value: [0.1, 7]}]", 9, "at most 1"),
    "empty list": ("weight: 0.5", "weight: []", 6, "empty"),
    "shared parameter of a model": ("weight: 0.5", "normalize: true", 6, "whole merge"),
    "no base": (f"base_model: {BASE}\n", "", 1, "needs a base_model"),
    "missing model": (f"model: {TWO}", "model: /nowhere/at/all", 7, "/nowhere/at/all"),
    "missing adapter": (f"model: {TWO}", f"model: {TWO}+/nowhere", 7, "/nowhere"),
    "twice": (f"model: {TWO}", f"model: {ONE}", 7, "listed twice"),
    "type": ("density: 0.5", "density: 0.5\ndtype: int4", 10, "int4"),
    "modules": ("density: 0.5", "density: 0.5\nmodules: {}", 10, "not supported"),
    "a tag": ("density: 0.5", "density: !!python/object:os.system {}", 9, "not allowed"),
    "no YAML": ("density: 0.5", "density: [0.5", 10, "not valid YAML"),
    "given twice": ("density: 0.5", "density: 0.5\n  density: 0.6", 10, "given twice"),
    "both forms": ("density: 0.5", "density: 0.5\nslices: []", 1, "models or slices"),
    "unknown setting": ("density: 0.5", "density: 0.5\nhf_fda: {sed: 1}", 10, "did you mean 'seed'"),
}


SLICES = f"""merge_method: task_arithmetic
base_model: {BASE}
slices:
  - sources:
      - {{model: {BASE}, layer_range: [0, 1]}}
      - {{model: {ONE}, layer_range: [0, 1]}}
  - sources:
      - {{model: {BASE}, layer_range: [1, 2]}}
      - {{model: {TWO}, layer_range: [0, 1]}}
parameters: {{weight: 1}}
"""
BAD_SLICES: dict[str, tuple[str, str, int, str]] = {
    "too many layers": (f"{TWO}, layer_range: [0, 1]", f"{TWO}, layer_range: [2, 3]", 9, "has 2 layers"),
    "other lengths": (f"{TWO}, layer_range: [0, 1]", f"{TWO}, layer_range: [0, 2]", 9, "has 2 layers"),
    "backwards": (f"{TWO}, layer_range: [0, 1]", f"{TWO}, layer_range: [1, 0]", 9, "first, last + 1"),
    "no base": (f"      - {{model: {BASE}, layer_range: [1, 2]}}\n", "", 2, "one of the slice's sources"),
}


@pytest.mark.parametrize(
    ("good", "change"),
    [(GOOD, change) for change in BAD.values()] + [(SLICES, change) for change in BAD_SLICES.values()],
    ids=[*BAD, *(f"slices: {name}" for name in BAD_SLICES)],
)
def test_refusals_name_the_line(
    good: str, change: tuple[str, str, int, str], llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """What is wrong is refused with its line, before anything is written."""
    old, new, line, reason = change
    assert good.count(old) == 1
    text = good.replace(old, new)
    for word, folder in zip((BASE, ONE, TWO), llama, strict=True):
        text = text.replace(word, str(folder))
    with pytest.raises(InputError) as error:
        run(text, tmp_path / "out")
    assert f"out.yaml, line {line}:" in str(error.value)
    assert reason in str(error.value)
    assert not (tmp_path / "out").exists()


def test_models_with_two_towers_have_no_slices(library: Library, tmp_path: Path) -> None:
    _, (one, two) = library("t5")
    slices = [{"sources": [{"model": str(source), "layer_range": [0, 1]}]} for source in (one, two)]
    with pytest.raises(InputError, match="2 lists of layers"):
        run({"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}}, tmp_path / "out")


def test_documents_that_do_not_fit_together(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, _ = llama

    def document(name: str | None, *models: Any) -> dict[str, Any]:
        listed = [{"model": str(model)} for model in models]
        named = {} if name is None else {"name": name}
        return {**named, "merge_method": "linear", "models": listed, "parameters": {"weight": 1}}

    cases = {
        "made from itself": [document("a", "b", base), document("b", "a", base), document(None, "a", base)],
        "nothing uses": [document("a", base, one), document(None, base, one)],
        "without a name": [document(None, base, one), document(None, base, one)],
        "each name once": [document("a", base, one), document("a", base, one), document(None, "a", one)],
    }
    for reason, documents in cases.items():
        with pytest.raises(InputError, match=reason):
            run(yaml.safe_dump_all(documents), tmp_path / "out")


def test_a_filter_on_a_part_of_a_stack(library: Library, tmp_path: Path) -> None:
    """Experts lie apart on disk and are one tensor in the model: a filter on some of them is refused by name."""
    base, (one, _) = library("mixtral")
    models = [{"model": str(one), "parameters": {"weight": [{"filter": "experts.0", "value": 1}, {"value": 0}]}}]
    config = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    with pytest.raises(InputError, match=r"filter 'experts.0' fits .* and not"):
        run(config, tmp_path / "out")
    models[0]["parameters"] = {"weight": [{"filter": "experts", "value": 1}, {"value": 0}]}
    found, o, a = run(config, tmp_path / "all"), weights(base), weights(one)
    assert_near(found, {name: a[name] if "experts" in name else o[name] for name in o})


@pytest.fixture
def speakers(tmp_path: Path) -> dict[str, Path]:
    """A base, and two models with tokens of their own, one of which both have."""
    folders = {}
    for seed, (name, words) in enumerate({"base": [], "one": ["<x>", "<y>"], "two": ["<z>", "<x>"]}.items()):
        tokenizer = bpe([AddedToken(word, special=True) for word in words])
        folders[name] = tmp_path / name
        speaker(len(tokenizer.get_vocab()), tokenizer, seed=seed).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def embeddings(folder: Path) -> dict[str, Tensor]:
    """A model's embeddings by token."""
    table = weights(folder)["model.embed_tokens.weight"]
    return {token: table[row] for token, row in t.AutoTokenizer.from_pretrained(folder).get_vocab().items()}


def test_a_union_without_a_base(speakers: dict[str, Path], tmp_path: Path) -> None:
    """A model that lacks a token counts with the mean of those that have it; there is no base to take it from."""
    models = [
        {"model": str(speakers["one"]), "parameters": {"weight": 0.3}},
        {"model": str(speakers["two"]), "parameters": {"weight": 1.5}},
    ]
    config = {"merge_method": "linear", "models": models, "tokenizer_source": "union"}
    run({**config, "parameters": {"normalize": False}}, tmp_path / "out")
    found, a, b = embeddings(tmp_path / "out"), embeddings(speakers["one"]), embeddings(speakers["two"])
    assert found.keys() == a.keys() | b.keys()
    for token, row in found.items():
        torch.testing.assert_close(row, 0.3 * a.get(token, b.get(token)) + 1.5 * b.get(token, a.get(token)))


def test_a_model_as_the_tokenizer_and_rules_for_tokens(speakers: dict[str, Path], tmp_path: Path) -> None:
    base, one, two = speakers.values()
    rules = {"<x>": {"source": str(one), "force": True}, "<z>": {"source": {"kind": "zero"}}}
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(one)}, {"model": str(two)}],
        "parameters": {"weight": 0.5},
        "tokenizer": {"source": str(two), "tokens": rules},
        "chat_template": "{{ messages }}",
    }
    run(config, tmp_path / "out")
    found, a, b = embeddings(tmp_path / "out"), embeddings(one), embeddings(two)
    assert found.keys() == b.keys()
    torch.testing.assert_close(found["<x>"], a["<x>"])
    torch.testing.assert_close(found["<z>"], 0.5 * b["<z>"])
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == "{{ messages }}"
    assert hf_fda.load(tmp_path / "out").generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape == (1, 5)
    again = hf_fda.merge_config(tmp_path / "out" / "merge_config.yaml", tmp_path / "again", device="cpu", quiet=True)
    assert files(tmp_path / "out") == files(again.folder)


def test_refusals_about_tokens_name_the_line(speakers: dict[str, Path], tmp_path: Path) -> None:
    base, one, two = speakers.values()
    text = f"""merge_method: linear
parameters: {{weight: 1}}
models:
  - model: {one}
  - model: {two}
"""
    cases = {
        "": (None, "tokenizer"),
        f"tokenizer_source: {base}\n": (6, "is no model of this merge"),
        "tokenizer:\n  tokens:\n    <x>: {force: true}\n": (8, "source is missing"),
        "tokenizer:\n  source: union\n  pad_to_multiple_of: 0\n": (7, "pad_to_multiple_of"),
        "tokenizer_source: union\ntokenizer: {source: base}\n": (7, "one of the two"),
        "tokenizer_source: union\nchat_template: chatml\n": (6, "neither a template nor a name"),
    }
    for more, (line, reason) in cases.items():
        with pytest.raises(InputError, match=reason) as error:
            run(text + more, tmp_path / "out")
        assert line is None or f"line {line}:" in str(error.value), more


def test_a_card_names_all_that_a_frankenmerge_is_made_of(deep: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Every model is named with its licence, by folder alone; that there is no base is said."""
    _, one, two = deep
    (one / "README.md").write_text("---\nlicense: mit\n---\n")
    (two / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    slices = [{"sources": [{"model": str(source), "layer_range": [0, 2]}]} for source in (one, two)]
    run({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "made of one (a folder, not on the Hub), two (a folder, not on the Hub) | mit and apache-2.0 |" in card
    assert "| base | none; configuration and tokenizer are those of one" in card
    assert "license:" not in card and "the models' licences differ (apache-2.0, mit)" in card
    assert str(tmp_path) not in card


def test_settings_beside_a_configuration(speakers: dict[str, Path], tmp_path: Path) -> None:
    """What the command line says of the output wins over the file; what it does not know is refused by name."""
    _, one, two = speakers.values()
    config = {"merge_method": "linear", "models": [{"model": str(one)}, {"model": str(two)}]}
    path = tmp_path / "mean.yaml"
    path.write_text(yaml.safe_dump({**config, "parameters": {"weight": 1}, "dtype": "float32"}))
    words = [
        "merge",
        str(path),
        "--output",
        str(tmp_path / "out"),
        "--quiet",
        "--tokenizer",
        "one",
        "--dtype",
        "bfloat16",
    ]
    assert main(words) == 0
    assert embeddings(tmp_path / "out").keys() == embeddings(one).keys()
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    with pytest.raises(InputError, match="did you mean 'seed'"):
        hf_fda.merge_config(path, tmp_path / "other", sed=1)
