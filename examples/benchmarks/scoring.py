"""How well a merged encoder does what its sources do, on real rows: shared by the benchmarks of this folder."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Score:
    """A model on one task: the fraction of rows whose label it gives, and the mean Kullback-Leibler divergence of its
    answers from the task's own fine-tune's, in nats."""

    accuracy: float
    divergence: float


class Rows:
    """The rows of all tasks, cut into batches, and what the tasks' own fine-tunes answer.

    Args:
        checkpoints: holds a folder `base` and one folder for each fine-tune, named after its task.
        tasks: holds `TASK.train.jsonl` and `TASK.test.jsonl` with `text`, perhaps `text_pair`, and `label`.
        split: "train" (its last rows) or "test" (its first).
        limit: rows a task at most.
        names: tasks; all there are if None.
    """

    def __init__(
        self, checkpoints: Path, tasks: Path, split: str, limit: int, names: Sequence[str] | None = None
    ) -> None:
        from transformers import AutoTokenizer

        self.checkpoints = checkpoints
        self.names = list(names or task_names(checkpoints))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoints / "base")
        self.batches: dict[str, list[dict[str, Tensor]]] = {}
        self.labels: dict[str, Tensor] = {}
        for name in self.names:
            rows = read_rows(tasks, name, split)
            rows = rows[-limit:] if split == "train" else rows[:limit]
            self.batches[name], self.labels[name] = self._batches(rows)
        self.own = {name: self.answers(self.fine_tune(name), name) for name in self.names}

    def _batches(self, rows: list[dict[str, Any]], size: int = 64) -> tuple[list[dict[str, Tensor]], Tensor]:
        rows = sorted(rows, key=lambda row: len(row["text"]) + len(row.get("text_pair", "")))  # little padding
        batches = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            pairs = [row["text_pair"] for row in part] if "text_pair" in part[0] else None
            texts = [row["text"] for row in part]
            batches.append(
                dict(self.tokenizer(texts, pairs, truncation=True, max_length=64, padding=True, return_tensors="pt"))
            )
        return batches, torch.tensor([row["label"] for row in rows])

    def fine_tune(self, name: str) -> Any:
        """A task's own fine-tune."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(self.checkpoints / name).eval()

    @torch.no_grad()
    def answers(self, model: Any, name: str) -> Tensor:
        """Log-probabilities of the labels, (rows, labels)."""
        return torch.cat([model(**batch).logits.log_softmax(-1) for batch in self.batches[name]])

    def score(self, model: Any, name: str) -> Score:
        """A model's score on one task."""
        answers = self.answers(model.eval(), name)
        right = (answers.argmax(-1) == self.labels[name]).float().mean()
        apart = functional.kl_div(answers, self.own[name], log_target=True, reduction="batchmean")
        return Score(float(right), float(apart))

    def score_merged(self, folder: Path) -> dict[str, Score]:
        """A merged folder's score on every task, with the task's own head."""
        import hf_fda

        merged = hf_fda.Merged(folder)
        return {name: self.score(merged.load(task=name), name) for name in self.names}


def parser(description: str | None, work: str, limit: int, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """The arguments that these benchmarks have in common, with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folders `base` and one for each task")
    parser.add_argument("--tasks", type=Path, required=True, help="TASK.train.jsonl and TASK.test.jsonl")
    parser.add_argument("--work", type=Path, default=Path(work), help=f"where merges go (default {work}/)")
    parser.add_argument("--limit", type=int, default=limit, help=f"rows a task at most (default {limit})")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="seeds of the FDA merges")
    return parser


def task_names(checkpoints: Path) -> list[str]:
    """The fine-tunes in a folder of checkpoints."""
    return sorted(path.name for path in checkpoints.iterdir() if path.is_dir() and path.name != "base")


def read_rows(tasks: Path, task: str, split: str) -> list[dict[str, Any]]:
    """All rows of a task."""
    with open(tasks / f"{task}.{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def average(scores: dict[str, Score]) -> Score:
    """The mean over tasks."""
    return Score(
        statistics.mean(score.accuracy for score in scores.values()),
        statistics.mean(score.divergence for score in scores.values()),
    )


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, for a table."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean
