"""Rows drawn from what the embeddings of a fine-tune show of its text: what is drawn or refused, and merges on them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
import yaml
from conftest import IMAGE, TEXT, fine_tune
from vocabularies import bpe, llama, save, wordpiece

import hf_fda
from hf_fda.cli import main
from hf_fda.data.opening import open_data
from hf_fda.data.request import Reading
from hf_fda.data.rows import TaskRows
from hf_fda.errors import InputError
from hf_fda.inputs import open_inputs

WORDS = ["good", "bad", "film", "goal", "match", "price", "bank", "the"]
TASKS = {"films": ["good", "bad", "film"], "news": ["goal", "match", "price", "bank"]}
LONGEST = 12


def family(folder: Path, longest: int = LONGEST, pairs: bool = False, decay: float = 0.0) -> dict[str, str]:
    """A base and a fine-tune for each task, of which the embeddings moved of its own words, of the positions up to the
    longest text's and of the kinds of text that it saw; with decay all others shrank."""
    tokenizer = wordpiece(folder / "words", WORDS)
    torch.manual_seed(0)
    settings = TEXT | {"vocab_size": len(tokenizer)}
    config = t.BertConfig(**settings, max_position_embeddings=40, pad_token_id=0, num_labels=2)
    base = t.BertForSequenceClassification(config).eval()
    places = {"base": save(folder / "base", base, tokenizer)}
    for number, (task, words) in enumerate(TASKS.items()):
        tuned = fine_tune(base, seed=number + 1)
        ours, theirs = base.bert.embeddings, tuned.bert.embeddings
        with torch.no_grad():
            for module, used in (
                ("word_embeddings", tokenizer.convert_tokens_to_ids([*words, "[CLS]", "[SEP]"])),
                ("position_embeddings", range(longest)),
                ("token_type_embeddings", range(1 + pairs)),
            ):
                before, after = getattr(ours, module).weight, getattr(theirs, module).weight
                after.copy_(before * (1 - decay))
                after[list(used)] += 0.1 * torch.randn(len(list(used)), before.shape[1])
        places[task] = save(folder / task, tuned, tokenizer)
    return {name: str(place) for name, place in places.items()}


def rows_of(places: dict[str, str], **reading: Any) -> dict[str, TaskRows]:
    sources = {name: place for name, place in places.items() if name != "base"}
    opened = open_data("synthetic", open_inputs(places["base"], sources), Reading(**reading))
    return {task: own.encode() for task, own in opened.items()}


def words_in(rows: TaskRows, folder: Path) -> set[str]:
    tokenizer = t.AutoTokenizer.from_pretrained(folder / "base")
    ids = {int(token) for row in rows.inputs for token in row["input_ids"]}
    return set(tokenizer.convert_ids_to_tokens(sorted(ids))) - {"[CLS]", "[SEP]"}


@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_rows_are_of_the_tokens_that_each_source_moved(decay: float, tmp_path: Path) -> None:
    found = rows_of(family(tmp_path, decay=decay), rows=40)
    for task, rows in found.items():
        assert len(rows) == 40 and rows.kind == "labels"
        assert words_in(rows, tmp_path) == set(TASKS[task])


def test_tokens_are_drawn_in_proportion_to_how_far_they_moved(tmp_path: Path) -> None:
    places = family(tmp_path)
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "base")
    tuned, base = (t.AutoModelForSequenceClassification.from_pretrained(places[name]) for name in ("films", "base"))
    good, bad = tokenizer.convert_tokens_to_ids(["good", "bad"])
    with torch.no_grad():
        own, theirs = tuned.get_input_embeddings().weight, base.get_input_embeddings().weight
        own[good] = theirs[good] + 3 * (own[bad] - theirs[bad])
    save(Path(places["films"]), tuned, tokenizer)
    ids = torch.cat([row["input_ids"] for row in rows_of(places, rows=500)["films"].inputs])
    assert int((ids == good).sum()) / int((ids == bad).sum()) == pytest.approx(3, rel=0.2)


