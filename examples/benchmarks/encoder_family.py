"""Fine-tune an encoder on every task, all weights, as another family that merges can be judged on by `arena.py`.

    python examples/benchmarks/encoder_family.py --base DIR --tasks DIR --output DIR [--seed 0]

`--tasks` holds `TASK.train.jsonl` with `text`, perhaps `text_pair`, and `label`; the first rows of each are learned
from, and never the last 400, on which settings are chosen. `--output` gets a copy of the base and a folder for each
task, as `arena.py` takes them. A fine-tune that is there is not made again.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from scoring import read_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

HELD_BACK = 400
"""The last training rows of a task, which nothing here learns from."""

ROWS, PASSES, BATCH = 2000, 2, 32
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 5e-5, 0.01, 0.1
MAX_LENGTH = 64


def batches(rows: list[dict[str, Any]], seed: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of all passes, in random order; rows of like length go together."""
    stream = random.Random(seed)
    for _ in range(PASSES):
        order = stream.sample(rows, len(rows))
        pools = [order[start : start + 8 * BATCH] for start in range(0, len(order), 8 * BATCH)]
        for pool in pools:
            pool.sort(key=lambda row: len(row["text"]))
            parts = [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
            yield from stream.sample(parts, len(parts))


def fine_tune(base: Path, rows: list[dict[str, Any]], seed: int) -> tuple[Any, Any]:
    """A classifier of the rows' labels with its tokenizer, by AdamW with a warm-up and a linear decay."""
    torch.manual_seed(seed)
    labels = 1 + max(row["label"] for row in rows)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels).train()
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    given = list(batches(rows, seed))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARM_UP * len(given)), (1 - step / len(given)) / (1 - WARM_UP))
    )
    for batch in given:
        pairs = [row["text_pair"] for row in batch] if "text_pair" in batch[0] else None
        texts = [row["text"] for row in batch]
        encoded = tokenizer(texts, pairs, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
        loss = model(**encoded, labels=torch.tensor([row["label"] for row in batch])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), tokenizer


def main() -> None:
    """Parse, fine-tune, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--tasks", type=Path, required=True, help="TASK.train.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="where the base and the fine-tunes go")
    parser.add_argument("--seed", type=int, default=0, help="of the heads and of the order of the rows")
    options = parser.parse_args()
    if not (options.output / "base").is_dir():
        shutil.copytree(options.base, options.output / "base")
    for path in sorted(options.tasks.glob("*.train.jsonl")):
        task = path.name.removesuffix(".train.jsonl")
        folder = options.output / task
        if folder.is_dir():
            continue
        rows = read_rows(options.tasks, task, "train")[:-HELD_BACK][:ROWS]
        model, tokenizer = fine_tune(options.base, rows, options.seed)
        unfinished = options.output.with_name(f"{options.output.name}.part") / task
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
        print(f"fine-tuned to {task}", flush=True)


if __name__ == "__main__":
    main()
