"""Scores of merged models: metrics, labels, what models answer, the file, the card and the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
import transformers as t
import yaml
from checks import merge
from conftest import IMAGE, T5, TEXT, fine_tune
from huggingface_hub import ModelCard, parse_eval_result_entries
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from vocabularies import bpe, ids_of, llama, save, wordpiece

import hf_fda
from hf_fda.card_record import RECORD
from hf_fda.cli import main
from hf_fda.data.texts import common
from hf_fda.errors import InputError, RunError
from hf_fda.evaluation.choice import TAKES, ChosenMetric
from hf_fda.evaluation.metrics import BUNDLED
from hf_fda.evaluation.published import eval_results, model_index
from hf_fda.evaluation.scores import SCORES, ScoredData, Scores, TaskScores

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
TEXTS = ["the quick brown fox", "the lazy dog", "fox", "a quick dog jumps over the lazy fox", "over the dog"]
QUIET: dict[str, Any] = {"device": "cpu", "quiet": True}


@pytest.fixture(autouse=True)
def _cache_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps out of the user's cache what is read through `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# -- metrics --------------------------------------------------------------------------------------------------------


def computed(name: str, predictions: Any, references: Any, answer: Any = None) -> float:
    (value,) = ChosenMetric(name, answer or TAKES[name][0]).compute(predictions, references).values()
    return value


def drawn(low: int, high: int, *shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(low, high, shape)


def test_the_bundled_metrics_are_those_that_are_known_and_named_as_what_they_give() -> None:
    assert BUNDLED.keys() == TAKES.keys()
    for name, metric in BUNDLED.items():
        assert issubclass(metric, evaluate.Metric)
        single = ChosenMetric(name, TAKES[name][0]).compute(*([["a"]] * 2 if name == "exact_match" else [[1], [1]]))
        assert list(single) == [name]


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_metrics_of_labels_are_as_in_scikit_learn(classes: int) -> None:
    said, known = drawn(0, classes, 50).tolist(), drawn(0, classes, 50, seed=1).tolist()
    assert computed("accuracy", said, known) == sklearn.metrics.accuracy_score(known, said)
    assert computed("f1", said, known) == pytest.approx(sklearn.metrics.f1_score(known, said, average="macro"))
    expected = sklearn.metrics.matthews_corrcoef(known, said)
    assert computed("matthews_correlation", said, known) == pytest.approx(expected)
    assert computed("matthews_correlation", [1, 1], [0, 1]) == 0


def test_metrics_of_several_labels_a_row_are_as_in_scikit_learn() -> None:
    said, known = drawn(0, 2, 40, 4), drawn(0, 2, 40, 4, seed=1)
    said[:, 3] = known[:, 3] = 0
    expected = sklearn.metrics.f1_score(known, said, average="macro", zero_division=0)
    assert computed("f1", said.tolist(), known.tolist(), "flags") == pytest.approx(expected)
    share = sklearn.metrics.accuracy_score(known, said)
    assert computed("accuracy", said.tolist(), known.tolist(), "flags") == pytest.approx(share)


def test_metrics_of_numbers_are_as_in_scipy() -> None:
    said, known = drawn(0, 9, 60) / 4, drawn(0, 9, 60, seed=1) / 4
    assert computed("mse", said, known) == pytest.approx(np.square(said - known).mean())
    assert computed("mae", said, known) == pytest.approx(np.abs(said - known).mean())
    assert computed("pearsonr", said, known) == pytest.approx(scipy.stats.pearsonr(said, known)[0])
    assert computed("spearmanr", said, known) == pytest.approx(scipy.stats.spearmanr(said, known)[0])
    assert math.isnan(computed("pearsonr", [1.0, 1.0], [1.0, 2.0]))


def test_metrics_of_texts() -> None:
    assert computed("exact_match", ["a ", "b", "C"], ["a", "c", "c"]) == pytest.approx(1 / 3)
    assert computed("perplexity", [2.0, 4.0], [1, 5]) == pytest.approx(math.e)
    assert computed("perplexity", [1e6], [1]) == math.inf


# -- classifiers ----------------------------------------------------------------------------------------------------


def bert_for(model_class: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return model_class(t.BertConfig(**TEXT, max_position_embeddings=40, pad_token_id=0, **settings)).eval()


class Family:
    """A bare encoder with a tokenizer, and models of its tasks, merged."""

    def __init__(self, folder: Path, **tasks: dict[str, Any]) -> None:
        self.tokenizer = wordpiece(folder / "words", WORDS)
        base = bert_for(t.BertModel)
        self.base, self.sources = save(folder / "base", base, self.tokenizer), {}
        for seed, (task, settings) in enumerate(tasks.items(), 1):
            model = bert_for(t.BertForSequenceClassification, **settings)
            model.bert.load_state_dict(fine_tune(base, seed).state_dict())
            with torch.no_grad():
                model.classifier.weight.normal_(0, 2)
            self.sources[task] = save(folder / task, model, self.tokenizer)
        self.merged = merge(self.base, self.sources, "linear", folder / "merged")

    @torch.no_grad()
    def logits(self, task: str, alone: bool = False, texts: Any = TEXTS) -> Any:
        """What a model says, by plain transformers."""
        model = t.AutoModelForSequenceClassification.from_pretrained(self.sources[task]) if alone else None
        model = model or self.merged.load(task)
        inputs = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        return model.eval()(**inputs).logits


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """A classifier of two labels with names, one of three without, a regression and one of several labels a row."""
    names = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    several = {"num_labels": 3, "problem_type": "multi_label_classification"}
    return Family(
        tmp_path, pets={"num_labels": 2, **names}, three={"num_labels": 3}, far={"num_labels": 1}, tags=several
    )


def rows(labels: Any, column: str = "label") -> list[dict[str, Any]]:
    return [{"text": text, column: label} for text, label in zip(TEXTS, labels, strict=True)]


def test_classifiers_are_scored_under_their_own_heads_before_and_after(family: Family) -> None:
    labels = [0, 1, 2, 1, 0]
    data = {"pets": rows(["cat", "Dog", "dog", "cat", "cat"]), "three": datasets.Dataset.from_list(rows(labels))}
    scores = hf_fda.evaluate(family.merged, data, individual=True, batch_size=2, **QUIET)
    for task, known in {"pets": [0, 1, 1, 0, 0], "three": labels}.items():
        for alone, found in ((False, scores[task].merged), (True, scores[task].individual)):
            said = family.logits(task, alone).argmax(-1)
            assert found == {"accuracy": pytest.approx(float((said == torch.tensor(known)).double().mean()))}
        assert scores[task].data.rows == 5
    assert scores["three"].modality == "text-classification"


def test_regressions_and_several_labels_a_row(family: Family) -> None:
    known = [0.5, 1.0, -1.0, 2.0, 0.0]
    tags = [[], [2], ["LABEL_0", "LABEL_1"], [0, 2], [1]]
    scores = hf_fda.evaluate(family.merged, {"far": rows(known, "score"), "tags": rows(tags, "labels")}, **QUIET)
    said = family.logits("far")[:, 0].numpy()
    assert scores["far"].merged["mse"] == pytest.approx(np.square(said - np.array(known)).mean(), rel=1e-5)
    assert scores["far"].merged["pearsonr"] == pytest.approx(scipy.stats.pearsonr(said, known)[0], rel=1e-4)
    flags = [[0, 0, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 0]]
    expected = sklearn.metrics.f1_score(flags, family.logits("tags") > 0, average="macro", zero_division=0)
    assert scores["tags"].merged == {"f1": pytest.approx(expected)}
    again = hf_fda.evaluate(family.merged, {"tags": rows([[float(own) for own in row] for row in flags])}, **QUIET)
    assert again["tags"].merged == scores["tags"].merged


def test_a_datasets_names_of_labels_count_where_the_model_knows_them(family: Family) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["dog", "cat"])})
    said = family.logits("pets").argmax(-1).tolist()
    right = datasets.Dataset.from_list(rows([1 - own for own in said]), features=features)
    assert hf_fda.evaluate(family.merged, {"pets": right}, **QUIET)["pets"].merged == {"accuracy": 1.0}
    strange = right.cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    assert hf_fda.evaluate(family.merged, {"pets": strange}, **QUIET)["pets"].merged == {"accuracy": 0.0}


def test_rows_may_be_encoded_or_in_a_file_with_numbers_as_text(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,mark\n" + "".join(f"{text},{n % 3}\n" for n, text in enumerate(TEXTS)))
    data = {"three": {"path": str(file), "label": "mark", "columns": ["text"]}}
    encoded = [{**family.tokenizer(text), "labels": n % 3} for n, text in enumerate(TEXTS)]
    from_file = hf_fda.evaluate(family.merged, data, **QUIET)["three"]
    assert from_file.merged == hf_fda.evaluate(family.merged, {"three": encoded}, **QUIET)["three"].merged
    assert (from_file.data.name, from_file.data.on_hub) == ("rows.csv", False)


def test_rows_and_labels_may_come_from_a_data_loader(family: Family) -> None:
    inputs = family.tokenizer(TEXTS, padding=True, return_tensors="pt")
    for task, labels in (("three", [0, 1, 2, 1, 0]), ("far", [0.5, 1.0, -1.0, 2.0, 0.0])):
        pairs = [{**{name: own[n] for name, own in inputs.items()}, "labels": label} for n, label in enumerate(labels)]
        loader = DataLoader(pairs, batch_size=2)  # type: ignore[arg-type]
        from_loader = hf_fda.evaluate(family.merged, {task: loader}, save=False, **QUIET)[task].merged
        expected = hf_fda.evaluate(family.merged, {task: rows(labels)}, save=False, **QUIET)[task].merged
        assert from_loader == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def test_metrics_may_be_named_given_or_in_a_folder_by_task(family: Family, tmp_path: Path) -> None:
    class Share(evaluate.Metric):
        def _info(self) -> Any:
            kinds = {name: datasets.Value("int64") for name in ("predictions", "references")}
            return evaluate.MetricInfo(
                description="", citation="", inputs_description="", features=datasets.Features(kinds)
            )

        def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
            return {"share": sum(predictions) / len(references), "each": predictions}

    data = {"pets": rows([0, 1, 0, 1, 0]), "three": rows([0, 1, 2, 1, 0])}
    asked = {"pets": ["accuracy", "matthews_correlation", Share(keep_in_memory=True)]}
    scores = hf_fda.evaluate(family.merged, data, asked, **QUIET)
    assert list(scores["pets"].merged) == ["accuracy", "matthews_correlation", "share"]
    assert scores["pets"].merged["share"] == pytest.approx(float(family.logits("pets").argmax(-1).double().mean()))
    assert list(scores["three"].merged) == ["accuracy"]
    combined = hf_fda.evaluate(family.merged, {"three": data["three"]}, evaluate.combine([Share()]), **QUIET)
    assert list(combined["three"].merged) == ["share"]


def test_a_metric_that_fails_is_named(family: Family) -> None:
    class Failing:
        name = "failing"

        def compute(self, **_: Any) -> float:
            raise KeyError("no")

    with pytest.raises(RunError, match="metric 'failing' fails"):
        hf_fda.evaluate(family.merged, {"three": rows([0] * 5)}, Failing(), **QUIET)
    assert not (family.merged.folder / SCORES).exists()


def test_images_are_scored(tmp_path: Path) -> None:
    base, processor = t.ViTModel(t.ViTConfig(**IMAGE)), t.ViTImageProcessor(size={"height": 16, "width": 16})
    save(tmp_path / "base", base, processor)
    model = t.ViTForImageClassification(t.ViTConfig(**IMAGE, num_labels=4))
    model.vit.load_state_dict(fine_tune(base, 1).state_dict(), strict=False)
    save(tmp_path / "task", model, processor)
    merged = merge(tmp_path / "base", {"task": tmp_path / "task"}, "linear", tmp_path / "merged")
    images = drawn(0, 255, 6, 16, 16, 3).astype(np.uint8)
    data = datasets.Dataset.from_list([{"image": {"bytes": png(own), "path": None}, "label": 1} for own in images])
    data = data.cast_column("image", datasets.Image())
    scores = hf_fda.evaluate(merged, {"task": data}, batch_size=4, **QUIET)
    with torch.no_grad():
        said = merged.load("task")(**processor(list(images), return_tensors="pt")).logits.argmax(-1)
    assert scores["task"].merged == {"accuracy": pytest.approx(float((said == 1).double().mean()))}
    assert scores["task"].modality == "image-classification"


def png(pixels: Any) -> bytes:
    import io

    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


def test_a_merged_adapter_is_scored_on_its_base_under_its_heads(tmp_path: Path) -> None:
    tokenizer = wordpiece(tmp_path / "words", WORDS)
    model = bert_for(t.BertForSequenceClassification, num_labels=3)
    base, adapters = save(tmp_path / "base", model, tokenizer), {}
    for seed, task in enumerate(("one", "two")):
        torch.manual_seed(seed)
        lora = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
        adapters[task] = tmp_path / task
        get_peft_model(bert_for(t.BertForSequenceClassification, num_labels=3), lora).save_pretrained(adapters[task])
    merged = merge(base, adapters, "task_arithmetic", tmp_path / "merged", as_adapter=True)
    data = {task: rows([0, 1, 2, 1, 0]) for task in adapters}
    scores = hf_fda.evaluate(merged, data, individual=True, **QUIET)
    known, inputs = torch.tensor([0, 1, 2, 1, 0]), tokenizer(TEXTS, padding=True, return_tensors="pt")
    for task in adapters:
        with torch.no_grad():
            said = merged.load(task)(**inputs).logits.argmax(-1)
        assert scores[task].merged == {"accuracy": pytest.approx(float((said == known).double().mean()))}
        assert set(scores[task].individual or {}) == {"accuracy"}


# -- models that write ----------------------------------------------------------------------------------------------


@pytest.fixture
def writer(tmp_path: Path) -> hf_fda.Merged:
    tokenizer = bpe(pad_token=None)
    base = llama(len(tokenizer), tokenizer)
    folder = save(tmp_path / "base", base, tokenizer)
    sources = {name: save(tmp_path / name, fine_tune(base, seed), tokenizer) for seed, name in enumerate("ab")}
    return merge(folder, sources, "linear", tmp_path / "merged")


def test_perplexity_is_that_of_every_token_that_is_predicted(writer: hf_fda.Merged) -> None:
    tokenizer, model = t.AutoTokenizer.from_pretrained(writer.folder), writer.load()
    scores = hf_fda.evaluate(writer, {"a": TEXTS, "free": TEXTS[:2]}, batch_size=2, **QUIET)
    for task, texts in {"a": TEXTS, "free": TEXTS[:2]}.items():
        total, count = 0.0, 0
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert scores[task].merged == {"perplexity": pytest.approx(math.exp(total / count), rel=1e-5)}
    assert scores["a"].modality == "text-generation"
    alone = hf_fda.evaluate(writer, {"a": TEXTS}, individual=True, **QUIET)["a"]
    assert alone.individual is not None and alone.individual != alone.merged


def test_what_a_language_model_writes_on_prompts_is_compared_with_targets(writer: hf_fda.Merged) -> None:
    tokenizer, model = t.AutoTokenizer.from_pretrained(writer.folder), writer.load()

    def written(ids: list[int]) -> str:
        new = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(ids) :]
        return str(tokenizer.decode(new, skip_special_tokens=True))

    data, right = [], []
    for number, text in enumerate(TEXTS):
        target = written(tokenizer(text)["input_ids"]) if number else "no"
        data.append({"prompt": text, "completion": target})
        alone, joined = (tokenizer(own)["input_ids"] for own in (text, text + target))
        start = common(alone, joined)  # the last letters of a prompt may be one token with the first of the target
        right.append(written(joined[:start]).strip() == tokenizer.decode(joined[start:]).strip())
    settings = {"max_new_tokens": 6, "batch_size": 3}
    scores = hf_fda.evaluate(writer, {"a": data}, ["exact_match", "perplexity"], **settings, **QUIET)
    assert list(scores["a"].merged) == ["exact_match", "perplexity"]
    assert 0 < sum(right) < 5 and scores["a"].merged["exact_match"] == pytest.approx(sum(right) / 5)
    with pytest.raises(InputError, match="compared with the target of a prompt"):
        hf_fda.evaluate(writer, {"a": TEXTS}, "exact_match", **QUIET)


@pytest.fixture
def rewriter(tmp_path: Path) -> hf_fda.Merged:
    tokenizer = bpe()
    torch.manual_seed(0)
    settings = T5 | {"vocab_size": len(tokenizer), "decoder_start_token_id": tokenizer.pad_token_id}
    base = t.T5ForConditionalGeneration(t.T5Config(**settings, **ids_of(tokenizer))).eval()
    folder = save(tmp_path / "base", base, tokenizer)
    source = save(tmp_path / "task", fine_tune(base, 1, 0.5), tokenizer)
    return merge(folder, {"task": source}, "linear", tmp_path / "merged")


def test_what_an_encoder_decoder_writes_is_compared_with_targets(rewriter: hf_fda.Merged) -> None:
    tokenizer, model = t.AutoTokenizer.from_pretrained(rewriter.folder), rewriter.load().eval()
    data = []
    for number, text in enumerate(TEXTS):
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        written = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0]
        said = tokenizer.decode(written, skip_special_tokens=True)
        data.append({"from": text, "to": "no" if number == 1 else said})
    given = {"task": {"path": data, "columns": ["from"], "label": "to"}}
    scores = hf_fda.evaluate(rewriter, given, max_new_tokens=5, batch_size=2, **QUIET)
    assert scores["task"].merged == {"exact_match": pytest.approx(4 / 5)}
    likely = hf_fda.evaluate(rewriter, given, "perplexity", **QUIET)["task"].merged["perplexity"]
    total, count = 0.0, 0
    for row in data:
        inputs = tokenizer(row["from"], return_tensors="pt", return_token_type_ids=False)
        ids = tokenizer(text_target=row["to"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += float(model(**inputs, labels=ids).loss) * ids.shape[1]
        count += ids.shape[1]
    assert likely == pytest.approx(math.exp(total / count), rel=1e-5)
    with pytest.raises(InputError, match="do not say what is to be written"):
        hf_fda.evaluate(rewriter, {"task": TEXTS}, **QUIET)


def test_any_model_is_scored_alone_and_nothing_is_written_to_it(family: Family) -> None:
    before = sorted(family.sources["three"].iterdir())
    scores = hf_fda.evaluate(family.sources["three"], {"any": rows([0, 1, 2, 1, 0])}, **QUIET)
    said = family.logits("three", alone=True).argmax(-1)
    expected = float((said == torch.tensor([0, 1, 2, 1, 0])).double().mean())
    assert scores["any"].merged == {"accuracy": pytest.approx(expected)}
    assert sorted(family.sources["three"].iterdir()) == before


def test_answers_that_are_no_numbers_are_an_error_not_a_score(tmp_path: Path) -> None:
    model = bert_for(t.BertForSequenceClassification, num_labels=2)
    with torch.no_grad():
        model.classifier.bias.fill_(math.nan)
    save(tmp_path / "model", model, wordpiece(tmp_path / "words", WORDS))
    with pytest.raises(RunError, match="not all finite numbers"):
        hf_fda.evaluate(tmp_path / "model", {"any": rows([0] * 5)}, **QUIET)


def test_the_type_of_the_weights_may_be_another_while_they_are_scored(family: Family) -> None:
    data = {"far": rows([0.5, 1.0, -1.0, 2.0, 0.0])}
    whole, half = (hf_fda.evaluate(family.merged, data, "mse", dtype=dtype, **QUIET) for dtype in ("auto", "bfloat16"))
    assert half["far"].merged["mse"] == pytest.approx(whole["far"].merged["mse"], rel=0.1)
    assert half["far"].merged != whole["far"].merged


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ({"pest": rows(["cat"] * 5)}, {}, "no task 'pest': did you mean 'pets'"),
        ({"pets": rows(["cow"] * 5)}, {}, r"row 0, column 'label', has the label 'cow'.*Known: cat, dog"),
        ({"pets": rows([0, 1, 0, 1, 2])}, {}, r"row 4, column 'label', has the label 2.*\(0 to 1\)"),
        ({"pets": rows([0, 1, 0, 1, -1])}, {}, "row 4, column 'label', has no label"),
        ({"pets": rows([0] * 5, "mark")}, {}, r"which column says what is right\? It has 'text' \(text\), 'mark'"),
        ({"pets": {"path": rows([0] * 5), "label": "lable"}}, {}, "no column 'lable' of labels: did you mean 'label'"),
        ({"pets": []}, {}, "there are no rows in it"),
        ({"pets": [{"text": " ", "label": 0}]}, {}, "none of 1 rows has anything in it"),
        ({"pets": {"path": rows([0] * 5), "lable": "x"}}, {}, "unknown key 'lable'"),
        ({"far": rows(["near"] * 5)}, {}, "'near', where a number was expected"),
        ({"far": rows([math.nan] * 5)}, {}, r"1 finite number\(s\) were expected"),
        ({"tags": rows([0] * 5)}, {}, "where a list of labels, or of 0 and 1, was expected"),
        ({"pets": rows([0] * 5)}, {"metrics": "acuracy"}, "no metric 'acuracy': did you mean 'accuracy'"),
        ({"pets": rows([0] * 5)}, {"metrics": "mse"}, "'mse' is computed from values, and its model gives labels"),
        ({"pets": rows([0] * 5)}, {"metrics": ["f1", "f1"]}, "'f1' is asked for twice"),
        ({"pets": rows([0] * 5)}, {"metrics": 3}, "not int"),
        ({"pets": rows([0] * 5)}, {"metrics": {"three": "f1"}}, "no data of a task 'three'"),
        ({"pets": rows([0] * 5)}, {"batch_size": 0}, "batch_size must be a whole number"),
        ({"pets": rows([0] * 5)}, {"dtype": "float31"}, "dtype 'float31'"),
        ({"pets": rows([0] * 5)}, {"base": "elsewhere"}, "base is for merged adapters"),
        ({}, {}, "with one task at least"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(
    family: Family, data: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        hf_fda.evaluate(family.merged, data, **settings, **QUIET)
    assert not (family.merged.folder / SCORES).exists()


def test_models_that_are_not_scored_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "model", bert_for(t.BertForMaskedLM), wordpiece(tmp_path / "words", WORDS))
    with pytest.raises(InputError, match="words that are masked, which are not scored"):
        hf_fda.evaluate(tmp_path / "model", {"any": TEXTS}, **QUIET)


def test_a_fine_tune_that_is_gone_is_named(family: Family) -> None:
    family.sources["pets"].rename(family.base.parent / "moved")
    with pytest.raises(InputError, match=r"fine-tune of 'pets' cannot be scored .*leave individual out"):
        hf_fda.evaluate(family.merged, {"pets": rows([0] * 5)}, individual=True, **QUIET)


# -- the file and the card ------------------------------------------------------------------------------------------


def test_scores_are_kept_beside_those_of_other_tasks_until_the_weights_change(family: Family) -> None:
    pets, three = rows([0, 1, 0, 1, 0]), rows([0, 1, 2, 1, 0])
    one = hf_fda.evaluate(family.merged, {"pets": pets}, individual=True, **QUIET)
    two = hf_fda.evaluate(family.merged, {"three": three}, **QUIET)
    assert two["pets"] == one["pets"]
    assert Scores.read(family.merged.folder / SCORES) == two == family.merged.scores
    again = hf_fda.evaluate(family.merged, {"pets": pets}, **QUIET)
    assert again["pets"] == one["pets"]  # the fine-tune's score is kept on the same rows
    other = hf_fda.evaluate(family.merged, {"pets": pets[1:]}, **QUIET)
    assert other["pets"].individual is None and set(other.tasks) == {"pets", "three"}
    merge(family.base, family.sources, "linear", family.merged.folder)
    assert "## Scores" in card(family)
    merge(family.base, family.sources, "task_arithmetic", family.merged.folder)
    assert not (family.merged.folder / SCORES).exists()
    assert family.merged.scores is None
    assert "## Scores" not in card(family) and "states no scores" in card(family)


def card(family: Family) -> str:
    return (family.merged.folder / "README.md").read_text(encoding="utf-8")


def test_the_card_has_a_table_and_metadata_that_the_library_reads(family: Family, tmp_path: Path) -> None:
    before = card(family)
    assert "model-index" not in before and "states no scores" in before
    file = tmp_path / "pets.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows([0, 1, 0, 1, 0])))
    scores = hf_fda.evaluate(family.merged, {"pets": str(file)}, individual=True, **QUIET)
    text = card(family)
    assert str(tmp_path) not in text
    (row,) = scores.rows()
    assert f"| {' | '.join(row)} |" in text
    data = ModelCard(text).data
    assert data.eval_results is not None
    (result,) = data.eval_results
    assert (result.task_name, result.task_type, result.metric_type) == ("pets", "text-classification", "accuracy")
    assert result.metric_value == scores["pets"].merged["accuracy"]
    assert result.metric_args == {"individual": (scores["pets"].individual or {})["accuracy"]}
    assert not (family.merged.folder / ".eval_results").exists()  # a file has no id on the Hub
    made, now = (own.split("---\n", 2)[2] for own in (before, text))
    assert made.partition("## Limits")[0] == now.partition("## Scores")[0]


def test_both_forms_of_metadata_name_a_datasets_commit_and_split() -> None:
    on_hub = ScoredData("org/rows", True, 20, "plain", "test", "a" * 40, "f")
    task = TaskScores("text-classification", on_hub, {"accuracy": 0.5, "pearsonr": math.nan}, {"accuracy": 0.75})
    file = ScoredData("x.txt", False, 3)
    two, three = (TaskScores("text-generation", file, {"perplexity": value}) for value in (2.0, 3.0))
    scores = Scores({"one": task, "two": two, "three": three}, "w")
    files = eval_results(scores)
    assert list(files) == [".eval_results/one.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/one.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/rows", "plain", 0.5)
    assert entry.dataset_revision == "a" * 40
    assert entry.notes == "accuracy, 20 rows of split test; fine-tune alone: 0.75"
    (model,) = model_index(scores, "name")
    one, *others = model["results"]
    assert one["dataset"]["revision"] == "a" * 40 and one["dataset"]["split"] == "test"
    assert [metric["type"] for metric in one["metrics"]] == ["accuracy"]
    assert [own["dataset"]["type"] for own in others] == ["x.txt", "x.txt"]
    assert [(own["task"]["name"], own["metrics"][0]["value"]) for own in others] == [("two", 2.0), ("three", 3.0)]
    assert model_index(Scores(), "name") == []


def test_scores_are_a_table_and_survive_their_file(tmp_path: Path) -> None:
    data = ScoredData("a<b", False, 1200)
    scores = Scores({"t": TaskScores("text-classification", data, {"pearsonr": math.nan, "mse": 0.5}, {"mse": 0.25})})
    assert repr(scores).splitlines()[0].split("  ")[0] == "task"
    assert "undefined" in str(scores) and "0.2500" in str(scores) and "1,200" in str(scores)
    assert "a&lt;b" in scores._repr_html_() and scores._repr_html_().count("<tr>") == 3
    path = tmp_path / SCORES
    path.write_text(scores.text())
    assert Scores.read(path).text() == scores.text()
    path.write_text("{}")
    with pytest.raises(RunError, match="damaged"):
        Scores.read(path)


def test_a_card_that_was_changed_by_hand_is_left_until_it_is_asked_for(
    family: Family, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = family.merged.folder / "README.md"
    path.write_text(card(family) + "\nMine.\n")
    hf_fda.evaluate(family.merged, {"three": rows([0] * 5)}, **QUIET)
    assert "changed by hand" in caplog.text
    assert "Mine." in card(family) and "## Scores" not in card(family)
    assert main(["card", str(family.merged.folder)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert "Mine." not in card(family) and "## Scores" in card(family)


def test_a_card_is_remade_as_it_was(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = card(family)
    (family.merged.folder / "README.md").unlink()
    assert main(["card", str(family.merged.folder)]) == 0
    assert card(family) == before
    (family.merged.folder / RECORD).unlink()
    assert main(["card", str(family.merged.folder)]) == 2
    assert f"no {RECORD} in it" in capsys.readouterr().err


# -- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows([0, 1, 0, 1, 0], "mark")) for name in ("train", "test")}
    ).save_to_disk(tmp_path / "rows")
    words = ["--label", "pets=mark", "--columns", "pets=text", "--metric", "accuracy", "--metric", "pets=f1"]
    task = ["--task", f"pets={tmp_path / 'rows'}:test"]
    assert main(["evaluate", str(family.merged.folder), *task, *words, "--individual", "--device", "cpu"]) == 0
    scores = Scores.read(family.merged.folder / SCORES)
    assert capsys.readouterr().out == f"{scores}\n"
    assert list(scores["pets"].merged) == ["accuracy", "f1"] == list(scores["pets"].individual or {})
    assert scores["pets"].data.split == "test"
    assert main(["evaluate", str(family.merged.folder), *task, "--metric", "pest=f1"]) == 2
    assert "'pest' has no rows: did you mean 'pets'" in capsys.readouterr().err
    assert main(["evaluate", str(family.merged.folder), *task, "--label", "pest=mark"]) == 2
    assert main(["evaluate", str(family.merged.folder), "--task", "pets"]) == 2
    assert "--task pets: write it as --task TASK=..." in capsys.readouterr().err


def test_only_a_sample_of_rows_is_scored_the_same_for_the_same_seed(family: Family) -> None:
    data = {"three": rows([0, 1, 2, 1, 0])}

    def found(seed: int) -> ScoredData:
        return hf_fda.evaluate(family.merged, data, rows=3, seed=seed, save=False, **QUIET)["three"].data

    assert found(0) == found(0)
    assert found(0).rows == 3 and len({found(seed).fingerprint for seed in range(3)}) > 1
    assert not (family.merged.folder / SCORES).exists()
