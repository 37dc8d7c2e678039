"""Checkpoints seen as others: as nothing, with an adapter on, or as layers of several put on top of each other."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hf_fda.adapters import AdapterCheckpoint
from hf_fda.blocks import find_blocks
from hf_fda.checkpoint.interface import Checkpoint, ReadCheckpoint
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.checkpoint.location import Location
from hf_fda.checkpoint.view import View
from hf_fda.errors import RunError
from hf_fda.planning import out_dtype
from hf_fda.plans import Plan


class Nothing(View):
    """A base of zeros in a model's shape, so that task vectors are the sources themselves: a merge without a base.

    Args:
        origin: gives shapes, configuration and tokenizer.
    """

    def __init__(self, origin: Checkpoint) -> None:
        super().__init__(origin)
        self.id = f"none ({origin.id} gives configuration and tokenizer)"

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """Zeros, as `Checkpoint.read`; what is no floating-point number is the model's own."""
        if not self.dtype(name).is_floating_point:
            return self.origin.read(name, part)
        whole = torch.zeros((), dtype=self.dtype(name)).expand(self.shape(name))
        return (whole if part is None else whole.reshape(-1)[part]).contiguous()


class Whole(View):
    """An adapter on a model that is not the merge's base: its tensors with the adapter added.

    Args:
        origin: the adapter.

    Raises:
        InputError: when it does not change alike what the model ties.
    """

    def __init__(self, origin: AdapterCheckpoint) -> None:
        super().__init__(origin)
        self.id = f"{origin.base.id}+{origin.id}"
        origin.check_ties(origin.apart, self.id, "put it on a model that does not tie them")
        self._origins = (*origin.base.origins, origin)

    @property
    def origins(self) -> tuple[Checkpoint, ...]:
        """As `Checkpoint.origins`: the model and the adapter."""
        return self._origins


@dataclass(frozen=True)
class Layers:
    """Layers of a checkpoint: `start` to `stop` (not included) of its repeated blocks."""

    checkpoint: Checkpoint
    start: int
    stop: int


class Stacked(ReadCheckpoint):
    """Layers of checkpoints on top of each other, as one model. What lies before the blocks is the first one's, what
    lies after them the last one's.

    Args:
        parts: from the first layer to the last; models of one class with one list of blocks.
        before: names (in the first's model) of what lies before its blocks.
    """

    def __init__(self, parts: Sequence[Layers], before: frozenset[str]) -> None:
        first = parts[0].checkpoint
        self.parts = tuple(parts)
        self.id = " + ".join(f"{part.checkpoint.id}[{part.start}:{part.stop}]" for part in parts)
        self.commit: str | None = None
        self.location: Location | None = first.location
        self.layout = ModelLayout(_spliced(self.parts), first.layout.model_class)
        conversions = getattr(first.layout.model, "_weight_conversions", None)
        if conversions is not None:  # written as the first was
            self.layout.model._weight_conversions = conversions
        prefix = find_blocks(self.layout.model)[0].rpartition(".")[0]
        numbered = [(part.checkpoint, number) for part in parts for number in range(part.start, part.stop)]
        self._place: dict[str, tuple[Checkpoint, str]] = {}
        for name in self.layout.names:
            if name.startswith(f"{prefix}."):
                own, rest = name.removeprefix(f"{prefix}.").split(".", 1)
                checkpoint, number = numbered[int(own)]
                self._place[name] = (checkpoint, f"{prefix}.{number}.{rest}")
            else:
                self._place[name] = (first if name in before else parts[-1].checkpoint, name)
        self._place = {name: (own, there) for name, (own, there) in self._place.items() if there in own.names}
        self.names = tuple(self._place)
        self.unexpected: Sequence[str] = tuple(
            dict.fromkeys(name for part in parts for name in part.checkpoint.unexpected)
        )

    @property
    def origins(self) -> tuple[Checkpoint, ...]:
        """As `Checkpoint.origins`: those of the parts, each once."""
        every = [own for part in self.parts for own in part.checkpoint.origins]
        return tuple({id(own): own for own in every}.values())

    @property
    def missing(self) -> tuple[str, ...]:
        """Names that the model has but none of the checkpoints holds."""
        return tuple(name for name in self.layout.names if name not in self._place)

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.layout.config

    def place(self, name: str) -> tuple[Checkpoint, str]:
        """Where a tensor comes from: the checkpoint and its name there."""
        return self._place[name]

    def dtype(self, name: str) -> torch.dtype:
        """The stored type of a tensor."""
        checkpoint, own = self._place[name]
        return checkpoint.dtype(own)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in memory layout."""
        checkpoint, own = self._place[name]
        return checkpoint.shape(own)

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """One tensor on the CPU, as `Checkpoint.read`."""
        checkpoint, own = self._place[name]
        return checkpoint.read(own, part)

    def in_parts(self, name: str) -> bool:
        """As `Checkpoint.in_parts`."""
        checkpoint, own = self._place[name]
        return checkpoint.in_parts(own)

    def fingerprint(self) -> str:
        """A hash that changes when the weights, or the choice of layers, do."""
        facts = [f"{part.checkpoint.fingerprint()}[{part.start}:{part.stop}]" for part in self.parts]
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()


def _spliced(parts: Sequence[Layers]) -> PretrainedConfig:
    """The first part's configuration with as many layers as all parts have, and what it lists layer by layer put
    together from theirs."""
    config = copy.deepcopy(parts[0].checkpoint.config)
    text: Any = config.get_text_config()
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            pieces: list[Any] = []
            for part in parts:
                pieces += getattr(part.checkpoint.config.get_text_config(), name)[part.start : part.stop]
            setattr(text, name, pieces)
    text.num_hidden_layers = sum(part.stop - part.start for part in parts)
    return config


class Planned(View):
    """What a merge will give, before it is made: everything but the numbers.

    Args:
        plan: of the merge.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.inputs.base)
        self.plan = plan
        self.id = str(plan.output)
        self.commit = None
        self.layout, self.unexpected = plan.result.layout, ()
        self.names = tuple(plan.result.recipes)

    @property
    def missing(self) -> tuple[str, ...]:
        """None: a merge gives all of its model's tensors."""
        return ()

    def dtype(self, name: str) -> torch.dtype:
        """The type that a tensor will be written in."""
        return out_dtype(self.plan.inputs, self.plan.result, name, self.plan.dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in memory layout."""
        return self.layout.shapes[name]

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """Not possible yet."""
        raise RunError(f"{self.id}: '{name}' is read before it is merged")
