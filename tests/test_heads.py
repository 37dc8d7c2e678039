"""Task heads: kept beside the merged body, loaded with it, or averaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from checks import assert_good, assert_same, loaded, merge, outputs, weights
from conftest import IMAGE, TEXT, fine_tune, make_model

import hf_fda

Library = Callable[[str], tuple[Path, list[Path]]]
BERT: dict[str, Any] = {**TEXT, "max_position_embeddings": 40}


def assert_heads(merged: hf_fda.Merged, tasks: dict[str, Path], prefix: str, own: tuple[str, ...]) -> None:
    """Each task loads with the tensors named `own` of its source and everything else of the merged body."""
    body = merged.load().state_dict()
    body = {name.removeprefix(f"{prefix}."): value for name, value in body.items()}
    assert merged.tasks == sorted(tasks)
    for task, folder in tasks.items():
        source, model = loaded(folder), merged.load(task)
        assert type(model) is type(source)
        assert model.config.id2label == source.config.id2label
        assert not model.training
        theirs = source.state_dict()
        assert model.state_dict().keys() == theirs.keys()
        for name, value in model.state_dict().items():
            short = name.removeprefix(f"{prefix}.")
            expected = theirs[name] if short.startswith(own) else body[short]
            assert torch.equal(value, expected), (task, name)
        assert bool(outputs(model).isfinite().all())


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv", "fda"])
def test_classifiers_of_a_bare_encoder_keep_their_own_heads(
    method: str, classifiers: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, tasks = classifiers
    merged = merge(base, tasks, method, tmp_path / "merged")
    assert type(loaded(merged.folder)) is t.BertModel
    assert_heads(merged, tasks, "bert", ("pooler.", "classifier."))
    assert merged.load("three").config.num_labels == 3


def test_a_merged_folder_is_loaded_by_its_path_too(classifiers: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, tasks = classifiers
    merged = merge(base, tasks, "linear", tmp_path / "merged")
    for folder in (merged.folder, str(merged.folder)):
        assert_same(hf_fda.load(folder, task="four").state_dict(), merged.load("four").state_dict())
        assert_same(hf_fda.load(folder).state_dict(), loaded(merged.folder).state_dict())


def test_loading_takes_arguments_of_from_pretrained(classifiers: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, tasks = classifiers
    merged = merge(base, tasks, "linear", tmp_path / "merged")
    for task in (None, "two"):
        model = merged.load(task, dtype=torch.bfloat16, attn_implementation="eager")
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager"


def test_an_unknown_task_is_refused_and_the_nearest_suggested(
    classifiers: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, tasks = classifiers
    merged = merge(base, tasks, "linear", tmp_path / "merged")
    with pytest.raises(hf_fda.InputError, match="no head for task 'thre': did you mean 'three'"):
        merged.load("thre")
    other = merge(base, {"bare": base}, "linear", tmp_path / "bare")
    with pytest.raises(hf_fda.InputError, match="no task heads"):
        other.load("bare")


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_heads_are_kept_where_the_base_has_one_of_its_own(family: str, library: Library, tmp_path: Path) -> None:
    base, sources = library(family)
    tasks = dict(zip(["a", "b"], sources, strict=True))
    merged = merge(base, tasks, "task_arithmetic", tmp_path / "merged")
    assert_heads(merged, tasks, family, ("pooler.", "classifier."))
    held, found = weights(base), weights(merged.folder)
    for name in held:
        if "classifier" in name or "pooler" in name:
            assert torch.equal(held[name], found[name])  # the folder itself holds the base's


def save_fine_tunes(base: Any, folder: Path, **classes: tuple[Any, dict[str, Any]]) -> dict[str, Path]:
    """Models of other classes on fine-tunes of a base's body: `name=(class, changes of the config)`."""
    tasks = {}
    for number, (task, (model_class, changes)) in enumerate(classes.items(), 1):
        config = type(base.config)(**{**base.config.to_dict(), "architectures": None, **changes})
        torch.manual_seed(number)
        model = model_class(config).eval()
        body = fine_tune(base, seed=number).base_model.state_dict()
        model.base_model.load_state_dict(
            {name: value for name, value in body.items() if name in model.base_model.state_dict()}, strict=False
        )
        model.save_pretrained(folder / task)
        tasks[task] = folder / task
    return tasks


