"""Merges of models with different tokens: every row is traced to the token it stands for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from checks import assert_same, files, loaded, merge, weights
from conftest import GROUPED, IMAGE, TEXT
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken
from torch import Tensor
from vocabularies import CORPUS, MARKERS, bert, bpe, ids_of, llama, save, tuned, wordpiece

import hf_fda
from hf_fda.cli import main
from hf_fda.errors import InputError

OLD_TEXT = "the quick brown fox and five liquor jugs, then more"


class Family:
    """A base and two fine-tunes with tokens of their own, in folders, and what is in them."""

    def __init__(self, folder: Path, models: Mapping[str, tuple[Any, Any]]) -> None:
        self.folder = folder
        self.models = {name: model for name, (model, _) in models.items()}
        self.tokens = {name: tokenizer.get_vocab() for name, (_, tokenizer) in models.items()}
        for name, (model, tokenizer) in models.items():
            save(folder / name, model, tokenizer)

    @property
    def sources(self) -> dict[str, Path]:
        return {name: self.folder / name for name in self.models if name != "base"}

    def merge(self, method: str = "linear", output: str = "merged", **options: Any) -> hf_fda.Merged:
        return merge(self.folder / "base", self.sources, method, self.folder / output, **options)

    def plan(self, **options: Any) -> Any:
        return hf_fda.plan(
            self.folder / "base", self.sources, "linear", self.folder / "merged", device="cpu", **options
        )

    def row(self, model: str, tensor: str, token: str) -> Tensor | None:
        """A model's own row of a token."""
        place = self.tokens[model].get(token)
        return None if place is None else self.models[model].state_dict()[tensor][place]

    def mean(self, tensor: str, token: str) -> Tensor:
        """The mean of the sources' rows; a source without the token has the base's, or the mean of those with it."""
        own = {name: self.row(name, tensor, token) for name in self.sources}
        there = [row for row in own.values() if row is not None]
        shared = self.row("base", tensor, token)
        if shared is None:
            shared = torch.stack(there).mean(0)
        return torch.stack([shared if row is None else row for row in own.values()]).mean(0)


def make_chat(folder: Path, tied: bool = False, rows: int = 0) -> Family:
    """Language models: source "one" has chat markers, "two" the same in another order and more tokens."""
    plain, one = bpe(), bpe(MARKERS)
    two = bpe([AddedToken("<tool>", special=True), *MARKERS[::-1], AddedToken("zebra")])
    size = len(plain)
    base = llama(size + rows, plain, tie_word_embeddings=tied)
    same = {row: row for row in range(size)}
    models = {"base": (base, plain)}
    for seed, (name, tokenizer) in enumerate({"one": one, "two": two}.items(), 1):
        models[name] = tuned(base, same, len(tokenizer), seed), tokenizer
    return Family(folder, models)


@pytest.fixture
def chat(tmp_path: Path) -> Family:
    return make_chat(tmp_path)


def heads_of(family: Family) -> list[str]:
    tied = family.models["base"].config.tie_word_embeddings
    return ["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"]


# -- without a word the tokens must be the same ------------------------------------------------------------------------
def test_other_tokens_are_refused_with_the_first_of_them_and_the_way_out(chat: Family) -> None:
    with pytest.raises(InputError) as error:
        chat.plan()
    for said in ("source 'one'", "'<|im_start|>' (290 in source 'one' only)", "292", "290", "tokenizer='union'"):
        assert said in str(error.value)
    assert "--tokenizer" in str(error.value)


def test_rows_of_one_number_that_mean_other_tokens_are_refused(tmp_path: Path) -> None:
    plain, other = bpe(["<a>", "<b>"]), bpe(["<b>", "<a>"])
    base = llama(292, plain)
    family = Family(tmp_path, {"base": (base, plain), "one": (tuned(base, {}, 292, 1), other)})
    with pytest.raises(InputError, match=r"'<a>' \(290 in the base, 291 in source 'one'\)") as error:
        family.plan()
    assert "tokenizer='union'" in str(error.value)


def test_equal_tokens_in_other_files_are_no_difference(tmp_path: Path) -> None:
    tokenizer = wordpiece(tmp_path / "words", ["fox", "dog"])
    base = bert(len(tokenizer))
    same = {row: row for row in range(len(tokenizer))}
    family = Family(tmp_path, {"base": (base, tokenizer), "one": (tuned(base, same, len(tokenizer), 1), tokenizer)})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "one" / name).unlink()
    (tmp_path / "words" / "words.txt").rename(tmp_path / "one" / "vocab.txt")
    merged = family.merge()
    assert not family.plan().notes
    assert_same(weights(merged.folder), weights(tmp_path / "one"))