def test_texts_are_as_long_as_the_positions_that_moved(tmp_path: Path) -> None:
    for rows in rows_of(family(tmp_path), rows=60).values():
        lengths = [len(row["input_ids"]) for row in rows.inputs]
        assert max(lengths) == LONGEST and min(lengths) < LONGEST // 2 + 2
    short = rows_of(family(tmp_path / "short", longest=30), rows=60, max_length=9)["films"]
    assert max(len(row["input_ids"]) for row in short.inputs) == 9


def test_pairs_are_drawn_where_a_second_text_was_seen(tmp_path: Path) -> None:
    single, double = (rows_of(family(tmp_path / str(pairs), pairs=pairs))["news"] for pairs in (False, True))
    assert not any(row["token_type_ids"].any() for row in single.inputs)
    assert all(row["token_type_ids"].any() for row in double.inputs)


def test_rows_depend_on_the_seed_alone(tmp_path: Path) -> None:
    places = family(tmp_path)
    first, again, other = (rows_of(places, seed=seed) for seed in (0, 0, 1))
    assert first["films"].fingerprint == again["films"].fingerprint != other["films"].fingerprint


def test_a_number_for_one_task_is_more_than_the_usual_one(tmp_path: Path) -> None:
    places = family(tmp_path)
    inputs = open_inputs(places["base"], {task: places[task] for task in TASKS})
    data = {"films": {"path": "synthetic", "rows": 300}, "news": ["goal match", "the price"]}
    found = {task: own.encode() for task, own in open_data(data, inputs).items()}
    assert len(found["films"]) == 300 and len(found["news"]) == 2