def test_heads_of_different_kinds_are_kept_side_by_side(tmp_path: Path) -> None:
    base = t.BertModel(t.BertConfig(**BERT)).eval()
    base.save_pretrained(tmp_path / "base")
    tasks = save_fine_tunes(
        base,
        tmp_path,
        sentence=(t.BertForSequenceClassification, {"num_labels": 3}),
        token=(t.BertForTokenClassification, {"num_labels": 5}),
        question=(t.BertForQuestionAnswering, {}),
    )
    merged = merge(tmp_path / "base", tasks, "fda", tmp_path / "merged")
    assert_heads(merged, tasks, "bert", ("pooler.", "classifier.", "qa_outputs."))


@pytest.mark.parametrize("method", ["tsv", "fda"])
def test_classifiers_of_a_masked_language_model_keep_their_heads(method: str, tmp_path: Path) -> None:
    base = make_model("bert-mlm")
    base.save_pretrained(tmp_path / "base")
    tasks = save_fine_tunes(
        base,
        tmp_path,
        two=(t.BertForSequenceClassification, {"num_labels": 2}),
        three=(t.BertForSequenceClassification, {"num_labels": 3}),
    )
    merged = merge(tmp_path / "base", tasks, method, tmp_path / "merged")
    assert type(loaded(merged.folder)) is t.BertForMaskedLM
    assert_heads(merged, tasks, "bert", ("pooler.", "classifier."))


@pytest.mark.parametrize("method", ["task_arithmetic", "fda"])
@pytest.mark.parametrize("bare", [True, False])
def test_image_classifiers_keep_their_heads(method: str, bare: bool, tmp_path: Path) -> None:
    config = t.ViTConfig(**IMAGE)
    torch.manual_seed(0)
    base = (t.ViTModel if bare else t.ViTForImageClassification)(config).eval()
    base.save_pretrained(tmp_path / "base")
    tasks = save_fine_tunes(
        base,
        tmp_path,
        digits=(t.ViTForImageClassification, {"num_labels": 10}),
        shapes=(t.ViTForImageClassification, {"num_labels": 4}),
    )
    merged = merge(tmp_path / "base", tasks, method, tmp_path / "merged")
    assert type(loaded(merged.folder)) is type(base)
    assert_heads(merged, tasks, "vit", ("layernorm.", "classifier."))


@pytest.mark.parametrize("kind", ["vision", "whole"])
@pytest.mark.parametrize("method", ["linear", "fda"])
def test_clip_image_classifiers_keep_their_heads(kind: str, method: str, tmp_path: Path) -> None:
    whole = make_model("clip")
    base = whole if kind == "whole" else make_model("clip-vision")
    base.save_pretrained(tmp_path / "base")
    vision = whole.vision_model if kind == "whole" else base
    tasks = {}
    for number, (task, labels) in enumerate({"digits": 10, "shapes": 4}.items(), 1):
        config = t.CLIPConfig(**{**whole.config.to_dict(), "architectures": None, "num_labels": labels})
        torch.manual_seed(number)
        model = t.CLIPForImageClassification(config).eval()
        model.vision_model.load_state_dict(fine_tune(vision, seed=number).state_dict())
        model.save_pretrained(tmp_path / task)
        tasks[task] = tmp_path / task
    merged = merge(tmp_path / "base", tasks, method, tmp_path / "merged")
    assert_heads(merged, tasks, "vision_model", ("post_layernorm.", "classifier."))
    if kind == "whole":
        before, after = weights(tmp_path / "base"), weights(merged.folder)
        for name in before:
            if name.startswith("text_"):
                assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("method", ["task_arithmetic", "fda"])
def test_a_whole_clip_beside_one_of_its_towers_merges(method: str, tmp_path: Path) -> None:
    base = make_model("clip")
    base.save_pretrained(tmp_path / "base")
    fine_tune(base, seed=1).save_pretrained(tmp_path / "whole")
    torch.manual_seed(0)
    tower = make_model("clip-vision")
    tower.load_state_dict(fine_tune(base.vision_model, seed=2).state_dict())
    tower.save_pretrained(tmp_path / "tower")
    merged = merge(tmp_path / "base", [tmp_path / "whole", tmp_path / "tower"], method, tmp_path / "merged")
    assert_good("clip", merged.folder)