def test_a_padding_token_without_a_row_is_no_difference(tmp_path: Path) -> None:
    plain, padded = bpe(), bpe(["[PAD]"])
    base = llama(290, plain)
    family = Family(tmp_path, {"base": (base, plain), "one": (tuned(base, {r: r for r in range(290)}, 290, 1), padded)})
    assert not family.plan().notes


def test_tokenizers_that_are_not_there_are_not_asked_for(chat: Family) -> None:
    for path in (chat.folder / "one").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"source 'one'.*vocabulary of 292.*cannot be told which.*tokenizer="):
        hf_fda.plan(chat.folder / "base", {"one": chat.folder / "one"}, "linear", device="cpu")
    with pytest.raises(InputError, match=r"source 'one' .* has no tokenizer files.*save_pretrained"):
        chat.plan(tokenizer="union")


def test_a_tokenizer_that_cannot_be_read_is_said_and_not_compared(tmp_path: Path) -> None:
    plain = bpe()
    base = llama(290, plain)
    family = Family(tmp_path, {"base": (base, plain), "one": (tuned(base, {r: r for r in range(290)}, 290, 1), plain)})
    (tmp_path / "one" / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert any("source 'one'" in note and "cannot be loaded" in note for note in family.plan().notes)
    with pytest.raises(InputError, match=r"source 'one'.*cannot be loaded"):
        family.plan(tokenizer="base")


def test_padding_rows_alone_stop_nothing(tmp_path: Path) -> None:
    plain = bpe()
    base = llama(300, plain)
    used = {row: row for row in range(290)}
    models = {
        "base": (base, plain),
        "one": (tuned(base, used, 290, 1), plain),
        "two": (tuned(base, used, 310, 2), plain),
    }
    family = Family(tmp_path, models)
    merged = family.merge()
    found = weights(merged.folder)["model.embed_tokens.weight"]
    assert len(found) == 300
    own = [family.models[name].state_dict()["model.embed_tokens.weight"] for name in ("base", "one", "two")]
    torch.testing.assert_close(found[:290], (own[1][:290] + own[2][:290]) / 2)
    torch.testing.assert_close(found[290:], (own[0][290:] + own[2][290:300]) / 2)
    assert any("source 'one': 290 rows become 300" in note for note in family.plan().notes)


# -- every row of the output is its token's ----------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [0, 3, 9])
def test_every_row_of_a_union_is_the_mean_of_its_token(tied: bool, rows: int, tmp_path: Path) -> None:
    family = make_chat(tmp_path, tied, rows)
    merged = family.merge(tokenizer="union")
    tokens = t.AutoTokenizer.from_pretrained(merged.folder).get_vocab()
    assert set(tokens) == {token for own in family.tokens.values() for token in own}
    assert all(tokens[token] == place for token, place in family.tokens["base"].items())
    assert sorted(tokens, key=tokens.get)[290:] == ["<|im_start|>", "<|im_end|>", "<tool>", "zebra"]
    held = weights(merged.folder)
    model = loaded(merged.folder)
    assert model.config.vocab_size == max(290 + rows, 294)
    assert ("lm_head.weight" in held) is not tied
    for tensor in heads_of(family):
        assert len(held[tensor]) == model.config.vocab_size
        wanted = torch.stack([family.mean(tensor, token) for token in sorted(tokens, key=tokens.get)])
        torch.testing.assert_close(held[tensor][:294], wanted, rtol=1e-6, atol=1e-7)
    if tied:
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("tokenizer", ["base", "one", "two"])
def test_the_output_has_the_vocabulary_of_the_named_model(tokenizer: str, chat: Family) -> None:
    merged = chat.merge(tokenizer=tokenizer)
    tokens = t.AutoTokenizer.from_pretrained(merged.folder).get_vocab()
    assert tokens == chat.tokens[tokenizer]
    held = weights(merged.folder)
    for tensor in heads_of(chat):
        wanted = torch.stack([chat.mean(tensor, token) for token in sorted(tokens, key=tokens.get)])
        torch.testing.assert_close(held[tensor], wanted, rtol=1e-6, atol=1e-7)
    assert (merged.folder / "tokenizer.json").read_bytes() == (chat.folder / tokenizer / "tokenizer.json").read_bytes()


def test_one_source_in_its_own_vocabulary_is_that_source(chat: Family) -> None:
    merged = merge(chat.folder / "base", {"two": chat.folder / "two"}, "linear", chat.folder / "m", tokenizer="two")
    assert_same(weights(merged.folder), weights(chat.folder / "two"))


@pytest.mark.parametrize("tokenizer", ["base", "union"])
def test_scaling_zero_gives_the_base_in_its_rows(tokenizer: str, chat: Family) -> None:
    found = weights(chat.merge("task_arithmetic", tokenizer=tokenizer, scaling=0.0).folder)
    base = weights(chat.folder / "base")
    assert_same({name: tensor[: len(base[name])] for name, tensor in found.items()}, base)


def test_a_source_without_a_token_does_not_move_it(chat: Family) -> None:
    """Its task vector is zero there, so that a sum is the other source's own row."""
    merged = chat.merge("task_arithmetic", tokenizer="union", scaling=1.0)
    tokens = t.AutoTokenizer.from_pretrained(merged.folder).get_vocab()
    for tensor in heads_of(chat):
        own = chat.row("two", tensor, "<tool>")
        assert own is not None
        torch.testing.assert_close(weights(merged.folder)[tensor][tokens["<tool>"]], own)


@pytest.mark.parametrize("method", ["tsv", "ties", "isotropic", "fda"])
def test_every_method_may_change_the_vocabulary(method: str, chat: Family) -> None:
    merged = chat.merge(method, tokenizer="union")
    assert bool(loaded(merged.folder)(torch.tensor([[290, 3, 293]])).logits.isfinite().all())


def test_blocks_do_not_know_of_the_vocabulary(chat: Family) -> None:
    found = [weights(chat.merge("fda", output=f"as-{mode}", tokenizer=mode).folder) for mode in ("base", "union")]
    inside = [{name: tensor for name, tensor in own.items() if ".layers." in name} for own in found]
    assert inside[0]
    assert_same(*inside)


def test_anchors_outlive_another_choice_of_tokens(chat: Family) -> None:
    merged = chat.merge("fda", tokenizer="base")
    made = {path: path.stat().st_mtime_ns for path in merged.folder.glob("anchors/*/blocks/*")}
    assert made
    chat.merge("fda", tokenizer="union")
    assert {path: path.stat().st_mtime_ns for path in made} == made


# -- text --------------------------------------------------------------------------------------------------------------
def test_a_union_encodes_old_text_as_before_and_generates(chat: Family) -> None:
    merged = chat.merge(tokenizer="union")
    tokenizer = t.AutoTokenizer.from_pretrained(merged.folder)
    plain, one = (t.AutoTokenizer.from_pretrained(chat.folder / name) for name in ("base", "one"))
    assert tokenizer(OLD_TEXT).input_ids == plain(OLD_TEXT).input_ids
    said = f"<|im_start|>user {OLD_TEXT}<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer(said).input_ids) == one.convert_ids_to_tokens(one(said).input_ids)
    assert tokenizer.decode(tokenizer(said).input_ids) == said
    assert tokenizer.decode(tokenizer(said).input_ids, skip_special_tokens=True) == f"user {OLD_TEXT}"
    answer = merged.load().generate(**tokenizer(said, return_tensors="pt"), max_new_tokens=3)
    assert answer.max() < len(tokenizer)


def test_ordinary_tokens_of_bpe_come_with_their_merges(tmp_path: Path) -> None:
    plain = bpe(["<|x|>"], size=500)
    more = bpe(MARKERS, corpus=[*CORPUS, *["zebras graze on zebra grass"] * 5], size=500)
    base = llama(len(plain), plain)
    shared = {more.get_vocab()[token]: row for token, row in plain.get_vocab().items() if token in more.get_vocab()}
    family = Family(tmp_path, {"base": (base, plain), "one": (tuned(base, shared, len(more), 1), more)})
    merged = family.merge(tokenizer="union")
    tokenizer = t.AutoTokenizer.from_pretrained(merged.folder)
    tokens = tokenizer.get_vocab()
    assert set(tokens) == {token for own in family.tokens.values() for token in own}
    assert all(tokens[token] == place for token, place in family.tokens["base"].items())
    assert "Ġgrass" in tokenizer.tokenize("on grass")
    assert "Ġgrass" not in plain.get_vocab()
    assert tokenizer(f"{CORPUS[0]}<|x|>").input_ids == plain(f"{CORPUS[0]}<|x|>").input_ids
    assert tokenizer.decode(tokenizer("zebras on grass<|im_end|>").input_ids) == "zebras on grass<|im_end|>"
    held = weights(merged.folder)["lm_head.weight"]
    wanted = torch.stack([family.mean("lm_head.weight", token) for token in sorted(tokens, key=tokens.get)])
    torch.testing.assert_close(held, wanted, rtol=1e-6, atol=1e-7)


def test_masked_language_models_with_words_and_a_bias(tmp_path: Path) -> None:
    plain = wordpiece(tmp_path / "w0", ["fox", "dog"])
    one = wordpiece(tmp_path / "w1", ["dog", "virus", "fox"], ["[DRUG]"])
    base = bert(len(plain))
    places = {one.get_vocab()[token]: row for token, row in plain.get_vocab().items()}
    family = Family(tmp_path, {"base": (base, plain), "one": (tuned(base, places, len(one), 1), one)})
    merged = family.merge(tokenizer="union")
    tokenizer = t.AutoTokenizer.from_pretrained(merged.folder)
    assert type(tokenizer) is t.BertTokenizer
    tokens = tokenizer.get_vocab()
    assert tokenizer("virus [DRUG] fox").input_ids[1:-1] == [tokens[own] for own in ("virus", "[DRUG]", "fox")]
    assert tokenizer("fox and dog").input_ids == plain("fox and dog").input_ids
    held = loaded(merged.folder).state_dict()
    for tensor in ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", "cls.predictions.bias"):
        wanted = torch.stack([family.mean(tensor, token) for token in sorted(tokens, key=tokens.get)])
        torch.testing.assert_close(held[tensor], wanted, rtol=1e-6, atol=1e-7)


def test_tokenizers_without_a_fast_form_get_added_tokens_only(tmp_path: Path) -> None:
    letters = ["<cls>", "<pad>", "<eos>", "<unk>", *"ABCD", "<mask>"]

    def esm(name: str, words: list[str], added: list[str]) -> Any:
        path = tmp_path / f"{name}.txt"
        path.write_text("\n".join(words), encoding="utf-8")
        tokenizer = t.EsmTokenizer(str(path))
        tokenizer.add_tokens(added)
        return tokenizer

    def model(rows: int) -> Any:
        config = t.EsmConfig(**TEXT | {"vocab_size": rows}, pad_token_id=1, mask_token_id=8, max_position_embeddings=40)
        return t.EsmForMaskedLM(config).eval()

    plain, one, other = esm("base", letters, []), esm("one", letters, ["<tag>"]), esm("two", [*letters, "E"], [])
    base = model(9)
    same = {row: row for row in range(9)}
    family = Family(tmp_path, {"base": (base, plain), "one": (tuned(base, same, 10, 1), one)})
    merged = family.merge(tokenizer="union")
    tokens = t.AutoTokenizer.from_pretrained(merged.folder).get_vocab()
    assert tokens == one.get_vocab()
    tensor = "esm.embeddings.word_embeddings.weight"
    torch.testing.assert_close(weights(merged.folder)[tensor][9], family.mean(tensor, "<tag>"))
    save(tmp_path / "two", tuned(base, same, 10, 2), other)
    with pytest.raises(InputError, match=r"the base \(EsmTokenizer\) has another vocabulary.*'E'.*tokenizer='base'"):
        hf_fda.plan(tmp_path / "base", {"two": tmp_path / "two"}, "linear", tokenizer="union", device="cpu")


# -- what a user says of single tokens ---------------------------------------------------------------------------------
def test_rules_say_whose_row_a_token_gets(chat: Family) -> None:
    rules: dict[str, Any] = {
        "<tool>": {"source": {"kind": "zero"}},
        "zebra": {"source": {"kind": "model_token", "model": "one", "token": "the"}, "force": True},
        "<|im_end|>": {"source": "two", "force": True},
        "<new>": {"source": {"kind": "model_token", "model": "base", "token_id": 7}},
        "<none>": {"source": {"kind": "zero"}, "force": False},
    }
    merged = chat.merge(tokenizer="union", tokens=rules)
    tokenizer = t.AutoTokenizer.from_pretrained(merged.folder)
    tokens, held = tokenizer.get_vocab(), weights(merged.folder)
    assert "<new>" in tokenizer.tokenize("a<new>b")
    for tensor in heads_of(chat):
        rows, state = held[tensor], chat.models["base"].state_dict()
        tool, end, the = (
            chat.row(*own) for own in (("two", tensor, "<tool>"), ("two", tensor, "<|im_end|>"), ("one", tensor, "the"))
        )
        assert tool is not None and end is not None and the is not None
        torch.testing.assert_close(rows[tokens["<tool>"]], tool / 2)  # only the model that lacks it has zeros
        torch.testing.assert_close(rows[tokens["zebra"]], the)
        torch.testing.assert_close(rows[tokens["<|im_end|>"]], end)
        torch.testing.assert_close(rows[tokens["<new>"]], state[tensor][7])
        assert not bool(rows[tokens["<none>"]].any())  # no model has it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokenizer": "unoin"}, r"tokenizer 'unoin'.*did you mean 'union'.*one"),
        ({"tokens": {"<a>": {"source": "one"}}}, "tokens is of an output vocabulary; say which"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of is of an output vocabulary"),
        ({"tokenizer": "union", "pad_to_multiple_of": 0}, "at least 1, not 0"),
        ({"tokenizer": "union", "pad_to_multiple_of": True}, "whole number"),
        ({"tokenizer": "union", "tokens": ["<a>"]}, "must be a mapping"),
        ({"tokenizer": "union", "tokens": {"<a>": "one"}}, "'<a>' needs a mapping with source"),
        ({"tokenizer": "union", "tokens": {"<a>": {"force": True}}}, "'<a>' needs a mapping with source"),
        ({"tokenizer": "union", "tokens": {"<a>": {"source": "oen"}}}, "'<a>' is no model of this merge.*'one'"),
        ({"tokenizer": "union", "tokens": {"<a>": {"source": "one", "force": 1}}}, "force of '<a>'"),
        ({"tokenizer": "union", "tokens": {"<a>": {"source": {"kind": "nil"}}}}, "source of '<a>' must be"),
        ({"tokenizer": "union", "tokens": {"<a>": {"source": {"kind": "zero", "model": "one"}}}}, "nothing else"),
        (
            {"tokenizer": "union", "tokens": {"<a>": {"source": {"kind": "model_token", "model": "one"}}}},
            "either token",
        ),
        (
            {
                "tokenizer": "union",
                "tokens": {"<a>": {"source": {"kind": "model_token", "model": "one", "token_id": -1}}},
            },
            "token_id of '<a>'",
        ),
        (
            {
                "tokenizer": "union",
                "tokens": {"<a>": {"source": {"kind": "model_token", "model": "one", "token_id": 999}}},
            },
            r"source 'one' .* has 292 rows, none of id 999",
        ),
        ({"tokenizer": "union", "tokens": {"<tool>": {"source": "one"}}}, r"source 'one' .* has no token '<tool>'"),
        ({"chat_template": "otn"}, "neither a template nor a name"),
        ({"tokenizer": "union", "chat_template": "one"}, "chat_template: 'one' has none"),
        ({"tokenizer": "union", "as_adapter": True}, r"as_adapter.*tokenizer='base'"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(options: dict[str, Any], said: str, chat: Family) -> None:
    with pytest.raises(InputError, match=said):
        chat.plan(**options)


def test_a_source_may_not_be_called_like_a_choice(chat: Family) -> None:
    with pytest.raises(InputError, match=r"source 'base'.*another name"):
        hf_fda.plan(chat.folder / "base", {"base": chat.folder / "one"}, "linear", tokenizer="base")


# -- numbers of rows ---------------------------------------------------------------------------------------------------
def test_rows_come_in_multiples(chat: Family) -> None:
    merged = chat.merge(tokenizer="union", pad_to_multiple_of=64)
    held = weights(merged.folder)["model.embed_tokens.weight"]
    assert held.shape == (320, 32)
    base = weights(chat.merge("task_arithmetic", scaling=0.0, output="base-rows", tokenizer="union").folder)
    filler = base["model.embed_tokens.weight"].double().mean(0).float()
    torch.testing.assert_close(held[294:], filler.expand(26, -1), rtol=1e-5, atol=1e-6)
    assert loaded(merged.folder).config.vocab_size == 320


def test_added_tokens_with_gaps_and_tokens_that_share_an_id(tmp_path: Path) -> None:
    def gapped(tokenizer: Any) -> Any:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["model"]["vocab"] |= {"<far>": 300, "<same>": 4}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        state["added_tokens"].append({"id": 300, "content": "<far>", **flags})
        (tmp_path / "gapped").mkdir(exist_ok=True)
        tokenizer.save_pretrained(tmp_path / "gapped")
        (tmp_path / "gapped" / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
        return t.AutoTokenizer.from_pretrained(tmp_path / "gapped")

    plain, one = gapped(bpe()), bpe(MARKERS)
    assert plain.get_vocab()["<far>"] == 300
    base = llama(301, plain)
    family = Family(tmp_path, {"base": (base, plain), "one": (tuned(base, {r: r for r in range(290)}, 292, 1), one)})
    # Saved by the library, one of two tokens with one id is lost, by chance
    shutil.copy(tmp_path / "gapped" / "tokenizer.json", tmp_path / "base" / "tokenizer.json")
    merged = family.merge(tokenizer="union")
    tokens = t.AutoTokenizer.from_pretrained(merged.folder).get_vocab()
    assert tokens["<far>"] == 300
    assert tokens["<|im_start|>"] == 301
    held = weights(merged.folder)["lm_head.weight"]
    for token in ("<far>", "<|im_start|>", "the"):
        torch.testing.assert_close(held[tokens[token]], family.mean("lm_head.weight", token))


# -- models of other kinds ---------------------------------------------------------------------------------------------
def _llava(rows: int, tokenizer: Any, image: int) -> Any:
    text = {"model_type": "llama", **GROUPED, "vocab_size": rows, **ids_of(tokenizer)}
    vision = {"model_type": "clip_vision_model", **IMAGE}
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(text_config=text, vision_config=vision, image_token_index=image)
    )


def _bart(rows: int, tokenizer: Any, _: int) -> Any:
    sizes = {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))
    }
    config = t.BartConfig(d_model=32, max_position_embeddings=40, vocab_size=rows, **sizes, **ids_of(tokenizer))
    model = t.BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return model


@pytest.mark.parametrize(
    ("make", "tensors"),
    [
        (_llava, {"model.language_model.embed_tokens.weight": 0, "lm_head.weight": 0}),
        (_bart, {"model.shared.weight": 0, "final_logits_bias": 1}),
    ],
)
def test_vocabularies_are_found_wherever_they_are(
    make: Callable[..., Any], tensors: dict[str, int], tmp_path: Path
) -> None:
    plain, one = bpe(["<image>"]), bpe([*MARKERS, "<image>"])
    torch.manual_seed(0)
    models = {"base": (make(291, plain, 290), plain), "one": (make(293, one, 292), one)}
    family = Family(tmp_path, models)
    merged = family.merge(tokenizer="one", output="as-one")
    assert_same(weights(merged.folder), weights(tmp_path / "one"))
    merged = family.merge(tokenizer="union")
    config = merged.load().config
    assert config.get_text_config().vocab_size == 293
    assert getattr(config, "image_token_index", 290) == 290
    tokens = t.AutoTokenizer.from_pretrained(merged.folder).get_vocab()
    held, own = (model.state_dict() for model in (merged.load(), family.models["one"]))
    for name, axis in tensors.items():
        for token in ("<image>", "<|im_end|>", "the"):
            place = family.tokens["one"][token]
            torch.testing.assert_close(held[name].select(axis, tokens[token]), own[name].select(axis, place))
    config = json.loads((tmp_path / "as-one" / "config.json").read_text())
    assert config.get("image_token_index", config.get("image_token_id", 292)) == 292


def test_task_heads_go_with_the_new_vocabulary(tmp_path: Path) -> None:
    plain, one = wordpiece(tmp_path / "w0", ["fox"]), wordpiece(tmp_path / "w1", ["fox"], ["[DRUG]"])
    config = t.BertConfig(**TEXT | {"vocab_size": len(plain)}, max_position_embeddings=40, pad_token_id=0)
    save(tmp_path / "base", t.BertModel(config), plain)
    sources = {}
    for name, tokenizer in {"one": one, "two": plain}.items():
        config = t.BertConfig(**TEXT | {"vocab_size": len(tokenizer)}, max_position_embeddings=40, pad_token_id=0)
        sources[name] = save(tmp_path / name, t.BertForSequenceClassification(config), tokenizer)
    merged = merge(tmp_path / "base", sources, "linear", tmp_path / "merged", tokenizer="union")
    tokenizer = t.AutoTokenizer.from_pretrained(merged.folder)
    for task in sources:
        model = merged.load(task)
        assert model.config.vocab_size == len(one)
        assert bool(model(**tokenizer("a fox [DRUG]", return_tensors="pt")).logits.isfinite().all())
        assert torch.equal(model.classifier.weight, weights(sources[task])["classifier.weight"])


# -- configuration, templates, adapters --------------------------------------------------------------------------------
def test_special_tokens_are_those_of_the_named_model(tmp_path: Path) -> None:
    plain, one = bpe(), bpe(MARKERS[::-1], eos_token="<|im_end|>")
    base = llama(290, plain)
    tuned_one = tuned(base, {row: row for row in range(290)}, 292, 1)
    tuned_one.config.eos_token_id = one.eos_token_id
    tuned_one.generation_config = t.GenerationConfig(eos_token_id=[one.eos_token_id, 1], bos_token_id=0)
    family = Family(tmp_path, {"base": (base, plain), "one": (tuned_one, one)})
    for mode, wanted in {"union": 1, "base": 1, "one": 290}.items():
        model = family.merge(tokenizer=mode, output=f"as-{mode}").load()
        assert model.config.eos_token_id == wanted
        assert model.generation_config.eos_token_id == ([290, 1] if mode == "one" else 1)


def test_settings_follow_their_tokens_to_other_rows(tmp_path: Path) -> None:
    plain = bpe()
    one = bpe(corpus=["lazy dogs"] * 9, size=280)
    base = llama(290, plain)
    base.generation_config = t.GenerationConfig(
        bos_token_id=0, eos_token_id=[1, plain.get_vocab()["the"]], suppress_tokens=[plain.get_vocab()["o"]]
    )
    family = Family(tmp_path, {"base": (base, plain), "one": (llama(len(one), one, 1), one)})
    (tmp_path / "one" / "generation_config.json").unlink()
    settings = json.loads((family.merge(tokenizer="one").folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [1]  # the source has no "the"
    assert settings["suppress_tokens"] == [one.get_vocab()["o"]]


TEMPLATE = "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (None, "base {{ 1 }}"),
        ("auto", TEMPLATE),
        ("one", TEMPLATE),
        ("base", "base {{ 1 }}"),
        ("mine {{ 2 }}", "mine {{ 2 }}"),
    ],
)
@pytest.mark.parametrize("tokenizer", [None, "union"])
def test_the_chat_template_is_the_one_asked_for(
    asked: str | None, found: str, tokenizer: str | None, tmp_path: Path
) -> None:
    plain = bpe()
    base = llama(290, plain)
    same = {row: row for row in range(290)}
    plain.chat_template = "base {{ 1 }}"
    save(tmp_path / "base", base, plain)
    plain.chat_template = TEMPLATE
    save(tmp_path / "one", tuned(base, same, 290, 1), plain)
    merged = merge(
        tmp_path / "base", {"one": tmp_path / "one"}, "linear", tmp_path / "m", tokenizer=tokenizer, chat_template=asked
    )
    assert t.AutoTokenizer.from_pretrained(merged.folder).chat_template == found


def test_a_template_inside_the_configuration_gives_way(chat: Family) -> None:
    path = chat.folder / "base" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "old {{ 1 }}"}), encoding="utf-8")
    merged = chat.merge(tokenizer="base", chat_template="new {{ 2 }}")
    assert "chat_template" not in json.loads((merged.folder / "tokenizer_config.json").read_text())
    assert t.AutoTokenizer.from_pretrained(merged.folder).chat_template == "new {{ 2 }}"


