"""A small family of decoders on real text: a Llama-shaped base and full fine-tunes that answer a row with its label.

    from decoder_family import evaluate, make_family, open_model, open_rows, open_tokenizer

    base, tuned = make_family(Path("family0"), Path("tasks"), seed=0)
    rows = open_rows(Path("tasks"), "trec", "validation")
    evaluate(open_model(tuned["trec"]), open_tokenizer(base), rows)  # -> Score(loss, accuracy)

The base learns the raw texts of all tasks. A fine-tune learns `TEXT label: WORD` on the rows of its own task, so that
the same prompt asks each for something else; the texts of sst2 and subj are both film reviews. Words are compared by
likelihood among the task's own. Embeddings are not tied to the output layer, as in Llama 2.

`tasks/` holds `TASK.train.jsonl` and `TASK.test.jsonl` with `text` and `label`. Settings are to be chosen on
"validation" rows: the last of the training file, which nothing here learns from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_fda.demo.records import made_from, save
from hf_fda.version import versions

WORDS: dict[str, tuple[str, ...]] = {
    "agnews": ("world", "sports", "business", "technology"),
    "sst2": ("bad", "good"),
    "subj": ("opinion", "story"),
    "trec": ("abbreviation", "thing", "description", "person", "place", "number"),
}
"""The word that stands for each label of a task."""

PROMPT = " label:"
SPECIAL = ("<s>", "</s>")
MAX_TOKENS = 80
VALIDATION_ROWS = 500
MODEL: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, by AdamW with a warm-up of a tenth of the steps and a cosine decay."""

    steps: int
    learning_rate: float
    batch_size: int = 32
    weight_decay: float = 0.01
    text_weight: float = 1.0


BASE = Recipe(steps=1600, learning_rate=3e-3, weight_decay=0.1)
FINE_TUNE = Recipe(steps=400, learning_rate=4e-4, text_weight=0.3)


@dataclass(frozen=True)
class Rows:
    """Rows of one task."""

    task: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Nats per token of the text alone, and the fraction of rows whose label word is the likeliest of the task's."""

    loss: float
    accuracy: float


def open_rows(tasks_dir: Path, task: str, split: Split) -> Rows:
    """The rows of a task."""
    name = "test" if split == "test" else "train"
    with open(tasks_dir / f"{task}.{name}.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if split == "train":
        rows = rows[:-VALIDATION_ROWS]
    elif split == "validation":
        rows = rows[-VALIDATION_ROWS:]
    return Rows(task, tuple(row["text"].strip() for row in rows), tuple(row["label"] for row in rows))


def make_family(
    folder: Path, tasks_dir: Path, seed: int, say: Callable[[str], None] = lambda _: None
) -> tuple[Path, dict[str, Path]]:
    """Train and save the base and a fine-tune for each task, or take those of an earlier run with the same settings.

    Args:
        folder: holds a folder for each model, and beside it `<name>.json`: what it was made from.
        tasks_dir: the rows.
        seed: of the base's weights and of the order of all rows.
        say: told what is going on.

    Returns:
        the base's folder and the fine-tunes' by task.
    """
    rows = {task: open_rows(tasks_dir, task, "train") for task in WORDS}
    digest = hashlib.sha256(json.dumps([asdict(part) for part in rows.values()]).encode()).hexdigest()
    origin = {"model": MODEL, "words": WORDS, "seed": seed, "rows": digest, "versions": versions()}
    facts: dict[str, Any] = json.loads(json.dumps({**origin, "base": asdict(BASE)}))
    base = folder / "base"
    if not made_from(base, facts):
        say("training the base on the texts of all tasks")
        tokenizer = new_tokenizer(list(rows.values()))
        stream = text_stream(tokenizer, list(rows.values()), seed)
        save(base, facts, train(_new_model(seed), stream_batches(stream, seed), BASE), tokenizer)
    tokenizer, tuned = open_tokenizer(base), {}
    for task, part in rows.items():
        tuned[task] = folder / task
        own = {**facts, "task": task, "fine_tune": asdict(FINE_TUNE)}
        if not made_from(tuned[task], own):
            say(f"fine-tuning it to {task}")
            model = train(open_model(base), row_batches(tokenizer, part, seed), FINE_TUNE)
            save(tuned[task], own, model, tokenizer)
    return base, tuned


def evaluate(model: Any, tokenizer: Any, rows: Rows, batch_size: int = 64) -> Score:
    """Score a causal language model on the rows of one task, `batch_size` rows at a time."""
    model.eval()
    words, encoded = word_ids(tokenizer, rows.task), encode(tokenizer, rows)
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))  # little padding
    loss, tokens, right = 0.0, 0, 0
    for start in range(0, len(order), batch_size):
        ids, text, last = collate([encoded[row] for row in order[start : start + batch_size]], tokenizer)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        loss += functional.cross_entropy(logits[:, :-1][text], ids[:, 1:][text], reduction="sum").item()
        tokens += int(text.sum())
        at_label = logits[torch.arange(len(ids)), last - 1]
        guess = torch.tensor(words)[at_label[:, words].argmax(-1)]
        right += int((guess == ids[torch.arange(len(ids)), last]).sum())
    return Score(loss / tokens, right / len(encoded))


