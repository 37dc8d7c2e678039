"""What of a merged model an adapter has to hold, and in which form: factors, whole tensors, or biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_fda.adapters.checkpoint import AdapterCheckpoint
from hf_fda.adapters.movement import Movement, full_rank
from hf_fda.blocks import Unit
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.errors import InputError, few
from hf_fda.inputs import Inputs
from hf_fda.lowrank import Budget
from hf_fda.recipes import Output

Form = Literal["factors", "parameter", "whole", "bias"]
FACTORED = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True)
class Target:
    """A tensor that a merged adapter changes; of a tied one, one of its places.

    `base_name` is the base's name of it, `name` that in the model the adapter is for. `form`, which is the same in all
    places, says how it is kept: as
    thin factors of a module's weight, or of a single parameter (a stack of experts, in PEFT's `target_parameters`);
    whole (with its module, in PEFT's `modules_to_save`); or as the bias of the factors (`lora_bias`). `limit` is the
    largest rank that its factors get.
    """

    base_name: str
    name: str
    form: Form
    limit: int = 0

    @property
    def module(self) -> str:
        """The path of the module that the tensor belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def factored(self) -> bool:
        """Whether it is kept as factors."""
        return self.form in ("factors", "parameter")

    @property
    def place(self) -> str:
        """What PEFT calls that which the factors are of: the module, or the parameter itself."""
        return self.name if self.form == "parameter" else self.module


@dataclass(frozen=True)
class AdapterPlan:
    """The adapter that a merge writes.

    `layout` is that of the model it is for; `task_type` PEFT's word for what that model does, where it has one.
    """

    layout: ModelLayout
    targets: tuple[Target, ...]
    budget: Budget
    task_type: str | None

    def rank_of(self, target: Target) -> int:
        """The largest rank that a target's factors may get."""
        return min(self.budget.rank or target.limit, target.limit)

    @property
    def parts(self) -> tuple[Target, ...]:
        """What is made one by one: of a tied tensor the first place, which the others are like."""
        return tuple({target.base_name: target for target in reversed(self.targets)}.values())[::-1]

    @property
    def whole_modules(self) -> list[str]:
        """Paths of the modules that the adapter brings whole: those of whole tensors, and what else PEFT takes for one
        of them, as it compares the ends of names ("norm" is also "layers.0.input_layernorm")."""
        ends = tuple(target.module for target in self.targets if target.form == "whole")
        paths = [path for path, own in self.layout.model.named_modules() if any(True for _ in own.parameters())]
        return [path for path in paths if path.endswith(ends)] if ends else []

    @property
    def top_rank(self) -> int:
        """The largest of all; 0 where nothing is kept as factors."""
        return max((self.rank_of(target) for target in self.targets if target.factored), default=0)


def plan_adapter(inputs: Inputs, result: Output, units: Sequence[Unit], budget: Budget) -> AdapterPlan:
    """Decide what a merged adapter holds.

    Args:
        inputs: base and sources.
        result: how every tensor of the merged model is made.
        units: what function-space methods merge.
        budget: of the factors.

    Raises:
        InputError: when the merge changes something that no adapter can hold, the adapters are of several classes of
            model, or the rank is larger than possible.
    """
    soups = [name for name, recipe in result.recipes.items() if recipe.rule == "soup"]
    if soups:
        raise InputError(
            f"as_adapter=True: the sources have tensors that the base lacks ({few(soups)}); an adapter cannot bring "
            "them; merge into a full checkpoint"
        )
    layout, own_name, task_type = _layout(inputs)
    movement, changed = Movement.of(inputs, units), []
    for name, recipe in result.recipes.items():
        base_name = result.base_names[name]
        if recipe.rule != "base" and movement.any(base_name) and inputs.base.dtype(base_name).is_floating_point:
            changed.append(base_name)
    strange = [name for name in changed if name not in own_name]
    if strange:
        raise InputError(f"as_adapter=True: the model of the sources has no {few(strange)}; merge into a checkpoint")
    targets = _targets(movement, layout, {name: own_name[name] for name in changed}, budget)
    if not targets:
        raise InputError("as_adapter=True: no source changes anything that is merged; there is nothing to write")
    # Of a task type with a head PEFT expects that head in the adapter; heads that are kept lie beside it
    plan = AdapterPlan(layout, targets, budget, None if result.heads else task_type)
    _check_whole(plan)
    _check_rank(inputs, plan)
    return plan


def _check_whole(plan: AdapterPlan) -> None:
    """Refuse factors of what PEFT would take for a module that comes whole."""
    whole = set(plan.whole_modules)
    both = [target.name for target in plan.targets if target.form != "whole" and target.module in whole]
    if both:
        names = [target.name for target in plan.targets if target.form == "whole"]
        raise InputError(
            f"as_adapter=True: PEFT tells modules that come whole ({few(names)}) by the ends of their names, and would "
            f"take {few(both)} for one; merge into a full checkpoint"
        )


def _check_rank(inputs: Inputs, plan: AdapterPlan) -> None:
    shapes = [inputs.base.shape(target.base_name) for target in plan.targets if target.factored]
    most = max(map(full_rank, shapes), default=0)
    if plan.budget.rank is not None and plan.budget.rank > most:
        raise InputError(f"rank {plan.budget.rank} is larger than any of the merged matrices has: at most {most}")


def _layout(inputs: Inputs) -> tuple[ModelLayout, Mapping[str, str], str | None]:
    """The layout of the model that the adapter is for, which is the sources', its names by the base's, and PEFT's word
    for its task."""
    sources = inputs.weighted
    if not sources:
        raise InputError("as_adapter=True: all sources are anchors only; an adapter needs the weights of one at least")
    first = sources[0].checkpoint.layout
    for source in sources:
        own = source.checkpoint.layout.model_class
        if own is not first.model_class:
            raise InputError(
                f"as_adapter=True: '{sources[0].name}' is of a {first.model_class.__name__}, '{source.name}' of a "
                f"{own.__name__}; one adapter serves one class of model: merge sources of one task type, or into a "
                "full checkpoint"
            )
    adapters = [source.checkpoint for source in sources if isinstance(source.checkpoint, AdapterCheckpoint)]
    kinds = {str(getattr(kind, "value", kind)) for a in adapters if (kind := a.files.config.task_type) is not None}
    return first, sources[0].tensor_of, kinds.pop() if len(kinds) == 1 else None


def adapted_ranks(inputs: Inputs, units: Sequence[Unit], adapter: AdapterPlan | None) -> dict[str, int]:
    """Which tensors of the units that function-space methods merge can be kept as thin factors, and of which rank.

    Args:
        inputs: base and sources.
        units: what is merged one by one.
        adapter: the adapter that is written; None: a full checkpoint, in which a tensor is thin where every source that
            moves it does so by thin factors.

    Returns:
        by the base's name of a tensor, the largest rank of its factors. Tensors that may have full rank are not in it:
        their factors would be no smaller than themselves.
    """
    names = [name for unit in units for name in unit.tensors]
    if adapter is not None:
        known = {own.base_name: adapter.rank_of(own) for own in adapter.targets if own.factored}
        ranks = {name: known[name] for name in names if name in known}
    else:
        matrices = [name for name in names if len(inputs.base.shape(name)) > 1]
        movement = Movement.of(inputs, units)
        ranks = {name: movement.limit(name) for name in matrices if movement.any(name)}
    return {name: rank for name, rank in ranks.items() if rank < full_rank(inputs.base.shape(name))}


def _targets(movement: Movement, layout: ModelLayout, names: Mapping[str, str], budget: Budget) -> tuple[Target, ...]:
    places = {base: layout.places(own) for base, own in names.items()}
    every = [(base, place) for base, own in places.items() for place in own]
    modules = dict(layout.model.named_modules())
    owners = {place: (modules[place.rpartition(".")[0]], place.rpartition(".")[2]) for _, place in every}
    whole = {owners[place][0] for base, place in every if owners[place][1] == "weight" and movement.replaced(base)}
    biased = any(
        part == "bias" and isinstance(module, FACTORED) and module not in whole for module, part in owners.values()
    )

    def form(base: str, place: str) -> Form:
        return "whole" if owners[place][0] in whole else _form(movement, base, *owners[place], biased)

    # A tied tensor has one form: whole, where exact factors would be no smaller than itself
    for base, own in places.items():
        if len({form(base, place) for place in own}) > 1 or (
            len(own) > 1 and budget == Budget() and movement.tuned(base)
        ):
            whole |= {owners[place][0] for place in own}
    targets = []
    for base, place in every:
        kept = form(base, place)
        limit = movement.limit(base) if kept in ("factors", "parameter") else 0
        targets.append(Target(base, place, kept, limit))
    _check_parameters(layout, targets)
    return tuple(targets)


def _form(movement: Movement, name: str, module: nn.Module, part: str, biased: bool) -> Form:
    """How an adapter keeps a tensor of a module that it does not bring whole.

    Args:
        movement: what the sources change.
        name: the base's name of the tensor.
        module: whose tensor it is.
        part: what the module calls it.
        biased: whether the adapter's factors have biases, which those of embeddings cannot.
    """
    if isinstance(module, FACTORED):
        if part == "bias":
            return "bias"
        return "whole" if biased and isinstance(module, nn.Embedding) else "factors"
    matrix = len(movement.inputs.base.shape(name)) in (2, 3)
    if part == "bias" or (part == "weight" and not (matrix and movement.thin(name))):
        return "whole"
    if matrix:
        return "parameter"
    raise InputError(
        f"as_adapter=True: '{name}' of a {type(module).__name__} is merged, which no adapter holds alone; merge into a "
        "full checkpoint"
    )


def _check_parameters(layout: ModelLayout, targets: Sequence[Target]) -> None:
    """Refuse single parameters beside what PEFT cannot have beside them."""
    single = [target for target in targets if target.form == "parameter"]
    if not single:
        return
    way_out = "merge into a full checkpoint"
    biases = [target.name for target in targets if target.form == "bias"]
    if biases:
        raise InputError(
            f"as_adapter=True: the sources change biases ({few(biases)}) and single parameters "
            f"({few([target.name for target in single])}); PEFT has no adapter with both: {way_out}"
        )
    inside = tuple(f"{target.module}." for target in single)
    for target in targets:
        if target.form != "parameter" and f"{target.module}.".startswith(inside):
            raise InputError(
                f"as_adapter=True: the sources change '{target.name}' and single parameters of a module around it; "
                f"PEFT has no name for both: {way_out}"
            )