def test_adapters_have_the_bases_tokens_or_their_own(chat: Family) -> None:
    torch.manual_seed(0)
    model = llama(290, bpe())
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapter = get_peft_model(model, config)
    adapter.save_pretrained(chat.folder / "lora", save_embedding_layers=False)
    sources = {"one": chat.folder / "one", "lora": chat.folder / "lora"}
    merged = merge(chat.folder / "base", sources, "linear", chat.folder / "m", tokenizer="union")
    rows = weights(merged.folder)["model.embed_tokens.weight"]
    dense = adapter.merge_and_unload().state_dict()["model.embed_tokens.weight"]
    own = chat.models["one"].state_dict()["model.embed_tokens.weight"]
    torch.testing.assert_close(rows[:290], (dense + own[:290]) / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows[290:], own[290:])
    bpe(["[PAD]"]).save_pretrained(chat.folder / "lora")  # a padding token for training, without a row
    plan = hf_fda.plan(chat.folder / "base", {"lora": chat.folder / "lora"}, "linear", device="cpu")
    assert not plan.notes


def test_an_adapter_of_a_rounded_base_is_not_rounded(chat: Family) -> None:
    model = llama(290, bpe()).bfloat16()
    save(chat.folder / "half", model, bpe())
    config = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapter = get_peft_model(t.LlamaForCausalLM.from_pretrained(chat.folder / "half", dtype=torch.float32), config)
    adapter.save_pretrained(chat.folder / "lora", save_embedding_layers=False)
    bpe(MARKERS).save_pretrained(chat.folder / "lora")
    source = {"lora": chat.folder / "lora"}
    merged = merge(chat.folder / "half", source, "linear", chat.folder / "m", tokenizer="base", pad_to_multiple_of=64)
    dense = adapter.merge_and_unload().state_dict()["model.embed_tokens.weight"]
    torch.testing.assert_close(weights(merged.folder)["model.embed_tokens.weight"][:290], dense, rtol=1e-6, atol=1e-7)


