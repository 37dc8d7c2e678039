"""Train LoRA adapters on real text, merge them with every method, and compare with PEFT's own combinations.

    python examples/adapters.py --base DIR --tasks DIR [--work adapters] [--limit 500] [--split test]

`--base` is a BERT-shaped encoder with its tokenizer; `--tasks` holds `TASK.train.jsonl` and `TASK.test.jsonl` with
`text`, perhaps `text_pair`, and `label`. An adapter is trained for each task of `ADAPTERS`, once: a later run takes it
from `--work`. Ranks differ, one adapter is rank-stabilised, one is DoRA. Pooler and classifier are trained whole beside
the factors (PEFT's `modules_to_save`) and stay each task's own, so that rows of the table differ in the merged body
alone.

Printed: accuracy by task and on average; the ranks of the merged adapter's factors, and what these leave out of the
merge as a fraction of it; seconds of the merge. Adapters learn from all training rows but the last 500, which
`--split train` scores on. Nothing is chosen on test rows: the settings are those written here. Models are trained and
scored with bfloat16 products, which is twice as fast where the processor has them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import hf_fda
from hf_fda.demo.records import made_from, save

ADAPTERS: dict[str, dict[str, Any]] = {
    "agnews": {"r": 8, "lora_alpha": 16},
    "mrpc": {"r": 16, "lora_alpha": 32},
    "sst2": {"r": 8, "lora_alpha": 8, "use_rslora": True},
    "subj": {"r": 4, "lora_alpha": 8},
    "trec": {"r": 16, "lora_alpha": 32, "use_dora": True},
}
"""What is special to each task's adapter."""

SHARED: dict[str, Any] = {
    "task_type": "SEQ_CLS",
    "target_modules": ["query", "value", "intermediate.dense", "output.dense"],
    "modules_to_save": ["pooler"],
}
"""What all adapters have in common; the classifier is kept by the task type."""

TRAINING: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-3, "head_learning_rate": 2e-3, "batch_size": 32, "seed": 0}
VALIDATION_ROWS = 500

MERGES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "task_arithmetic 0.3": {"method": "task_arithmetic", "scaling": 0.3},
    "task_arithmetic 0.5": {"method": "task_arithmetic", "scaling": 0.5},
    "task_arithmetic 1.0": {"method": "task_arithmetic", "scaling": 1.0},
    "tsv 1.0": {"method": "tsv", "scaling": 1.0},
    "tsv 1.0, rank 16": {"method": "tsv", "scaling": 1.0, "rank": 16},
    "isotropic 1.0": {"method": "isotropic", "scaling": 1.0},
    "isotropic 2.0": {"method": "isotropic", "scaling": 2.0},
    "isotropic 3.0": {"method": "isotropic", "scaling": 3.0},
    "wudi": {"method": "wudi"},
    "fda": {"method": "fda"},
    "fda, rank 16": {"method": "fda", "rank": 16},
    "fda, rank 8": {"method": "fda", "rank": 8},
    "fda on coefficients, rank 16": {"method": "fda", "parametrization": "coefficients", "rank": 16},
    "fda on coefficients, rank 8": {"method": "fda", "parametrization": "coefficients", "rank": 8},
    "fda from isotropic 3.0": {"method": "fda", "initial": "isotropic", "scaling": 3.0},
    "fda from isotropic 3.0, rank 16": {"method": "fda", "initial": "isotropic", "scaling": 3.0, "rank": 16},
    "fda from tsv 1.0": {"method": "fda", "initial": "tsv", "scaling": 1.0},
}
"""Arguments of `hf_fda.merge`, by row. The first fda row makes the anchors, and the others use them."""

COMBINATIONS: dict[str, tuple[float, ...]] = {
    "linear": (0.2,),
    "ties": (0.2,),
    "dare_ties": (0.2,),
    "magnitude_prune": (0.2,),
    "cat": (0.2, 0.5, 1.0),
    "svd": (0.2, 0.5, 1.0),
    "ties_svd": (0.2, 1.0),
    "dare_ties_svd": (0.2, 1.0),
    "magnitude_prune_svd": (0.2, 1.0),
}
"""PEFT's combination types, with the weights that every adapter gets; density is 0.5 where it counts."""


@dataclass
class Rows:
    """Rows of one task, tokenized in batches of about one length."""

    batches: list[dict[str, Tensor]]
    labels: Tensor

    def accuracy(self, model: Any) -> float:
        """The fraction of rows whose label a classifier gives."""
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            answers = torch.cat([model(**batch).logits.argmax(-1) for batch in self.batches])
        return float((answers == self.labels).float().mean())


