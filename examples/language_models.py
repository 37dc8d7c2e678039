"""Train two small language models on two kinds of real text, and merge them by divergence.

    python examples/language_models.py --tasks DIR [--work language_models] [--seeds 0 1 2]

`--tasks` holds `TASK.train.jsonl` and `TASK.test.jsonl` with `text`: news (agnews), questions (trec), and film reviews
and other sentences (sst2, subj, mrpc), which the base learns too. A fine-tune learns the texts of its own kind alone.
The merge gets unlabelled training texts of both kinds, compares the distributions of the next token position by
position, and is judged by perplexity on test texts, beside averages in parameter space. Training takes minutes on one
core and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_fda

KINDS = {"news": "agnews", "questions": "trec"}
TEXTS = ("agnews", "trec", "sst2", "subj", "mrpc")
MAX_TOKENS = 64
BASE_STEPS, FINE_TUNE_STEPS, BATCH = 1000, 400, 32
MERGES: dict[str, dict[str, Any]] = {
    "linear (average)": {"method": "linear"},
    "task_arithmetic 0.4": {"method": "task_arithmetic", "scaling": 0.4},
    "task_arithmetic 0.7": {"method": "task_arithmetic", "scaling": 0.7},
    "task_arithmetic 1.0": {"method": "task_arithmetic", "scaling": 1.0},
    "ties": {"method": "ties", "density": 0.2},
    "tsv": {"method": "tsv"},
    "adamerging": {"method": "adamerging"},
    "divmerge, task": {"method": "divmerge", "granularity": "task"},
    "divmerge, block": {"method": "divmerge", "granularity": "block"},
    "divmerge, tensor": {"method": "divmerge", "granularity": "tensor"},
    "divmerge, tensor, top 50": {"method": "divmerge", "granularity": "tensor", "top_k": 50},
    "divmerge, tensor, forward-kl": {"method": "divmerge", "granularity": "tensor", "divergence": "forward-kl"},
    "divmerge of task vectors, tensor": {"method": "divmerge", "initial": "task_arithmetic"},
}


def read(tasks: Path, name: str, split: str) -> list[str]:
    """All texts of a task."""
    with open(tasks / f"{name}.{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["text"].strip() for line in file]


def new_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 2,048 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=MAX_TOKENS
    )


def new_model(seed: int) -> Any:
    """A Llama of 1.3M parameters with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: Any, texts: Sequence[str], seed: int) -> Iterator[dict[str, Tensor]]:
    """Texts in random order, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for part in torch.randperm(len(texts), generator=generator).split(BATCH):
            yield encoded(tokenizer, [texts[row] for row in part.tolist()])


def encoded(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """A batch with its labels."""
    batch = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def train(model: Any, rows: Iterator[dict[str, Tensor]], steps: int, learning_rate: float) -> Any:
    """Train by AdamW with a warm-up and a cosine decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        model(**next(rows)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def make_family(work: Path, tasks: Path, seed: int) -> None:
    """Train the base and both fine-tunes, those that are not there yet."""
    base = work / "base"
    if not (base / "config.json").is_file():
        texts = [text for name in TEXTS for text in read(tasks, name, "train")]
        made = new_tokenizer(texts)
        print(f"training the base, seed {seed}", flush=True)
        train(new_model(seed), batches(made, texts, seed), BASE_STEPS, 3e-3).save_pretrained(base)
        made.save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for kind, name in KINDS.items():
        if not (work / kind / "config.json").is_file():
            print(f"fine-tuning it to {kind}", flush=True)
            model = AutoModelForCausalLM.from_pretrained(base)
            rows = batches(tokenizer, read(tasks, name, "train"), seed)
            train(model, rows, FINE_TUNE_STEPS, 1e-3).save_pretrained(work / kind)
            tokenizer.save_pretrained(work / kind)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Of the tokens after the first, given those before."""
    nats, tokens = 0.0, 0
    for start in range(0, len(texts), 64):
        batch = encoded(tokenizer, sorted(texts, key=len)[start : start + 64])
        counted = int((batch["labels"][:, 1:] != -100).sum())
        nats += float(model(**batch).loss) * counted
        tokens += counted
    return math.exp(nats / tokens)


def main() -> None:
    """Train, merge, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, required=True, help="TASK.train.jsonl and TASK.test.jsonl")
    parser.add_argument("--work", type=Path, default=Path("language_models"), help="models and merges")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each trains a family of its own")
    parser.add_argument("--rows", type=int, default=500, help="unlabelled texts of each kind for the merges")
    options = parser.parse_args()
    test = {kind: read(options.tasks, name, "test") for kind, name in KINDS.items()}
    data = {
        kind: {"path": str(options.tasks / f"{name}.train.jsonl"), "columns": "text"} for kind, name in KINDS.items()
    }
    found: dict[str, list[list[float]]] = {}
    for seed in options.seeds:
        work = options.work / f"seed{seed}"
        make_family(work, options.tasks, seed)
        tokenizer = AutoTokenizer.from_pretrained(work / "base")
        for name in ("base", *KINDS):
            model = AutoModelForCausalLM.from_pretrained(work / name).eval()
            found.setdefault(name, []).append([perplexity(model, tokenizer, texts) for texts in test.values()])
        for label, arguments in MERGES.items():
            start = time.perf_counter()
            looks = {"data": data, "rows": options.rows} if arguments["method"] in ("divmerge", "adamerging") else {}
            output = work / "merges" / label.replace(", ", "-").replace(" ", "-")
            sources = {kind: str(work / kind) for kind in KINDS}
            merged = hf_fda.merge(
                str(work / "base"), sources, output=output, quiet=True, seed=seed, **arguments, **looks
            )
            seconds = time.perf_counter() - start
            model = merged.load().eval()
            found.setdefault(label, []).append([*(perplexity(model, tokenizer, own) for own in test.values()), seconds])
    print("\n| model | " + " | ".join(KINDS) + " | seconds |\n|" + " --- |" * (len(KINDS) + 2))
    for label, runs in found.items():
        cells = [f"{statistics.mean(column):.2f}" for column in zip(*runs, strict=True)]
        print("| " + " | ".join([label, *cells, *[""] * (len(KINDS) + 1 - len(cells))]) + " |")


if __name__ == "__main__":
    main()
