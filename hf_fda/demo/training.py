"""The models to merge: a small ViT that learns upright digits, and its fine-tunes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from hf_fda.demo.records import made_from, save
from hf_fda.demo.settings import Settings
from hf_fda.demo.tasks import TASKS, Rows
from hf_fda.version import versions

MODEL: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_labels": 10,
}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, by AdamW. The head is what follows the last block: it stays the task's own in a merge.

    `jitter` turns, scales and shifts every image a little each time it is seen.
    """

    epochs: int
    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    jitter: bool
    batch_size: int = 64


def base_recipe(settings: Settings) -> Recipe:
    """The base's training."""
    return Recipe(settings.base_epochs, 2e-3, 2e-3, weight_decay=0.05, jitter=True)


def fine_tune_recipe(settings: Settings) -> Recipe:
    """A fine-tune's training. The head learns much faster than the body, so that the body has to move little: bodies
    that moved far from their base have no common merge, by any method."""
    return Recipe(settings.fine_tune_epochs, 2e-4, 1e-2, weight_decay=0.0, jitter=False)


def make_models(
    folder: Path, rows: Rows, settings: Settings, seed: int, say: Callable[[str], None]
) -> tuple[Path, dict[str, Path]]:
    """Train and save the base and a fine-tune for each task, or take those of an earlier run with the same settings.

    Args:
        folder: holds a folder for each model, and beside it `<name>.json`: what it was made from.
        rows: training rows, upright.
        settings: the budget.
        seed: of everything random.
        say: told what is going on.

    Returns:
        the base's folder and the fine-tunes' by task.
    """
    basic, tuning = base_recipe(settings), fine_tune_recipe(settings)
    origin = {"model": MODEL, "seed": seed, "versions": versions(), "base": basic.__dict__}
    base = folder / "base"
    if not made_from(base, origin):
        say("training the base on upright digits")
        save(base, origin, train(_new_model(seed), rows, basic, seed))
    tuned = {}
    for task, disguise in TASKS.items():
        tuned[task] = folder / task
        facts = {**origin, "task": task, "fine_tune": tuning.__dict__}
        if not made_from(tuned[task], facts):
            say(f"fine-tuning it to {task} digits")
            save(tuned[task], facts, train(open_model(base), rows.seen_as(disguise), tuning, seed))
    return base, tuned


def train(model: Any, rows: Rows, recipe: Recipe, seed: int) -> Any:
    """A trained copy of `model`, in evaluation mode.

    Args:
        model: a ViT classifier; it is not changed.
        rows: what it learns.
        recipe: how.
        seed: of the order of the images and of the jitter.
    """
    model, generator = copy.deepcopy(model).train(), torch.Generator().manual_seed(seed)
    head = [*model.vit.layernorm.parameters(), *model.classifier.parameters()]
    body = [parameter for parameter in model.parameters() if not any(parameter is own for own in head)]
    rates = [recipe.learning_rate, recipe.head_learning_rate]
    groups = [{"params": body, "lr": rates[0]}, {"params": head, "lr": rates[1]}]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
    total = recipe.epochs * -(-len(rows.labels) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=total, pct_start=0.1)
    for _ in range(recipe.epochs):
        for batch in torch.randperm(len(rows.labels), generator=generator).split(recipe.batch_size):
            images = rows.images[batch]
            if recipe.jitter:
                images = jittered(images, generator)
            loss = functional.cross_entropy(model(pixel_values=images).logits, rows.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (n, 1, 8, 8) turned by up to 15 degrees, scaled by up to 10 % and shifted by up to 0.8 pixels."""
    turn, scale, right, down = 2 * torch.rand(4, len(images), generator=generator) - 1
    angle, scale = torch.deg2rad(15 * turn), 1 + 0.1 * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack([cos, -sin, 0.2 * right, sin, cos, 0.2 * down], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    # Beyond the border lies 0: the ink is shifted there and back so that this means white paper.
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1


def open_model(folder: Path) -> Any:
    """A saved classifier, in evaluation mode."""
    return ViTForImageClassification.from_pretrained(folder).eval()


def _new_model(seed: int) -> Any:
    """A ViT with random weights; the global random stream is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(ViTConfig(**MODEL))