def test_anchors_have_no_tokens(chat: Family) -> None:
    anchors = hf_fda.FunctionalDualAnchors.construct(
        chat.folder / "base", chat.folder / "one", device="cpu", num_anchors=4, num_tokens=2, steps=2
    )
    options: dict[str, Any] = {"initial": "base", "rest": "base", "parametrization": "parameters", "device": "cpu"}
    sources = {"one": anchors, "two": chat.folder / "two"}
    plan = hf_fda.plan(chat.folder / "base", sources, "fda", tokenizer="union", **options)
    assert plan.inputs.base.shape("lm_head.weight") == (294, 32)
    with pytest.raises(InputError, match="source 'one' is anchors only and has no tokens"):
        hf_fda.plan(chat.folder / "base", sources, "fda", tokenizer="one", **options)


def test_an_adapter_that_brings_more_rows_is_refused_with_the_way_out(chat: Family) -> None:
    model = llama(292, bpe(MARKERS))
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(chat.folder / "lora")
    with pytest.raises(
        InputError, match=r"source 'lora'.*embed_tokens.weight' of 292 rows, the base has 290.*merge_and"
    ):
        hf_fda.plan(chat.folder / "base", {"lora": chat.folder / "lora"}, "linear", tokenizer="union")


def test_a_fine_tune_with_more_tokens_becomes_an_adapter_of_the_base(chat: Family) -> None:
    with pytest.raises(InputError, match="tokenizer="):
        hf_fda.extract(chat.folder / "base", chat.folder / "one", chat.folder / "m", device="cpu", quiet=True)
    base, one, output = (str(chat.folder / name) for name in ("base", "one", "m"))
    words = ["extract", "--base", base, "--source", one, "--output", output, "--energy", "1", "--device", "cpu"]
    assert main([*words, "--tokenizer", "base", "--quiet"]) == 0
    dense = hf_fda.load(output).merge_and_unload().state_dict()["model.embed_tokens.weight"]
    own = chat.models["one"].state_dict()["model.embed_tokens.weight"]
    torch.testing.assert_close(dense, own[:290], rtol=1e-4, atol=1e-5)


