"""Rows of real data: where they are found, which columns are read, and how each kind of model takes them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as t
from conftest import GROUPED, IMAGE, T5, TEXT, fine_tune
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.utils.data import DataLoader
from vocabularies import bpe, ids_of, llama, save, tuned, wordpiece

from hf_fda.data.opening import OpenedData, open_data
from hf_fda.data.request import Reading, said_on_command_line
from hf_fda.data.rows import TaskRows
from hf_fda.data.writing import with_written_targets
from hf_fda.errors import InputError
from hf_fda.inputs import Inputs, open_inputs

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
TEXTS = ["the quick brown fox", "the lazy dog", "fox", "a quick dog jumps over the lazy fox", "over the dog"]
PAIRS = [{"premise": a, "hypothesis": b, "label": 0} for a, b in zip(TEXTS, reversed(TEXTS), strict=True)]
ROWS = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)]
MARKED = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHAT = [
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "a dog"},
    {"role": "user", "content": "jumps"},
    {"role": "assistant", "content": "over"},
]


class Model:
    """A model saved as base and as the only source, 'task', with its tokenizer or image processor."""

    def __init__(self, folder: Path, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.base = save(folder / "base", model, processor)
        self.source = save(folder / "source", fine_tune(model, seed=1), processor)
        self.tuned = type(model).from_pretrained(self.source).eval()

    @property
    def inputs(self) -> Inputs:
        return open_inputs(self.base, {"task": self.source})

    def open(self, data: Any, **reading: Any) -> OpenedData:
        return open_data({"task": data}, self.inputs, Reading(**reading))["task"]

    def encode(self, data: Any, **reading: Any) -> TaskRows:
        return self.open(data, **reading).encode()


@pytest.fixture(autouse=True)
def _cache_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps out of the user's cache what is read through `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """A BERT tokenizer of 65 tokens."""
    return wordpiece(tmp_path / "words", WORDS)


@pytest.fixture
def classifier(tmp_path: Path, tokenizer: Any) -> Model:
    return Model(tmp_path, bert_for(t.BertForSequenceClassification, num_labels=2), tokenizer)


@pytest.fixture
def writer(tmp_path: Path) -> Model:
    """A causal language model without a pad token in its configuration."""
    tokenizer = bpe(pad_token=None)
    return Model(tmp_path, llama(len(tokenizer), tokenizer), tokenizer)


@pytest.fixture
def rewriter(tmp_path: Path) -> Model:
    """An encoder-decoder."""
    tokenizer = bpe()
    torch.manual_seed(0)
    settings = T5 | {"vocab_size": len(tokenizer), "decoder_start_token_id": tokenizer.pad_token_id}
    return Model(tmp_path, t.T5ForConditionalGeneration(t.T5Config(**settings, **ids_of(tokenizer))), tokenizer)


def bert_for(model_class: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return model_class(t.BertConfig(**TEXT, max_position_embeddings=40, pad_token_id=0, **settings)).eval()


def lists(rows: TaskRows, name: str = "input_ids") -> list[list[int]]:
    return [row[name].tolist() for row in rows.inputs]


def counted(rows: TaskRows, number: int = 0) -> list[int]:
    """The tokens of a row that are predicted, told from the positions that count."""
    ids, scored = rows.inputs[number]["input_ids"], (rows.scored or [])[number]
    return ids[1:][scored[:-1]].tolist()


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- where rows are found -------------------------------------------------------------------------------------------


def as_table(path: Path, delimiter: str) -> Path:
    lines = [f"text{delimiter}label", *(f'"{row["text"]}"{delimiter}{row["label"]}' for row in ROWS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def as_parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def as_lines(folder: Path) -> Path:
    (folder / "rows.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return folder / "rows.txt"


def as_json(folder: Path, content: Any) -> Path:
    (folder / "rows.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder / "rows.json"


def as_saved(folder: Path, dataset: Any) -> Path:
    dataset.save_to_disk(folder / "saved")
    return folder / "saved"


def as_files(folder: Path) -> Path:
    (folder / "files").mkdir()
    write_lines(folder / "files" / "train.jsonl", ROWS)
    write_lines(folder / "files" / "test.jsonl", ROWS[:1])
    return folder / "files"


def whole() -> Any:
    return datasets.Dataset.from_list(ROWS)


WAYS: dict[str, Callable[[Path], Any]] = {
    "jsonl": lambda folder: write_lines(folder / "rows.jsonl", ROWS),
    "json of lines": lambda folder: write_lines(folder / "rows.json", ROWS),
    "json": lambda folder: as_json(folder, ROWS),
    "json under a key": lambda folder: as_json(folder, {"data": ROWS}),
    "csv": lambda folder: as_table(folder / "rows.csv", ","),
    "tsv": lambda folder: str(as_table(folder / "rows.tsv", "\t")),
    "parquet": as_parquet,
    "txt": as_lines,
    "saved": lambda folder: as_saved(folder, whole()),
    "saved with splits": lambda folder: as_saved(folder, datasets.DatasetDict(test=whole().take(1), train=whole())),
    "folder": as_files,
    "mapping": lambda folder: {"path": as_files(folder), "split": "train", "columns": ["text"]},
    "dataset": lambda _: whole(),
    "splits": lambda _: datasets.DatasetDict(test=whole().take(1), train=whole()),
    "only split": lambda _: datasets.DatasetDict(test=whole()),
    "stream": lambda _: whole().to_iterable_dataset(),
    "stream without types": lambda _: datasets.IterableDataset.from_generator(lambda: iter(ROWS)),
    "texts": lambda _: TEXTS,
    "frame": lambda _: whole().to_pandas(),
    "mappings": lambda _: ROWS,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_rows_are_found_everywhere(way: str, classifier: Model, tmp_path: Path) -> None:
    rows = classifier.encode(WAYS[way](tmp_path))
    assert lists(rows) == [classifier.processor(text)["input_ids"] for text in TEXTS]
    assert rows.fingerprint == classifier.encode(TEXTS).fingerprint


@pytest.mark.parametrize("way", ["jsonl", "parquet", "saved with splits", "folder"])
def test_a_record_finds_the_rows_again(way: str, classifier: Model, tmp_path: Path) -> None:
    opened = classifier.open(WAYS[way](tmp_path), rows=3)
    rows = opened.encode()
    record = json.loads(json.dumps(opened.recorded(rows)))
    assert record["rows"] == 3 and record["columns"] == ["text"] and record["max_length"] == 40
    again = classifier.open(record)
    assert again.encode().fingerprint == rows.fingerprint == record["fingerprint"]
    assert again.record == opened.record


def test_rows_that_were_changed_are_refused_by_their_fingerprint(classifier: Model, tmp_path: Path) -> None:
    opened = classifier.open(write_lines(tmp_path / "rows.jsonl", ROWS))
    record = opened.recorded(opened.encode())
    write_lines(tmp_path / "rows.jsonl", ROWS[:-1])
    with pytest.raises(InputError, match="leave the fingerprint out"):
        classifier.encode(record)
    del record["fingerprint"]
    assert len(classifier.encode(record)) == 4


def test_rows_in_memory_have_to_be_given_again(classifier: Model) -> None:
    record = classifier.open(whole()).record
    assert record["path"] == "Dataset of 5, in memory only"
    with pytest.raises(InputError, match="give these rows again"):
        classifier.open(record)


def test_a_sample_depends_on_the_seed_alone(classifier: Model) -> None:
    texts = [f"{a} {b}" for a in WORDS for b in WORDS]
    found = [lists(classifier.encode(texts, rows=8, seed=seed)) for seed in (0, 0, 1)]
    every = lists(classifier.encode(texts))
    assert found[0] == found[1] != found[2]
    places = [every.index(row) for row in found[0]]
    assert places == sorted(set(places)) and places != list(range(8))
    assert classifier.open(texts, rows=8).count == 8 and classifier.open(texts).count == 64


def test_of_a_stream_the_first_rows_are_taken(classifier: Model) -> None:
    opened = classifier.open(whole().to_iterable_dataset(), rows=2)
    assert opened.count == 2 and lists(opened.encode()) == lists(classifier.encode(TEXTS[:2]))
    assert classifier.open(whole().to_iterable_dataset()).count is None


def test_opening_reads_no_more_rows_than_it_has_to(classifier: Model) -> None:
    asked = []

    class Counted(list[str]):
        def __getitem__(self, number: Any) -> Any:
            asked.append(number)
            return super().__getitem__(number)

    opened = classifier.open(Counted(["fox"] * 1000))
    assert max(asked) < 100
    assert len(opened.encode()) == 1000


def test_words_of_a_command_line() -> None:
    said = said_on_command_line(["a=rows.jsonl", "b=org/b"], ["b=one,two"], ["b=test"])
    assert said == {"a": {"path": "rows.jsonl"}, "b": {"path": "org/b", "columns": ["one", "two"], "split": "test"}}
    for words in ((["rows.jsonl"],), (["a=x", "a=y"],), (["a=x"], ["b=text"])):
        with pytest.raises(InputError, match="--"):
            said_on_command_line(*words)


# -- texts ----------------------------------------------------------------------------------------------------------


def test_pairs_are_told_apart_by_their_types(classifier: Model) -> None:
    rows = classifier.encode(PAIRS)
    expected = [classifier.processor(row["premise"], row["hypothesis"]) for row in PAIRS]
    assert lists(rows) == [own["input_ids"] for own in expected]
    assert lists(rows, "token_type_ids") == [own["token_type_ids"] for own in expected]
    assert {0, 1} == set(lists(rows, "token_type_ids")[0])
    swapped = classifier.encode({"path": PAIRS, "columns": ["hypothesis", "premise"]})
    assert lists(swapped)[0] == classifier.processor(PAIRS[0]["hypothesis"], PAIRS[0]["premise"])["input_ids"]


def test_long_texts_are_cut_and_counted(classifier: Model, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["fox " * 60, "fox " * 38, "fox"]
    with caplog.at_level(logging.WARNING, "hf_fda"):
        rows = classifier.encode(texts)
    assert "1 of 3 texts are cut" in caplog.text
    assert [len(ids) for ids in lists(rows)] == [40, 40, 3]
    sep = classifier.processor.sep_token_id
    assert all(ids[-1] == sep for ids in lists(rows))
    assert [len(ids) for ids in lists(classifier.encode(texts, max_length=9))] == [9, 9, 3]
    assert [len(ids) for ids in lists(classifier.encode({"path": texts, "max_length": 5}, max_length=9))] == [5, 5, 3]


def test_empty_texts_are_left_out_and_counted(classifier: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_fda"):
        rows = classifier.encode([{"text": None}, {"text": "fox"}, {"text": "  "}, {"text": "dog"}])
    assert len(rows) == 2 and "2 of 4 rows have nothing in them" in caplog.text
    with pytest.raises(InputError, match="none of 2 rows has anything in it"):
        classifier.open([{"text": ""}, {"text": " "}])


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"num_labels": 3}, "labels"),
        ({"num_labels": 1}, "values"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "flags"),
        ({"num_labels": 3, "problem_type": "regression"}, "values"),
    ],
)
def test_what_logits_mean_follows_from_the_configuration(
    settings: Mapping[str, Any], kind: str, tmp_path: Path, tokenizer: Any
) -> None:
    opened = Model(tmp_path, bert_for(t.BertForSequenceClassification, **settings), tokenizer).open(TEXTS)
    rows = opened.encode()
    assert opened.kind == rows.kind == kind and rows.scored is None


def test_words_that_are_labelled_count_but_for_special_tokens(tmp_path: Path, tokenizer: Any) -> None:
    model = Model(tmp_path, bert_for(t.BertForTokenClassification, num_labels=3), tokenizer)
    rows = model.encode([{"tokens": ["the", "fx"], "ner_tags": [0, 1]}, {"tokens": ["dog"], "ner_tags": [2]}])
    expected = tokenizer(["the", "fx"], is_split_into_words=True)["input_ids"]
    assert lists(rows)[0] == expected and len(expected) == 5
    assert rows.scored is not None and rows.scored[0].tolist() == [False, True, True, True, False]
    assert lists(model.encode(["the dog"])) == [tokenizer("the dog")["input_ids"]]


def test_masked_language_models_see_unmasked_text(tmp_path: Path, tokenizer: Any) -> None:
    model = Model(tmp_path, bert_for(t.BertForMaskedLM), tokenizer)
    rows = model.encode(TEXTS)
    assert rows.kind == "tokens" and not any(tokenizer.mask_token_id in ids for ids in lists(rows))
    assert rows.scored is not None and rows.scored[2].tolist() == [False, True, False]


@pytest.mark.parametrize("head", ["classes", "causal", "masked", "seq2seq"])
def test_rows_in_a_batch_have_the_logits_of_single_rows(head: str, tmp_path: Path, request: Any) -> None:
    fixture = {"classes": "classifier", "causal": "writer", "seq2seq": "rewriter"}.get(head)
    if fixture is None:
        own = request.getfixturevalue("tokenizer")
        model = Model(tmp_path, bert_for(t.BertForMaskedLM), own)
    else:
        model = request.getfixturevalue(fixture)
    target = {"path": [{"article": a, "summary": b} for a, b in zip(TEXTS, reversed(TEXTS), strict=True)]}
    rows = model.encode(target if head == "seq2seq" else TEXTS)
    seen = []
    with torch.no_grad():
        for numbers, batch in rows.batches(3):
            logits = model.tuned(**batch.inputs).logits
            for place, number in enumerate(numbers):
                single = rows.batch([number])
                own = model.tuned(**single.inputs).logits[0]
                theirs = logits[place]
                if batch.scored is not None and single.scored is not None:
                    own, theirs = own[single.scored[0]], theirs[batch.scored[place]]
                torch.testing.assert_close(theirs, own, atol=1e-5, rtol=1e-5)
                seen.append(number)
    assert sorted(seen) == list(range(len(TEXTS)))


def test_roberta_has_fewer_positions_than_its_table(tmp_path: Path) -> None:
    tokenizer = bpe()
    settings = TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 40} | ids_of(tokenizer)
    torch.manual_seed(0)
    model = Model(tmp_path, t.RobertaForSequenceClassification(t.RobertaConfig(**settings)), tokenizer)
    rows = model.encode(["fox " * 60])
    assert len(lists(rows)[0]) == 40 - tokenizer.pad_token_id - 1
    with torch.no_grad():
        model.tuned(**rows.batch([0]).inputs)


# -- causal language models -----------------------------------------------------------------------------------------


def test_the_last_position_predicts_nothing(writer: Model) -> None:
    rows = writer.encode(TEXTS)
    assert rows.kind == "tokens" and rows.scored is not None
    assert [own.tolist() for own in rows.scored] == [[True] * (len(ids) - 1) + [False] for ids in lists(rows)]
    assert counted(rows) == lists(rows)[0][1:]
    batch = rows.batch([1, 3])
    assert batch.scored is not None and batch.scored.sum() == sum(len(lists(rows)[row]) - 1 for row in (1, 3))


@pytest.mark.parametrize(
    "data",
    [
        [{"prompt": "the quick", "completion": " brown fox"}],
        {"path": [{"a": "the quick", "b": " brown fox"}], "prompt": "a", "target": "b"},
    ],
)
def test_of_a_prompt_only_what_follows_counts(data: Any, writer: Model) -> None:
    rows = writer.encode(data)
    assert lists(rows) == [writer.processor("the quick brown fox")["input_ids"]]
    assert counted(rows) == writer.processor(" brown fox")["input_ids"]


def test_prompts_that_fill_the_whole_text_are_left_out(writer: Model) -> None:
    rows = writer.encode([{"prompt": "fox " * 40, "completion": "dog"}, {"prompt": "fox", "completion": " dog"}],
                         max_length=20)  # fmt: skip
    assert len(rows) == 1 and counted(rows) == writer.processor(" dog")["input_ids"]


def test_instructions_without_a_chat_template_stand_on_lines(writer: Model) -> None:
    rows = writer.encode([{"instruction": "the fox", "input": "a dog", "output": "over"}])
    assert lists(rows) == [writer.processor("the fox\na dog\nover")["input_ids"]]
    assert counted(rows) == writer.processor("over")["input_ids"]


@pytest.mark.parametrize("named", [MARKED, UNMARKED])
def test_of_a_conversation_the_assistant_counts_where_the_template_says_it(named: str, tmp_path: Path) -> None:
    tokenizer = bpe(["<user>", "<assistant>"], chat_template=named)
    model = Model(tmp_path, llama(len(tokenizer), tokenizer), tokenizer)
    said = "<user>the fox<assistant>a dog</s><user>jumps<assistant>over</s>"
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in CHAT]
    for row in ({"messages": CHAT}, {"conversations": sharegpt}):
        rows = model.encode([row])
        assert lists(rows) == [tokenizer(said)["input_ids"]]
        answers = tokenizer("a dog</s>over</s>")["input_ids"]
        assert counted(rows) == (answers if named == MARKED else lists(rows)[0][1:])


def test_answers_follow_on_prompts_through_the_chat_template(tmp_path: Path) -> None:
    tokenizer = bpe(["<user>", "<assistant>"], chat_template=UNMARKED)
    model = Model(tmp_path, llama(len(tokenizer), tokenizer), tokenizer)
    asked, answer = {"role": "user", "content": "the fox"}, {"role": "assistant", "content": "a dog"}
    for row in ({"instruction": "the fox", "output": "a dog"}, {"prompt": [asked], "completion": [answer]}):
        rows = model.encode([row])
        assert lists(rows) == [tokenizer("<user>the fox<assistant>a dog</s>")["input_ids"]]
        assert counted(rows) == tokenizer("a dog</s>")["input_ids"]
    parts = model.encode([{"instruction": "the fox", "input": "jumps", "output": "a dog"}])
    assert lists(parts) == [tokenizer("<user>the fox\n\njumps<assistant>a dog</s>")["input_ids"]]


def test_conversations_need_a_chat_template(writer: Model) -> None:
    with pytest.raises(InputError, match="no chat template"):
        writer.open([{"messages": CHAT}])


# -- encoder-decoders -----------------------------------------------------------------------------------------------


def test_the_decoder_sees_its_target_one_position_late(rewriter: Model) -> None:
    rows = rewriter.encode([{"document": "the quick brown fox", "summary": "the fox"}])
    target = rewriter.processor("the fox")["input_ids"]
    assert lists(rows) == [rewriter.processor("the quick brown fox")["input_ids"]]
    assert lists(rows, "decoder_input_ids") == [[rewriter.model.config.decoder_start_token_id, *target[:-1]]]
    assert rows.scored is not None and rows.scored[0].tolist() == [True] * len(target)


@pytest.mark.parametrize("named", ["labels", "decoder_input_ids"])
def test_encoded_targets_are_those_of_texts(named: str, rewriter: Model) -> None:
    texts = rewriter.encode([{"document": "the quick brown fox", "summary": "the fox"}])
    pad, target = rewriter.processor.pad_token_id, rewriter.processor("the fox")["input_ids"]
    decoder = {"labels": [*target, -100, -100], "decoder_input_ids": [pad, *target[:-1], pad, pad]}[named]
    ids = [*lists(texts)[0], pad, pad]
    row = {"input_ids": ids, "attention_mask": [int(own != pad) for own in ids], named: decoder}
    assert rewriter.encode([row]).fingerprint == texts.fingerprint


def test_what_a_decoder_starts_with_has_to_be_known(tmp_path: Path) -> None:
    tokenizer = bpe()
    config = t.T5Config(**T5 | {"vocab_size": len(tokenizer)}, **ids_of(tokenizer))
    model = Model(tmp_path, t.T5ForConditionalGeneration(config), tokenizer)
    for place in (model.base, model.source):
        (place / "generation_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="no decoder_start_token_id"):
        model.open(TEXTS)
    (model.base / "generation_config.json").write_text('{"decoder_start_token_id": 5}', encoding="utf-8")
    rows = model.encode([{"document": "fox", "summary": "dog"}])
    assert lists(rows, "decoder_input_ids")[0][0] == 5


def test_targets_that_are_lacking_are_written_by_the_source(rewriter: Model) -> None:
    opened = rewriter.open(TEXTS)
    rows = opened.encode()
    assert opened.lacks_targets and rows.scored is None and "decoder_input_ids" not in rows.inputs[0]
    written = with_written_targets(rewriter.tuned, rows, max_new_tokens=6, batch_size=2)
    assert written.scored is not None and written.fingerprint != rows.fingerprint
    end = rewriter.tuned.generation_config.eos_token_id
    for number, row in enumerate(written.inputs):
        decoder = row["decoder_input_ids"]
        assert 1 <= len(decoder) <= 6 and end not in decoder[1:] and len(written.scored[number]) == len(decoder)
        with torch.no_grad():
            predicted = rewriter.tuned(**written.batch([number]).inputs).logits[0].argmax(-1)
        assert predicted[:-1].tolist() == decoder[1:].tolist()  # greedy: what it wrote is what it predicts
        assert len(decoder) == 6 or predicted[-1] == end


# -- images ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def painter(tmp_path: Path) -> Model:
    torch.manual_seed(0)
    processor = t.ViTImageProcessor(size={"height": 16, "width": 16})
    return Model(tmp_path, t.ViTForImageClassification(t.ViTConfig(**IMAGE, num_labels=3)), processor)


def pictures() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        Image.fromarray(torch.randint(0, 255, (20, 24, 3), generator=generator).to(torch.uint8).numpy())
        for _ in range(3)
    ]


def image_files(folder: Path, *classes: str) -> list[Path]:
    paths = []
    for number, picture in enumerate(pictures()):
        own = folder / classes[number] if classes else folder
        own.mkdir(parents=True, exist_ok=True)
        picture.save(own / f"{number}.png")
        paths.append(own / f"{number}.png")
    return paths


IMAGES: dict[str, Callable[[Path], Any]] = {
    "images": lambda _: pictures(),
    "mappings": lambda _: [{"img": picture, "label": 0} for picture in pictures()],
    "dataset": lambda _: datasets.Dataset.from_dict({"image": pictures(), "label": [0, 1, 2]}),
    "names": lambda folder: [str(path) for path in image_files(folder)],
    "names in a file": lambda folder: write_lines(
        folder / "rows.jsonl", [{"image": path.name} for path in image_files(folder)]
    ),
    "folder": lambda folder: image_files(folder / "pictures", "a", "b", "c")[0].parents[1],
    "parquet": lambda folder: [
        datasets.Dataset.from_dict({"image": pictures()}).to_parquet(folder / "rows.parquet"),
        folder / "rows.parquet",
    ][1],
}


@pytest.mark.parametrize("way", IMAGES)
def test_images_are_processed_as_the_source_was_trained(way: str, painter: Model, tmp_path: Path) -> None:
    rows = painter.encode(IMAGES[way](tmp_path))
    assert rows.kind == "labels" and len(rows) == 3
    expected = painter.processor(images=pictures(), return_tensors="pt")["pixel_values"]
    assert torch.equal(rows.batch([0, 1, 2]).inputs["pixel_values"], expected)


def test_grey_images_get_the_colours_that_a_model_takes(painter: Model) -> None:
    rows = painter.encode([picture.convert("L") for picture in pictures()])
    assert rows.inputs[0]["pixel_values"].shape == (3, 16, 16)


# -- encoded rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_of_a_loader_are_taken_as_they_are(side: str, classifier: Model) -> None:
    classifier.processor.padding_side = side

    def collate(rows: Sequence[Mapping[str, Any]]) -> Any:
        texts = [row["text"] for row in rows]
        encoded = classifier.processor(texts, padding=True, return_tensors="pt")
        return {**encoded, "labels": torch.tensor([row["label"] for row in rows])}

    rows = classifier.encode(DataLoader(ROWS, batch_size=2, collate_fn=collate))
    assert rows.fingerprint == classifier.encode(TEXTS).fingerprint


def test_encoded_columns_are_taken_as_they_are(classifier: Model) -> None:
    encoded = whole().map(lambda row: dict(classifier.processor(row["text"], padding="max_length", max_length=12)))
    assert classifier.encode(encoded).fingerprint == classifier.encode(TEXTS).fingerprint


def test_encoded_images_are_taken_as_they_are(painter: Model) -> None:
    pixels = painter.encode(pictures())
    assert painter.encode(list(pixels.inputs)).fingerprint == pixels.fingerprint


def test_labels_of_encoded_rows_say_what_is_predicted(writer: Model) -> None:
    ids = writer.processor("the quick brown fox")["input_ids"]
    rows = writer.encode([{"input_ids": ids, "labels": [-100, -100, *ids[2:]]}])
    assert counted(rows) == ids[2:]
    plain = writer.encode([{"input_ids": ids}])
    assert counted(plain) == ids[1:] and lists(plain, "attention_mask") == [[1] * len(ids)]


def test_encoded_rows_have_to_fit_the_model(classifier: Model) -> None:
    with pytest.raises(InputError, match="token 99, and its vocabulary 99"):
        classifier.open([{"input_ids": [2, 99, 3]}])
    with pytest.raises(InputError, match="41 tokens, and the model takes at most 40"):
        classifier.open([{"input_ids": [2] * 41}])


# -- whose tokenizer ------------------------------------------------------------------------------------------------


def test_an_adapter_without_a_tokenizer_has_that_of_the_base(tmp_path: Path, tokenizer: Any) -> None:
    base = bert_for(t.BertModel)
    save(tmp_path / "base", base, tokenizer)
    torch.manual_seed(1)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    headed = bert_for(t.BertForSequenceClassification, num_labels=3)
    get_peft_model(headed, config).save_pretrained(tmp_path / "adapter")
    inputs = open_inputs(tmp_path / "base", {"task": tmp_path / "adapter"})
    rows = open_data({"task": TEXTS}, inputs)["task"].encode()
    assert rows.kind == "labels" and lists(rows) == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_a_source_has_its_own_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    base = bert_for(t.BertForSequenceClassification)
    save(tmp_path / "base", base, tokenizer)
    cased = t.BertTokenizer(str(tmp_path / "words" / "words.txt"), do_lower_case=False)
    save(tmp_path / "task", fine_tune(base, seed=1), cased)
    inputs = open_inputs(tmp_path / "base", {"task": tmp_path / "task"})
    rows = open_data({"task": ["the Fox"]}, inputs)["task"].encode()
    assert lists(rows) == [cased("the Fox")["input_ids"]] != [tokenizer("the Fox")["input_ids"]]


def test_all_rows_have_the_tokens_that_were_asked_for(tmp_path: Path) -> None:
    own, other = bpe(), bpe(["<fox>"])
    base = llama(len(own), own)
    save(tmp_path / "base", base, own)
    save(tmp_path / "plain", fine_tune(base, seed=1), own)
    save(tmp_path / "task", tuned(base, {row: row for row in range(len(own))}, len(other), seed=2), other)
    sources = {"plain": tmp_path / "plain", "task": tmp_path / "task"}
    inputs = open_inputs(tmp_path / "base", sources, tokenizer="union")
    opened = open_data({name: ["a <fox>"] for name in sources}, inputs)
    found = {name: own.encode() for name, own in opened.items()}
    assert lists(found["plain"]) == lists(found["task"]) == [other("a <fox>")["input_ids"]]


def test_a_chat_template_is_given_to_sources_without_one(tmp_path: Path) -> None:
    own = bpe(["<user>", "<assistant>"])
    base = llama(len(own), own)
    save(tmp_path / "base", base, own)
    save(tmp_path / "plain", fine_tune(base, seed=1), own)
    own.chat_template = MARKED
    save(tmp_path / "chat", fine_tune(base, seed=2), own)
    sources = {"plain": tmp_path / "plain", "chat": tmp_path / "chat"}
    data = {name: [{"messages": CHAT}] for name in sources}
    with pytest.raises(InputError, match="source 'plain': its rows are conversations"):
        open_data(data, open_inputs(tmp_path / "base", sources))
    found = open_data(data, open_inputs(tmp_path / "base", sources, chat_template="chat"))
    assert found["plain"].encode().fingerprint == found["chat"].encode().fingerprint


def test_sources_that_share_an_embedding_have_the_same_tokens(tmp_path: Path) -> None:
    one, other = wordpiece(tmp_path / "one words", WORDS), wordpiece(tmp_path / "other words", WORDS[::-1])
    save(tmp_path / "base", bert_for(t.BertModel), None)
    base = bert_for(t.BertForSequenceClassification)
    sources = {"one": tmp_path / "one", "other": tmp_path / "other"}
    for name, own in (("one", one), ("other", other)):
        save(sources[name], fine_tune(base, seed=1), own)
    inputs = open_inputs(tmp_path / "base", sources)
    with pytest.raises(InputError, match="source 'other' has other tokens than source 'one'"):
        open_data(dict.fromkeys(sources, TEXTS), inputs)


# -- refusals -------------------------------------------------------------------------------------------------------

TWO = datasets.Dataset.from_list([{"title": "a", "plot": "b", "genre": 1}])
LABELLED = datasets.Dataset.from_dict(
    {"text": ["fox"], "topic": [0]},
    features=datasets.Features(text=datasets.Value("string"), topic=datasets.ClassLabel(names=["a", "b"])),
)
UNUSABLE: dict[str, tuple[Any, str]] = {
    "misspelled column": ({"path": TWO, "columns": ["titel"]}, "no column 'titel': did you mean 'title'"),
    "column of labels": ({"path": LABELLED, "columns": ["topic"]}, "'topic' holds labels where text was expected"),
    "integers": ({"path": TWO, "columns": ["genre"]}, "'genre' holds labels where text was expected; .*title, plot"),
    "no usual name": (
        datasets.Dataset.from_list([{"plot": "a", "cast": "b"}]),
        r"which column holds the text\? It has 'plot' \(text\), 'cast' \(text\)",
    ),
    "three columns": ({"path": TWO, "columns": ["a", "b", "c"]}, "one column, or two for pairs"),
    "prompt of a classifier": ({"path": TWO, "prompt": "title"}, "prompt and target are of models that write text"),
    "unknown key": ({"path": TWO, "colums": ["title"]}, "unknown key 'colums': did you mean 'columns'"),
    "no path": ({"columns": ["title"]}, "no 'path'"),
    "rows": ({"path": TWO, "rows": 0}, "rows must be a whole number, at least 1"),
    "splits": (datasets.DatasetDict(a=TWO, b=TWO), r"several splits \(a, b\)"),
    "no such split": ({"path": datasets.DatasetDict(a=TWO), "split": "tset"}, "no split 'tset': .*Known: a"),
    "split of a list": ({"path": TEXTS, "split": "train"}, "list has no splits"),
    "numbers": ([1, 2], "row 0 is a int"),
    "a number": (3, "must be a file"),
    "a generator": ((text for text in TEXTS), "must be a file"),
    "empty": ([], "no rows"),
    "empty dataset": (TWO.select([]), "no rows"),
    "loader of tuples": (DataLoader([(torch.tensor([1]), 0)]), "gives a list a batch"),
    "loader of no tensors": (DataLoader([{"text": "fox"}]), "hold no tensors"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_rows_that_cannot_be_used_are_refused(name: str, classifier: Model) -> None:
    data, said = UNUSABLE[name]
    with pytest.raises(InputError, match=said):
        classifier.open(data)


FILES: dict[str, tuple[str, bytes, str]] = {
    "jsonl": ("rows.jsonl", b'{"text": "a"}\n{"text": }\n', "line 2: not valid JSON"),
    "json": ("rows.json", b'[{"text": "a"},\n{"text" "b"}]', "line 2: not valid JSON"),
    "no rows": ("rows.json", b'{"text": "a", "rows":\n[]}', "must be a list of rows"),
    "numbers": ("rows.jsonl", b'{"text": "a"}\n3\n', "line 2: a row must be a mapping"),
    "csv": ("rows.csv", b"text,label\na,1\nb\n", "line 3: does not have the header's 2 columns"),
    "encoding": ("rows.txt", "Grüße".encode("latin-1"), "is not UTF-8"),
    "ending": ("rows.jsnl", b"", "did you mean '.jsonl'"),
    "parquet": ("rows.parquet", b"nothing", "cannot be read as parquet"),
    "nothing": ("rows.jsonl", b"", "no rows"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read_are_refused(name: str, classifier: Model, tmp_path: Path) -> None:
    file, content, said = FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=said):
        classifier.open(tmp_path / file)


def test_places_without_rows_are_refused(classifier: Model, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(InputError, match=r"no file or folder '.*rwos.jsonl'; did you mean 'rows.jsonl'"):
        classifier.open(tmp_path / "rwos.jsonl")
    with pytest.raises(InputError, match="no dataset's id either"):
        classifier.open("three little words")
    with pytest.raises(InputError, match="no such file or folder, and the Hub cannot be asked"):
        classifier.open("org/rows")
    with pytest.raises(InputError, match="a file has no splits"):
        classifier.open({"path": tmp_path / "rows.jsonl", "split": "test"})
    with pytest.raises(InputError, match="no split 'tset': did you mean 'test'"):
        classifier.open({"path": as_files(tmp_path), "split": "tset"})
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="datasets cannot read it"):
        classifier.open(tmp_path / "nothing")


def test_every_source_needs_rows(tmp_path: Path, tokenizer: Any) -> None:
    base = bert_for(t.BertForSequenceClassification)
    save(tmp_path / "base", base, tokenizer)
    for name in ("one", "two"):
        save(tmp_path / name, fine_tune(base, seed=1), tokenizer)
    inputs = open_inputs(tmp_path / "base", {"one": tmp_path / "one", "two": tmp_path / "two"})
    with pytest.raises(InputError, match="no data for 'two'"):
        open_data({"one": TEXTS}, inputs)
    with pytest.raises(InputError, match="no source 'tow': did you mean 'two'"):
        open_data({"one": TEXTS, "tow": TEXTS}, inputs)
    with pytest.raises(InputError, match="a mapping from task name to its rows, not list"):
        open_data([TEXTS], inputs)  # type: ignore[arg-type]
    assert list(open_data({"two": TEXTS, "one": TEXTS}, inputs)) == ["one", "two"]


HEADLESS: dict[str, Callable[[], Any]] = {
    "bare": lambda: bert_for(t.BertModel),
    "answers": lambda: bert_for(t.BertForQuestionAnswering),
    "choices": lambda: bert_for(t.BertForMultipleChoice),
    "pretraining": lambda: bert_for(t.BertForPreTraining),
    "contrast": lambda: t.CLIPModel(t.CLIPConfig(vision_config=IMAGE, text_config=TEXT)),
}


@pytest.mark.parametrize("name", HEADLESS)
def test_models_without_comparable_outputs_are_refused(name: str, tmp_path: Path, tokenizer: Any) -> None:
    model = Model(tmp_path, HEADLESS[name](), tokenizer)
    with pytest.raises(InputError, match=f"is a {type(model.model).__name__}, whose outputs cannot be compared"):
        model.open(TEXTS)


def test_rows_need_a_tokenizer_or_a_processor(tmp_path: Path) -> None:
    model = Model(tmp_path, bert_for(t.BertForSequenceClassification), None)
    with pytest.raises(InputError, match="neither it nor the base has tokenizer files"):
        model.open(TEXTS)
    assert len(model.encode([{"input_ids": [2, 5, 3]}])) == 1
    blind = Model(tmp_path / "images", t.ViTForImageClassification(t.ViTConfig(**IMAGE)), None)
    with pytest.raises(InputError, match="neither it nor the base has a preprocessor_config"):
        blind.open(pictures())


def test_a_decoder_that_classifies_needs_its_own_padding(tmp_path: Path) -> None:
    tokenizer = bpe()
    settings = GROUPED | {"vocab_size": len(tokenizer)}
    for pad in (None, tokenizer.pad_token_id):
        torch.manual_seed(0)
        config = t.LlamaConfig(**settings, pad_token_id=pad)
        model = Model(tmp_path / str(pad), t.LlamaForSequenceClassification(config), tokenizer)
        if pad is None:
            with pytest.raises(InputError, match="has none; write there"):
                model.open(TEXTS)
            continue
        rows = model.encode(TEXTS)
        with torch.no_grad():
            together = model.tuned(**rows.batch([0, 2]).inputs).logits
            alone = model.tuned(**rows.batch([2]).inputs).logits
        torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)