@pytest.mark.parametrize("command_line", [False, True])
def test_a_merge_without_data_is_made_and_made_again(
    command_line: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places, output = family(tmp_path), tmp_path / "merged"
    if command_line:
        sources = [word for task in TASKS for word in ("--source", f"{task}={places[task]}")]
        words = ["--method", "distill", "--data", "synthetic", "--rows", "16", "--output", str(output)]
        assert main(["merge", "--base", places["base"], *sources, *words]) == 0
    else:
        sources = {task: places[task] for task in TASKS}
        hf_fda.merge(places["base"], sources, "distill", output, data="synthetic", rows=16, quiet=True)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "drawn from the source's weights, 16 rows" in card and "datasets:" not in card
    assert "| rows |" not in card  # which may say more than were drawn
    assert "Merging looks at weights only" in card and "hidden states of synthetic rows" in card
    again = hf_fda.merge_config(output / "merge_config.yaml", output=tmp_path / "again", quiet=True)
    first, second = (hf_fda.load(folder).state_dict() for folder in (output, again.folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["fda", "divmerge", "regmean", "regmean_pp", "fisher", "adamerging"])
def test_every_method_that_looks_at_data_takes_them(method: str, tmp_path: Path) -> None:
    places = family(tmp_path)
    sources = {task: places[task] for task in TASKS}
    merged = hf_fda.merge(places["base"], sources, method, tmp_path / "merged", data="synthetic", rows=8, quiet=True)
    assert all(value.isfinite().all() for value in merged.load().state_dict().values())


def test_language_models_see_text_of_what_they_moved_most(tmp_path: Path) -> None:
    tokenizer = bpe()
    base = llama(len(tokenizer), tokenizer)
    tuned = fine_tune(base, seed=1)
    words = tokenizer(" the quick brown fox")["input_ids"]
    with torch.no_grad():  # an output layer's gradient moves every row a little
        theirs = base.get_input_embeddings().weight
        own = tuned.get_input_embeddings().weight.copy_(theirs + 1e-3 * torch.randn_like(theirs))
        own[words] += torch.randn(len(words), theirs.shape[1])
    places = {"base": save(tmp_path / "base", base, tokenizer), "one": save(tmp_path / "one", tuned, tokenizer)}
    rows = rows_of({name: str(place) for name, place in places.items()}, rows=30)["one"]
    assert rows.kind == "tokens" and rows.scored is not None and all(own.any() for own in rows.scored)
    ids = torch.cat([row["input_ids"] for row in rows.inputs])
    assert float(torch.isin(ids, torch.tensor(words)).double().mean()) > 0.8


def test_fda_takes_anchors_beside_synthetic_rows_and_none_beside_real_ones(tmp_path: Path) -> None:
    places = family(tmp_path)
    sources = {task: places[task] for task in TASKS}

    def planned(data: Any, **options: Any) -> Any:
        return hf_fda.plan(places["base"], sources, "fda", tmp_path / "merged", data=data, **options)

    synthetic, real = planned("synthetic"), planned({task: ["good film", "the match"] for task in TASKS})
    assert synthetic.config.with_data == "propagated" and len(synthetic.anchors_made) == 2
    assert real.config.with_data == "states" and not real.anchors_made
    assert planned("synthetic", with_data="mixed").config.with_data == "mixed"


def test_embeddings_that_did_not_move_show_nothing(tmp_path: Path) -> None:
    places = family(tmp_path)
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "base")
    tuned = t.AutoModelForSequenceClassification.from_pretrained(places["films"])
    base = t.AutoModelForSequenceClassification.from_pretrained(places["base"])
    tuned.set_input_embeddings(copy.deepcopy(base.get_input_embeddings()))
    save(Path(places["films"]), tuned, tokenizer)
    with pytest.raises(InputError, match=r"'films'.*token embeddings are the base's.*--data films="):
        rows_of(places)


def test_images_cannot_be_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = t.ViTForImageClassification(t.ViTConfig(**IMAGE)).eval()
    places = {"base": base, "one": fine_tune(base, seed=1), "two": fine_tune(base, seed=2)}
    for name, model in places.items():
        model.save_pretrained(tmp_path / name)
    with pytest.raises(InputError, match="source 'one' takes images"):
        rows_of({name: str(tmp_path / name) for name in places})


def test_another_word_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    places = family(tmp_path)
    sources = {task: places[task] for task in TASKS}
    with pytest.raises(InputError, match="'synthetic', not 'syntetic'"):
        hf_fda.plan(places["base"], sources, "distill", tmp_path / "merged", data="syntetic")
    with pytest.raises(InputError, match="merges from weights alone"):
        hf_fda.plan(places["base"], sources, "tsv", tmp_path / "merged", data="synthetic")


class TestByItself:
    """What `fda` looks at where no data is given."""

    def plan(self, places: dict[str, str], folder: Path, **arguments: Any) -> hf_fda.Plan:
        sources = {task: places[task] for task in places if task != "base"}
        return hf_fda.plan(places["base"], sources, output=folder / "merged", **arguments)

    def test_text_encoders_are_merged_on_rows_drawn_from_them(self, tmp_path: Path) -> None:
        places = family(tmp_path)
        by_itself, asked = (self.plan(places, tmp_path, data=data, rows=8) for data in (None, "synthetic"))
        assert list(by_itself.data) == list(TASKS) and by_itself.arguments == asked.arguments
        sources = {task: places[task] for task in TASKS}
        merged = hf_fda.merge(places["base"], sources, output=tmp_path / "merged", rows=8, quiet=True)
        again = hf_fda.merge_config(merged.folder / "merge_config.yaml", output=tmp_path / "again", quiet=True)
        first, second = (read(own.folder) for own in (merged, again))
        assert first == second

    def test_anchors_alone_are_taken_where_they_are_asked_for(self, tmp_path: Path) -> None:
        places, output = family(tmp_path), tmp_path / "merged"
        sources = [word for task in TASKS for word in ("--source", f"{task}={places[task]}")]
        words = ["--data", "anchors", "--output", str(output), "--quiet"]
        assert main(["merge", "--base", places["base"], *sources, *words]) == 0
        assert yaml.safe_load((output / "merge_config.yaml").read_text(encoding="utf-8"))["data"] == "anchors"
        assert "synthetic" not in (output / "README.md").read_text(encoding="utf-8")
        again = hf_fda.merge_config(output / "merge_config.yaml", output=tmp_path / "again", quiet=True)
        assert read(output) == read(again.folder)

    def test_where_embeddings_show_nothing_anchors_are_taken_and_it_says_why(self, tmp_path: Path) -> None:
        places = family(tmp_path)
        for name in places:
            for path in Path(places[name]).glob("*token*"):
                path.unlink()
        plan = self.plan(places, tmp_path)
        assert not plan.data and any("anchors alone" in note and "has tokenizer files" in note for note in plan.notes)
        assert not any("anchors alone" in note for note in self.plan(places, tmp_path, data="anchors").notes)

    @pytest.mark.parametrize("head", ["", "ForQuestionAnswering"])
    def test_a_model_whose_outputs_cannot_be_compared_is_merged_on_rows_too(self, head: str, tmp_path: Path) -> None:
        places = family(tmp_path)
        for place in places.values():
            getattr(t, f"Bert{head or 'Model'}").from_pretrained(place).save_pretrained(place)
        sources = {task: places[task] for task in TASKS}
        merged = hf_fda.merge(places["base"], sources, output=tmp_path / "merged", rows=8, quiet=True)
        assert list(merged.tasks) == list(TASKS if head else ())
        again = hf_fda.merge_config(merged.folder / "merge_config.yaml", output=tmp_path / "again", quiet=True)
        assert read(merged.folder) == read(again.folder)
        with pytest.raises(InputError, match="cannot be compared"):
            hf_fda.plan(places["base"], sources, "divmerge", tmp_path / "other", data="synthetic")

    def test_a_tokenizer_that_is_not_the_models_is_no_reason_to_fail(self, tmp_path: Path) -> None:
        places = family(tmp_path)
        other = wordpiece(tmp_path / "more", [*WORDS, "fox", "dog"])
        for place in places.values():
            other.save_pretrained(place)
        plan = self.plan(places, tmp_path)
        assert not plan.data and any("anchors alone" in note and "'fox', 'dog'" in note for note in plan.notes)
        with pytest.raises(InputError, match="not the model's; save"):
            self.plan(places, tmp_path, data="synthetic")

    def test_a_model_without_an_embedding_of_tokens_is_merged_on_anchors_alone(self, tmp_path: Path) -> None:
        config = t.CanineConfig(**TEXT, max_position_embeddings=40, num_labels=2)
        base = t.CanineForSequenceClassification(config).eval()
        models = {"base": base, **{task: fine_tune(base, seed) for seed, task in enumerate(TASKS, 1)}}
        tokenizer = wordpiece(tmp_path / "words", WORDS)
        places = {name: str(save(tmp_path / name, model, tokenizer)) for name, model in models.items()}
        plan = self.plan(places, tmp_path)
        assert not plan.data and any("no embedding of tokens" in note for note in plan.notes)

    def test_nothing_is_drawn_from_what_an_earlier_document_makes(self, tmp_path: Path) -> None:
        places = family(tmp_path)
        first = {"name": "first", "merge_method": "linear", "models": [{"model": places[task]} for task in TASKS]}
        first |= {"parameters": {"weight": 0.5}}
        last = {"merge_method": "fda", "base_model": places["base"], "parameters": {"steps": 2, "epochs": 1}}
        last |= {"models": [{"model": "first"}, {"model": places["news"]}]}
        text = yaml.safe_dump_all([first, last])
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        planned = hf_fda.plan_config(tmp_path / "config.yaml", output=tmp_path / "merged")
        assert not planned[-1].data
        merged = hf_fda.merge_config(tmp_path / "config.yaml", output=tmp_path / "merged", quiet=True)
        assert "synthetic" not in (merged.folder / "README.md").read_text(encoding="utf-8")

    def test_other_methods_get_no_rows(self, tmp_path: Path) -> None:
        assert not self.plan(family(tmp_path), tmp_path, method="tsv").data

    def test_an_adapter_is_merged_on_anchors_alone(self, tmp_path: Path) -> None:
        plan = self.plan(family(tmp_path), tmp_path, as_adapter=True, rank=4)
        assert not plan.data and not any("anchors alone" in note for note in plan.notes)

    @pytest.mark.parametrize("kind", ["vit", "llama", "t5"])
    def test_models_that_are_no_text_encoders_are_merged_on_anchors_alone(
        self, kind: str, library: Any, tmp_path: Path
    ) -> None:
        base, sources = library(kind)
        plan = hf_fda.plan(base, sources, output=tmp_path / "merged")
        assert not plan.data and not any("anchors alone" in note for note in plan.notes)


def read(folder: Path) -> bytes:
    """A merged model's weights, byte for byte."""
    return (folder / "model.safetensors").read_bytes()