@pytest.mark.parametrize(("family", "head"), [("llama", "score."), ("qwen2", "score."), ("gpt2", "score.")])
def test_classifiers_of_a_language_model_keep_their_heads(family: str, head: str, tmp_path: Path) -> None:
    base = make_model(family)
    base.save_pretrained(tmp_path / "base")
    model_class = {
        "llama": t.LlamaForSequenceClassification,
        "qwen2": t.Qwen2ForSequenceClassification,
        "gpt2": t.GPT2ForSequenceClassification,
    }[family]
    tasks = save_fine_tunes(
        base,
        tmp_path,
        two=(model_class, {"num_labels": 2, "pad_token_id": 0}),
        three=(model_class, {"num_labels": 3, "pad_token_id": 0}),
    )
    merged = merge(tmp_path / "base", tasks, "fda", tmp_path / "merged")
    loaded(merged.folder)
    prefix = base.base_model_prefix
    assert_heads(merged, tasks, prefix, ("norm.", "ln_f.", head))


def test_heads_of_one_task_may_be_averaged(tmp_path: Path) -> None:
    base = t.BertModel(t.BertConfig(**BERT)).eval()
    base.save_pretrained(tmp_path / "base")
    classifier = (t.BertForSequenceClassification, {"num_labels": 3})
    tasks = save_fine_tunes(base, tmp_path, one=classifier, two=classifier)
    merged = merge(tmp_path / "base", tasks, "task_arithmetic", tmp_path / "merged", heads="merge")
    assert merged.tasks == []
    assert not (merged.folder / "task_heads").exists()
    model = loaded(merged.folder)
    assert type(model) is t.BertForSequenceClassification
    assert model.config.num_labels == 3
    one, two = (loaded(folder).state_dict() for folder in tasks.values())
    for name, value in model.state_dict().items():
        if "pooler" in name or "classifier" in name:
            torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-7)


def test_heads_of_different_shape_are_not_averaged(classifiers: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, tasks = classifiers
    with pytest.raises(hf_fda.InputError, match=r"heads='merge'.*'three'.*shapes or labels.*heads='keep'"):
        merge(base, tasks, "linear", tmp_path / "merged", heads="merge")
    assert not (tmp_path / "merged").exists()


def test_heads_of_different_labels_are_not_averaged(tmp_path: Path) -> None:
    base = t.BertModel(t.BertConfig(**BERT)).eval()
    base.save_pretrained(tmp_path / "base")
    tasks = save_fine_tunes(
        base,
        tmp_path,
        one=(t.BertForSequenceClassification, {"id2label": {0: "no", 1: "yes"}}),
        two=(t.BertForSequenceClassification, {"id2label": {0: "yes", 1: "no"}}),
    )
    with pytest.raises(hf_fda.InputError, match=r"heads='merge'.*labels"):
        merge(tmp_path / "base", tasks, "linear", tmp_path / "merged", heads="merge")


def test_heads_of_different_kinds_are_not_averaged(tmp_path: Path) -> None:
    base = t.BertModel(t.BertConfig(**BERT)).eval()
    base.save_pretrained(tmp_path / "base")
    tasks = save_fine_tunes(
        base,
        tmp_path,
        one=(t.BertForSequenceClassification, {"num_labels": 2}),
        two=(t.BertForTokenClassification, {"num_labels": 2}),
    )
    with pytest.raises(hf_fda.InputError, match=r"heads='merge'.*kinds"):
        merge(tmp_path / "base", tasks, "linear", tmp_path / "merged", heads="merge")


@pytest.mark.parametrize("method", ["linear", "fda"])
@pytest.mark.parametrize("family", ["llama", "bert-mlm", "gpt2", "qwen2"])
def test_language_models_of_a_bare_base_make_a_language_model(family: str, method: str, tmp_path: Path) -> None:
    base = make_model(family)
    sources = [fine_tune(base, seed=seed) for seed in (1, 2)]
    base.base_model.save_pretrained(tmp_path / "base")
    for name, source in zip("ab", sources, strict=True):
        source.save_pretrained(tmp_path / name)
    merged = merge(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], method, tmp_path / "merged")
    assert merged.tasks == []
    loaded(merged.folder)
    model, report = type(base).from_pretrained(merged.folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert bool(outputs(model.eval()).isfinite().all())
    if method == "linear":
        states = [source.state_dict() for source in sources]
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2, rtol=1e-5, atol=1e-7)


def test_shards_load_with_task_heads(classifiers: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, tasks = classifiers
    merged = merge(base, tasks, "linear", tmp_path / "merged", max_shard_bytes=20_000)
    assert_heads(merged, tasks, "bert", ("pooler.", "classifier."))
