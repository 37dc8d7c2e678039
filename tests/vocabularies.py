"""Small real tokenizers, with tokens added as fine-tunes do, and models whose rows go with them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as t
from conftest import GROUPED, TEXT
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 20
MARKERS = [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]


def bpe(added: Sequence[Any] = (), corpus: Sequence[str] = CORPUS, size: int = 290, **settings: Any) -> Any:
    """A byte-level BPE tokenizer trained on a few words, with added tokens; the same for the same words."""
    tokenizer = Tokenizer.from_str(_trained(tuple(corpus), size))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **settings}
    fast = t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.add_tokens(list(added))
    return fast


@functools.cache
def _trained(corpus: tuple[str, ...], size: int) -> str:
    """A tokenizer without added tokens, as text: training breaks ties by chance."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return str(tokenizer.to_str())


def wordpiece(folder: Path, words: Sequence[str], added: Sequence[Any] = ()) -> Any:
    """A BERT tokenizer of some whole words and all letters, with added tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "words.txt"
    path.write_text("\n".join([*special, *letters, *(f"##{letter}" for letter in letters), *words]), encoding="utf-8")
    tokenizer = t.BertTokenizer(str(path))
    tokenizer.add_tokens(list(added))
    return tokenizer


def ids_of(tokenizer: Any) -> dict[str, Any]:
    """The ids of a tokenizer's special tokens, as a configuration states them."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}


def llama(rows: int, tokenizer: Any, seed: int = 0, **changes: Any) -> Any:
    """A tiny language model with so many rows."""
    torch.manual_seed(seed)
    return t.LlamaForCausalLM(t.LlamaConfig(**GROUPED | {"vocab_size": rows} | ids_of(tokenizer) | changes)).eval()


def bert(rows: int, seed: int = 0, **changes: Any) -> Any:
    """A tiny masked language model, whose decoder has a bias."""
    torch.manual_seed(seed)
    config = t.BertConfig(**TEXT | {"vocab_size": rows}, max_position_embeddings=40, pad_token_id=0, **changes)
    model = t.BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()  # a new one is zero
    return model


def tuned(base: Any, places: Mapping[int, int], rows: int, seed: int) -> Any:
    """A fine-tune of a model with other rows: those of `places` (own row: base's row) are the base's, moved a little;
    all others are new."""
    torch.manual_seed(seed)
    config = copy.deepcopy(base.config)
    config.vocab_size = rows
    model, old = type(base)(config).eval(), base.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            before = old[name]
            if len(before) != base.config.vocab_size:
                parameter.copy_(before)
            else:
                parameter.normal_()
                for own, row in places.items():
                    parameter[own] = before[row]
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def save(folder: Path, model: Any, tokenizer: Any | None) -> Path:
    """A model in a folder with its tokenizer."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
