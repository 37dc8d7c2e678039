"""Building the anchors of one unit for one source from their checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_fda.anchors.construction import UnitAnchors, construct_units
from hf_fda.anchors.descent import UnitError
from hf_fda.anchors.grouping import group_units
from hf_fda.anchors.initialization import initial_anchors
from hf_fda.anchors.stacked import UnitPair
from hf_fda.blocks import Capture, Unit, capture_calls, make_unit
from hf_fda.blocks.capture import apart
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.layout import ModelLayout, Role
from hf_fda.errors import RunError
from hf_fda.merge_methods.fda import FDAConfig
from hf_fda.randomness import random_stream


class AnchorBuilder:
    """Makes anchors unit by unit; the base's calls are captured once, when first needed.

    Args:
        base: the base checkpoint.
        units: the units that anchors may be asked for.
        config: options, with those of the model's family filled in.
        device: where to work.
        seed: of the anchors' start; each unit draws from its own stream, so units do not depend on each other.
        snapshots: numbers of steps after which anchors are kept as they are then.
    """

    def __init__(
        self,
        base: Checkpoint,
        units: Iterable[Unit],
        config: FDAConfig,
        device: torch.device,
        seed: int,
        snapshots: Collection[int] = (),
    ) -> None:
        self.base, self.units, self.config = base, tuple(units), config
        self.device, self.seed, self.snapshots = device, seed, tuple(sorted(snapshots))
        self._made: dict[tuple[str, str], UnitAnchors] = {}

    @cached_property
    def capture(self) -> Capture:
        """How the units are called.

        Raises:
            RunError: when the base does not run on a few tokens, or its blocks not apart from it.
        """
        with apart(f"blocks of {self.base.layout.model_class.__name__}"):
            return capture_calls(self.base, self.units, self.config.num_tokens, self.device)

    @cached_property
    def groups(self) -> dict[str, tuple[Unit, ...]]:
        """The units that are constructed together with a unit, itself among them, by its name; group after group."""
        groups = group_units(self.base, self.config, self.units, self.device)
        return {unit.name: group for group in groups for unit in group}

    @property
    def grouped(self) -> tuple[Unit, ...]:
        """The units in the order in which they are best asked for: group after group."""
        return tuple(unit for first, group in self.groups.items() if group[0].name == first for unit in group)

    def load(self, read: Callable[[str], Tensor], unit: Unit) -> nn.Module:
        """A unit on the device in float32, its tensors read by `read` from the base's names."""
        return load_unit(self.base.layout, read, unit, self.device)

    def build(
        self,
        source: AlignedSource,
        unit: Unit,
        report: Callable[[int, float], None] = lambda step, loss: None,
    ) -> UnitAnchors:
        """Construct the anchors of one unit for one source, and with them those of its group, which are kept until
        another group is asked for.

        Raises:
            RunError: naming unit and source, when gradients are not finite or the loss is not, or the unit does not
                run apart from its model.
        """
        wanted = source.name, unit.name
        if wanted not in self._made:
            group = [one for one in self.groups[unit.name] if source.has(one.tensors)]
            self._made = {}  # before others are made
            pairs = [self._pair(source, one) for one in group]
            try:
                found = construct_units(pairs, **self.config.descent(), snapshots=self.snapshots, report=report)
            except UnitError as error:
                raise RunError(f"block '{group[error.number].name}', source '{source.name}': {error}") from None
            self._made = {(source.name, one.name): own for one, own in zip(group, found, strict=True)}
        return self._made.pop(wanted)

    def _pair(self, source: AlignedSource, unit: Unit) -> UnitPair:
        """A unit of base and source, and where its anchors start."""
        base, tuned = self.load(self.base.read, unit), self.load(source.read, unit)
        return UnitPair(base, tuned, self.capture.calls[unit.name], *self._start(source, unit, tuned))

    def start(self, source: AlignedSource, unit: Unit) -> Tensor:
        """Where the anchors of one unit start for one source, (n, T, d) on the CPU, position embeddings with them."""
        start, offset = self._start(source, unit, self.load(source.read, unit))
        return (start if offset is None else start + offset).cpu()

    def _start(self, source: AlignedSource, unit: Unit, tuned: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Starting anchors and what is added to them, on the device."""
        config, call = self.config, self.capture.calls[unit.name]
        n, tokens, size = config.num_anchors, call.tokens, call.size
        assert n is not None and tokens is not None and size is not None
        generator = random_stream(self.seed, "anchors", unit.name)
        weights = linear_weights(self.base.layout, unit, tuned)
        start = initial_anchors(config.initialization, weights, n, tokens, size, generator)
        offset = self._positions(source, tokens, size) if config.position_embeddings else None
        return start.to(self.device), offset

    def _positions(self, source: AlignedSource, tokens: int, size: int) -> Tensor | None:
        """The source's position embeddings of the first tokens, (T, d), where the model has such a table."""
        for name, ids in self.capture.positions.items():
            table = source.read(name)
            if ids.shape[-1] == tokens and table.shape[1] == size:
                return table[ids.view(-1)[:tokens]].to(self.device, torch.float32)
        return None


def load_unit(layout: ModelLayout, read: Callable[[str], Tensor], unit: Unit, device: torch.device) -> nn.Module:
    """A unit on a device, its floating-point numbers in float32; with what it holds beside its parameters.

    Args:
        layout: the base's.
        read: gives a tensor by the base's name of it.
        unit: which.
        device: where.
    """
    tensors = {}
    for name in layout.names:
        if name.startswith(f"{unit.name}."):
            value = read(name).to(device)
            tensors[name] = value.float() if value.is_floating_point() else value
    return make_unit(layout, unit, tensors, device)


def linear_weights(layout: ModelLayout, unit: Unit, module: nn.Module) -> list[Tensor]:
    """The linear weights of a unit's module, each (d_out, d_in), whatever way they are stored."""
    roles: Mapping[str, Role] = layout.roles
    parameters = dict(module.named_parameters())
    matrices: list[Tensor] = []
    for name in unit.tensors:
        weight = parameters.get(name.removeprefix(unit.name + "."))
        if weight is None:
            continue
        if roles[name] == "linear":
            matrices.append(weight)
        elif roles[name] == "conv1d":
            matrices.append(weight.T)
        elif roles[name] == "stack":
            matrices.extend(weight)
    return matrices
