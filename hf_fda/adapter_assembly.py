"""Writing a merged adapter: each tensor factored on its own, then all of them in PEFT's form."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_fda.adapters.files import CONFIG, WEIGHTS
from hf_fda.adapters.report import REPORT, AdapterReport, ModuleReport
from hf_fda.adapters.saving import adapter_config, adapter_tensors, config_text
from hf_fda.adapters.targets import AdapterPlan, Target
from hf_fda.assembly import Assembly, rule_of
from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.errors import RunError
from hf_fda.lowrank import LowRank, factorise, kept
from hf_fda.publish import clean, copy_processors, remove_model, write_heads, write_record
from hf_fda.recipes import Recipe
from hf_fda.stages import Piece
from hf_fda.store import WORK, key_of
from hf_fda.version import versions

FACTORS = f"{WORK}/factors"
"""Where factored tensors wait until all are there."""


class AdapterAssembly(Assembly):
    """The adapter of one plan; arguments as `Assembly`. The plan's `adapter` is set."""

    @cached_property
    def adapter(self) -> AdapterPlan:
        """What is written."""
        assert self.plan.adapter is not None
        return self.plan.adapter

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        """How each tensor is made, by the base's name of it."""
        result = self.plan.result
        return {result.base_names[name]: recipe for name, recipe in result.recipes.items()}

    @property
    def parts(self) -> tuple[Target, ...]:
        """What is made one by one; nothing where an earlier run finished the adapter."""
        return () if self._finished else self.adapter.parts

    @cached_property
    def _finished(self) -> bool:
        return (self.plan.output / CONFIG).is_file() and self.run.store.finished(WEIGHTS, self._whole_key)

    @cached_property
    def _whole_key(self) -> str:
        return key_of([self._key(target) for target in self.adapter.parts], self.plan.arguments)

    def tensors_in(self, target: Target) -> set[str]:
        """The base's name of the tensor."""
        return {target.base_name}

    def piece(self, target: Target) -> Piece:
        """The work of merging and factoring one tensor."""
        file = f"{FACTORS}/{target.base_name}.safetensors"

        def make() -> Callable[[Path], str]:
            tensors = self._made(target)
            return lambda path: save_tensors(path, tensors)

        shape = self.plan.inputs.base.shape(target.base_name)
        cost = float(torch.Size(shape).numel() * (min(shape) if len(shape) > 1 else 1))
        return Piece(f"factor {target.name}", file, self._key(target), cost, make)

    def _key(self, target: Target) -> str:
        recipe, budget = self.recipes[target.base_name], self.adapter.budget
        rule = rule_of(recipe, self.plan.seed)
        key = self.preparation.key(target.base_name)
        own = target.base_name, target.form, target.limit, budget.rank, budget.energy
        return key_of("factors", own, rule, key, self.fingerprints, versions())

    def _made(self, target: Target) -> dict[str, Tensor]:
        """The tensors that stand for one merged tensor, and its norm with the share of it that they leave out."""
        task, budget = self._task(target), self.adapter.budget
        if not target.factored:
            assert isinstance(task, Tensor)
            base = self.plan.inputs.base.read(target.base_name).float()
            return {"tensor": task if target.form == "bias" else base + task}
        whole = target.base_name in self.plan.ranks and budget.energy is None  # adapted within the budget
        found = kept(task) if whole and isinstance(task, LowRank) else factorise(task, budget, target.limit)
        product = found.product
        facts = torch.tensor([found.norm, found.error], dtype=torch.float64)
        return {"left": product.left, "right": product.right, "facts": facts}

    def _task(self, target: Target) -> LowRank | Tensor:
        """The merged task vector of a tensor: as factors where it comes out thin.

        Raises:
            RunError: when it is not finite.
        """
        recipe, name = self.recipes[target.base_name], target.base_name
        task: LowRank | Tensor | None = None
        if recipe.rule == "unit":
            found = self.preparation.adapted(name)
            task = found if isinstance(found, LowRank) else found - self.plan.inputs.base.read(name).float()
        else:
            assert recipe.config is not None
            config = self.preparation.settled(name, recipe.config)
            if target.factored:
                task = self.vectors.merged_factors(name, config)
            if task is None:
                task = self.vectors.merged_task(name, config)
        parts = (task.left, task.right) if isinstance(task, LowRank) else (task,)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise RunError(f"tensor '{name}': the merged values are not finite; check the inputs for infinities or NaN")
        return task

    # -- the finished folder ---------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Write the adapter from its parts, and everything around it; `adapter_config.json` comes last."""
        if self._finished:
            return
        folder, store = self.plan.output, self.run.store
        (folder / CONFIG).unlink(missing_ok=True)
        remove_model(self.plan.output, store)
        factors, others, report = self._gathered()
        ranks = {name: product.rank for name, product in factors.items()}
        base = self.plan.inputs.base
        config = adapter_config(self.adapter, ranks, base.id.partition("@")[0], base.commit)
        base_name = {own: name for name, own in self.plan.inputs.weighted[0].tensor_of.items()}
        tied = self.adapter.layout.tied
        tensors = adapter_tensors(
            self.adapter, factors, others, lambda name: base.read(base_name[tied.get(name, name)])
        )
        dtype = self.plan.dtype or torch.float32
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        store.write(WEIGHTS, self._whole_key, lambda path: save_tensors(path, tensors, {"format": "pt"}))
        write_heads(self.plan, store)
        copy_processors(self.plan)
        store.write_text(REPORT, report.text())
        write_record(self.plan, store, self.run.data_prints, self.run.spent)
        store.write_text(CONFIG, config_text(config))
        shutil.rmtree(folder / FACTORS, ignore_errors=True)
        clean(store)

    def _gathered(self) -> tuple[dict[str, LowRank], dict[str, Tensor], AdapterReport]:
        factors, others, reports = {}, {}, []
        parts = self.adapter.parts
        for target in self.adapter.targets:
            path = self.plan.output / FACTORS / f"{target.base_name}.safetensors"
            found: dict[str, Any] = {name: read_tensor(path, entry) for name, entry in read_header(path).items()}
            if not target.factored:
                others[target.name] = found["tensor"]
                continue
            product = LowRank(found["left"], found["right"], self.plan.inputs.base.shape(target.base_name))
            factors[target.name] = product
            if target in parts:
                reports.append(ModuleReport(target.place, product.rank, *found["facts"].tolist()))
        return factors, others, AdapterReport(tuple(reports))