def read_rows(tasks: Path, task: str, split: str) -> list[dict[str, Any]]:
    """The rows of a task: "test", "validation" (the last of the training file) or "train" (the others)."""
    name = "test" if split == "test" else "train"
    with open(tasks / f"{task}.{name}.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return rows if split == "test" else rows[-VALIDATION_ROWS:] if split == "validation" else rows[:-VALIDATION_ROWS]


def tokenized(tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows as a model takes them."""
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    texts = [row["text"] for row in rows]
    return dict(tokenizer(texts, pairs, truncation=True, max_length=64, padding=True, return_tensors="pt"))


def batched(tokenizer: Any, rows: list[dict[str, Any]], size: int = 64) -> Rows:
    """Rows in the order of their length, for little padding."""
    rows = sorted(rows, key=lambda row: len(row["text"]) + len(row.get("text_pair", "")))
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return Rows([tokenized(tokenizer, part) for part in parts], torch.tensor([row["label"] for row in rows]))


def train_adapter(base: Path, tokenizer: Any, rows: list[dict[str, Any]], special: dict[str, Any]) -> Any:
    """An adapter of the base that learned a task, by AdamW with a warm-up and a decay to zero."""
    torch.manual_seed(TRAINING["seed"])
    labels = 1 + max(row["label"] for row in rows)
    config = LoraConfig(**copy.deepcopy(SHARED), **special)  # PEFT adds to the lists that it is given
    model: Any = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels), config)
    named = [(name, own) for name, own in model.named_parameters() if own.requires_grad]
    rates = [TRAINING["learning_rate"], TRAINING["head_learning_rate"]]
    groups = [
        {"params": [own for name, own in named if "lora_" in name], "lr": rates[0]},
        {"params": [own for name, own in named if "lora_" not in name], "lr": rates[1]},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    size = TRAINING["batch_size"]
    total = TRAINING["epochs"] * -(-len(rows) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=total, pct_start=0.1)
    model.train()
    for _ in range(TRAINING["epochs"]):
        for batch in torch.randperm(len(rows)).split(size):
            chosen = [rows[index] for index in batch.tolist()]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(**tokenized(tokenizer, chosen)).logits
            loss = functional.cross_entropy(logits.float(), torch.tensor([row["label"] for row in chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def make_adapters(base: Path, tasks: Path, folder: Path, tokenizer: Any) -> dict[str, Path]:
    """Train and save an adapter for each task, or take those of an earlier run with the same settings."""
    made = {}
    for task, special in ADAPTERS.items():
        made[task] = folder / task
        facts = {"base": str(base), "task": task, "adapter": {**SHARED, **special}, "training": TRAINING}
        if not made_from(made[task], facts):
            start = time.perf_counter()
            save(made[task], facts, train_adapter(base, tokenizer, read_rows(tasks, task, "train"), special))
            print(f"trained an adapter for {task} in {time.perf_counter() - start:.0f} s", flush=True)
    return made


class Combined:
    """The adapters in one PEFT model, for PEFT's own combinations.

    PEFT refuses to combine adapters that bring modules whole, and one model has room for the labels of one task. So the
    adapters go in without pooler and classifier, and the model gets each task's own before it is scored.
    """

    def __init__(self, base: Path, adapters: dict[str, Path]) -> None:
        model: Any = None
        self.heads: dict[str, dict[str, Tensor]] = {}
        for task, folder in adapters.items():
            config, state = PeftConfig.from_pretrained(str(folder)), load_file(folder / "adapter_model.safetensors")
            config.modules_to_save = config.task_type = None
            if model is None:
                model = PeftModel(AutoModelForSequenceClassification.from_pretrained(base), config, task)
            else:
                model.add_adapter(task, config)
            body = {name: own for name, own in state.items() if ".lora_" in name}
            set_peft_model_state_dict(model, body, task)
            self.heads[task] = {
                name.removeprefix("base_model.model."): own for name, own in state.items() if name not in body
            }
        self.model, self.names = model.eval(), list(adapters)

    def combine(self, kind: str, weight: float) -> None:
        """Put PEFT's combination into the model's weights."""
        self.model.unmerge_adapter()
        torch.manual_seed(0)  # of dare
        pruned = {} if kind in ("linear", "cat", "svd") else {"density": 0.5}
        name = f"{kind}-{weight}".replace(".", "_")
        try:
            weights = [weight] * len(self.names)
            self.model.add_weighted_adapter(self.names, weights, name, combination_type=kind, **pruned)
            self.model.set_adapter(name)
            self.model.merge_adapter([name])
        except Exception:
            if name in self.model.peft_config:
                self.model.delete_adapter(name)
            raise

    def with_head(self, task: str) -> Any:
        """The model with a task's own pooler and classifier."""
        inner, head = self.model.base_model.model, self.heads[task]
        inner.classifier = nn.Linear(head["classifier.weight"].shape[1], head["classifier.weight"].shape[0])
        inner.load_state_dict(head, strict=False)
        return self.model

    @property
    def rank(self) -> int:
        """The rank of the active adapter."""
        return self.model.peft_config[self.model.active_adapter].r


class Table:
    """Prints a row as soon as it is known."""

    def __init__(self, rows: dict[str, Rows]) -> None:
        self.rows = rows
        header = ["adapter", *rows, "average", "ranks", "left out", "seconds"]
        print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header), flush=True)

    def add(self, label: str, model: Callable[[str], Any], *rest: str) -> None:
        """A row: `model(task)` is scored on every task."""
        scores = [rows.accuracy(model(task)) for task, rows in self.rows.items()]
        self.show(label, *(f"{score:.3f}" for score in (*scores, statistics.mean(scores))), *rest)

    def show(self, label: str, *cells: str) -> None:
        """A row as it is; cells that are not given stay empty."""
        filled = [*cells, *[""] * (len(self.rows) + 4 - len(cells))]
        print("| " + " | ".join([label, *filled]) + " |", flush=True)