def test_an_adapter_comes_out_of_sources_with_more_tokens(chat: Family) -> None:
    merged = chat.merge("task_arithmetic", tokenizer="base", as_adapter=True, scaling=0.5)
    merged_whole = chat.merge("task_arithmetic", output="whole", tokenizer="base", scaling=0.5)
    dense = merged.load().merge_and_unload().state_dict()
    for name, tensor in weights(merged_whole.folder).items():
        torch.testing.assert_close(dense[name], tensor, rtol=1e-4, atol=1e-5)


# -- made again --------------------------------------------------------------------------------------------------------
def test_interrupted_and_made_again_the_bytes_are_the_same(chat: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"tokenizer": "union", "max_shard_bytes": 40_000, "pad_to_multiple_of": 8}
    whole = files(chat.merge("fda", output="whole", **options).folder)
    from hf_fda import assembly

    original, calls = assembly.CheckpointAssembly._fill, []

    def breaks_off(self: Any, path: Path, shard: Any) -> None:
        calls.append(shard.file)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(self, path, shard)

    monkeypatch.setattr(assembly.CheckpointAssembly, "_fill", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        chat.merge("fda", output="again", **options)
    monkeypatch.setattr(assembly.CheckpointAssembly, "_fill", original)
    assert files(chat.merge("fda", output="again", **options).folder) == whole


def test_a_command_line_and_its_record_make_the_same(chat: Family, capsys: pytest.CaptureFixture[str]) -> None:
    rules = {"<tool>": {"source": {"kind": "zero"}, "force": True}}
    first = chat.merge(tokenizer="union", tokens=rules, chat_template="{{ 1 }}", pad_to_multiple_of=4)
    command = ["merge", str(first.folder / "merge_config.yaml"), "--output", str(chat.folder / "again"), "--quiet"]
    assert main([*command, "--device", "cpu"]) == 0
    assert files(chat.folder / "again") == files(first.folder)
    sources = [word for name, path in chat.sources.items() for word in ("--source", f"{name}={path}")]
    words = ["plan", "--base", str(chat.folder / "base"), *sources, "--method", "linear", "--device", "cpu"]
    assert main([*words, "--tokenizer", "union", "--pad-to-multiple-of", "4"]) == 0
    said = capsys.readouterr().out
    assert "tokens    those of base and sources: 294 in 296 rows" in said
    assert "the base: 4 tokens added as the mean of the sources that have them" in said
    assert "source 'one': 2 tokens taken from the base (<tool>, zebra)" in said
    assert "source 'two': 2 tokens moved to other rows" in said


def test_another_choice_in_one_folder_leaves_nothing_behind(chat: Family) -> None:
    chat.merge(tokenizer="union", chat_template="{{ 1 }}")
    merged = chat.merge(tokenizer="base")
    assert files(merged.folder) == files(chat.merge(tokenizer="base", output="fresh").folder)
    assert "tokens added" not in (merged.folder / "README.md").read_text(encoding="utf-8")


def test_the_card_says_what_was_done_to_each_model(chat: Family) -> None:
    card = (chat.merge(tokenizer="union").folder / "README.md").read_text(encoding="utf-8")
    assert "source 'one': 2 tokens taken from the base (<tool>, zebra); 292 rows become 294" in card
    assert "| tokenizer | union |" in card