def train(model: Any, batches: Iterator[tuple[Tensor, Tensor, Tensor | None]], recipe: Recipe) -> Any:
    """Train a decoder in place and return it in evaluation mode.

    Args:
        model: the decoder.
        batches: without end: token ids (n, T), where the next token is text (n, T - 1), and the label words' positions
            (n,) or None. The loss is the mean over the text's tokens, plus the mean over label words.
        recipe: how.
    """
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.95), fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(recipe.steps):
        ids, text, last = next(batches)
        logits = model(input_ids=ids).logits
        loss = recipe.text_weight * functional.cross_entropy(logits[:, :-1][text], ids[:, 1:][text])
        if last is not None:
            row = torch.arange(len(ids))
            loss = loss + functional.cross_entropy(logits[row, last - 1], ids[row, last])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def text_stream(tokenizer: Any, parts: Sequence[Rows], seed: int) -> Tensor:
    """All texts in random order as one row of tokens, each after the token of a beginning."""
    texts = [text for rows in parts for text in rows.texts]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    encoded = tokenizer([texts[row] for row in order], add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (tokenizer.bos_token_id, *ids)])


def stream_batches(stream: Tensor, seed: int, length: int = 48) -> Iterator[tuple[Tensor, Tensor, None]]:
    """Windows of the texts from random places, without end."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.ones(BASE.batch_size, length - 1, dtype=torch.bool)
    while True:
        starts = torch.randint(len(stream) - length, (BASE.batch_size, 1), generator=generator)
        yield stream[starts + torch.arange(length)], text, None


def row_batches(tokenizer: Any, rows: Rows, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows with their labels in random order, without end. Rows of like length go together: little padding."""
    generator, encoded = torch.Generator().manual_seed(seed), encode(tokenizer, rows)
    size = FINE_TUNE.batch_size
    while True:
        for pool in torch.randperm(len(encoded), generator=generator).split(8 * size):
            ordered = sorted(pool.tolist(), key=lambda row: len(encoded[row]))
            batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
            for batch in torch.randperm(len(batches), generator=generator).tolist():
                yield collate([encoded[row] for row in batches[batch]], tokenizer)


def encode(tokenizer: Any, rows: Rows) -> list[list[int]]:
    """Token ids of each row: a beginning, the text (cut where it is too long), the prompt, the label's word."""
    prompt, words = tokenizer(PROMPT, add_special_tokens=False)["input_ids"], word_ids(tokenizer, rows.task)
    room = MAX_TOKENS - len(prompt) - 2
    texts = tokenizer(list(rows.texts), add_special_tokens=False)["input_ids"]
    labelled = zip(texts, rows.labels, strict=True)
    return [[tokenizer.bos_token_id, *ids[:room], *prompt, words[label]] for ids, label in labelled]


def collate(encoded: Sequence[list[int]], tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as one batch: ids (n, T), padded on the right, which a causal model does not see; where the next token is
    text (n, T - 1); and the position of each label's word (n,)."""
    prompt = len(tokenizer(PROMPT, add_special_tokens=False)["input_ids"])
    last = torch.tensor([len(ids) - 1 for ids in encoded])
    ids = torch.full((len(encoded), int(last.max()) + 1), tokenizer.eos_token_id)
    for row, own in zip(ids, encoded, strict=True):
        row[: len(own)] = torch.tensor(own)
    return ids, torch.arange(ids.shape[1] - 1) < (last - prompt - 1)[:, None], last


def word_ids(tokenizer: Any, task: str) -> list[int]:
    """The token of each label's word, in the order of labels."""
    encoded = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in WORDS[task]]
    if any(len(ids) != 1 for ids in encoded):
        raise ValueError(f"the label words of {task} are not one token each: {encoded}")
    return [ids[0] for ids in encoded]


def new_tokenizer(parts: Sequence[Rows]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the labelled rows, so that every label's word becomes one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [text for rows in parts for text in rows.texts]
    lines += [f"{PROMPT} {word}" for words in WORDS.values() for word in words for _ in range(1000)]
    tokenizer.train_from_iterator(lines, trainer)
    bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)


def open_model(folder: Path) -> Any:
    """A saved decoder, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a saved decoder."""
    return AutoTokenizer.from_pretrained(folder)


def _new_model(seed: int) -> Any:
    """A decoder with random weights; the global random stream is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**MODEL))