def opened(base: Path, folder: Path) -> Any:
    """A trained adapter in its base, as plain PEFT opens it."""
    labels = load_file(folder / "adapter_model.safetensors")["base_model.model.classifier.weight"].shape[0]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    return PeftModel.from_pretrained(model, folder).merge_and_unload().eval()


def show_merges(table: Table, base: Path, adapters: dict[str, Path], work: Path, only: list[str]) -> None:
    """The rows of hf_fda."""
    sources = {task: str(folder) for task, folder in adapters.items()}
    for label, arguments in MERGES.items():
        if only and not any(label.startswith(part) for part in only):
            continue
        output = work / "merged" / label.replace(", ", "-").replace(" ", "-")
        made = {task: work / "merged/fda/anchors" / task for task in sources}
        again = arguments["method"] == "fda" and label != "fda" and all(folder.is_dir() for folder in made.values())
        anchors = {task: str(folder) for task, folder in made.items()} if again else None
        start = time.perf_counter()
        merged = hf_fda.merge(
            str(base), sources, output=output, as_adapter=True, anchors=anchors, quiet=True, **arguments
        )
        seconds, report = time.perf_counter() - start, merged.report
        assert report is not None
        cells = report.ranks, f"{report.error:.2g}", f"{seconds:.1f}"
        table.add(label, partial(_whole, merged), *cells)


def _whole(merged: hf_fda.Merged, task: str) -> Any:
    """A task's model with the merged adapter in its weights."""
    model: Any = merged.load(task=task)
    return model.merge_and_unload()


def show_combinations(table: Table, combined: Combined) -> None:
    """The rows of PEFT."""
    for kind, weights in COMBINATIONS.items():
        for weight in weights:
            start = time.perf_counter()
            try:
                combined.combine(kind, weight)
            except ValueError as error:
                table.show(f"PEFT {kind} {weight}", f"refused: {error}")
                continue
            seconds = time.perf_counter() - start
            table.add(f"PEFT {kind} {weight}", combined.with_head, str(combined.rank), "", f"{seconds:.1f}")


def main() -> None:
    """Train, merge, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the encoder that the adapters are trained on")
    parser.add_argument("--tasks", type=Path, required=True, help="TASK.train.jsonl and TASK.test.jsonl")
    parser.add_argument("--work", type=Path, default=Path("adapters"), help="adapters and merges (default adapters/)")
    parser.add_argument("--limit", type=int, default=500, help="scored rows a task at most (default 500)")
    parser.add_argument("--split", choices=("train", "test"), default="test", help="rows that are scored")
    parser.add_argument("--only", nargs="+", default=[], help="merges whose name begins with one of these")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    adapters = make_adapters(options.base, options.tasks, options.work, tokenizer)
    split = "test" if options.split == "test" else "validation"
    rows = {task: batched(tokenizer, read_rows(options.tasks, task, split)[: options.limit]) for task in adapters}
    print(f"{options.split} rows: " + ", ".join(f"{task} {len(own.labels)}" for task, own in rows.items()))
    table = Table(rows)
    table.add("each task's own", lambda task: opened(options.base, adapters[task]), "4 to 16")
    combined = Combined(options.base, adapters)
    with combined.model.disable_adapter():
        table.add("base, own heads", combined.with_head)
    show_merges(table, options.base, adapters, options.work, options.only)
    show_combinations(table, combined)


if __name__ == "__main__":
    main()
