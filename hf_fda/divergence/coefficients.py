"""The merged model as a function of its coefficients, and their gradient from one backward pass.

``theta(Gamma)_p = theta_0,p + sum_t Gamma[t, g(p)] tau_t,p`` for every tensor p, so the derivative for Gamma[t, g] is
``sum over p in g of <grad_p, tau_t,p>``. A gradient of a tensor is therefore needed only until its K inner products are
taken: that is done as soon as the backward pass has it, and it is dropped at once. (Of a tensor that is used twice, as
tied embeddings are, the backward pass holds the gradient of its first use until it has that of the other.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.divergence.directions import orthogonal_parts
from hf_fda.divergence.groups import group
from hf_fda.divergence.task_tensors import Dense, Stored, TaskTensors, Thin
from hf_fda.lowrank import LowRank
from hf_fda.merge_methods.learned import Granularity, Initial, TaskVectorForm


@dataclass(frozen=True)
class _Part:
    """The task vectors of one tensor that are held in one form, and the numbers of the sources that they are of."""

    members: Tensor
    tasks: TaskTensors


class MergedParameters:
    """The merged tensors, which models share, and the gradient of their coefficients.

    Held are the merged tensors and, unless the form is "disk", the base's in the type they are stored in and the task
    vectors (those of adapters as thin factors, in every form).

    Args:
        base: theta_0.
        sources: K sources.
        names: the base's names of the tensors to merge; a tensor of whole numbers stays the base's.
        granularity: which tensors share a coefficient.
        start: coefficients to start from: one number, or what broadcasts to (K, G).
        form: how dense task vectors are held.
        device: where to hold and compute.
        dtype: type of the merged tensors.
        initial: what the coefficients are of: the task vectors, or what `tsv` adds for each source (`orthogonal_parts`;
            not with the form "disk").
    """

    def __init__(
        self,
        base: Checkpoint,
        sources: Sequence[AlignedSource],
        names: Sequence[str],
        granularity: Granularity = "block",
        start: float | Tensor = 0.3,
        form: TaskVectorForm = "float32",
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        initial: Initial = "task_arithmetic",
    ) -> None:
        self.initial = initial
        self.base, self.sources, self.form, self.dtype = base, tuple(sources), form, dtype
        self.device = device or torch.device("cpu")
        self._parts: dict[str, list[_Part]] = {}
        self._origins: dict[str, Tensor] = {}
        self.tensors: dict[str, nn.Parameter] = {}
        """The merged tensors by the base's names; those that no source moves need no gradient."""
        for name in names:
            self._hold(name)
        self.groups = group(base.layout, [name for name in names if self._parts[name]], granularity)
        for name in self.groups.of:
            self.tensors[name].requires_grad_(True).register_post_accumulate_grad_hook(self._consumer(name))
        self._gradient = torch.zeros(len(self.groups), len(self.sources), dtype=torch.float64, device=self.device)
        shape = (len(self.sources), len(self.groups))
        self.coefficients = torch.as_tensor(start, dtype=torch.float64).expand(shape).clone()
        self.put(self.coefficients)

    def _hold(self, name: str) -> None:
        stored = self.base.read(name).to(self.device)
        floating = stored.is_floating_point()
        origin = stored.to(self.dtype if floating else stored.dtype)
        held = self._held_parts if self.initial == "task_arithmetic" else self._orthogonal
        self._parts[name] = held(name, origin) if floating else []
        self.tensors[name] = nn.Parameter(origin.clone(), requires_grad=False)
        if self._parts[name] and self.form != "disk":
            self._origins[name] = stored

    def _held_parts(self, name: str, origin: Tensor) -> list[_Part]:
        thin: dict[int, LowRank] = {}
        thick = []
        for number, source in enumerate(self.sources):
            factors = source.factors(name) if source.may_move(name) else None
            if factors is not None and factors.left.numel() + factors.right.numel() < origin.numel():
                thin[number] = factors.to(self.device, self.dtype)
            elif source.may_move(name):
                thick.append(number)
        parts = [_Part(torch.tensor(list(thin), device=self.device), Thin(list(thin.values())))] if thin else []
        members, dense = self._dense(name, origin, thick)
        if members:
            tasks: TaskTensors = self._stored(name, members) if dense is None else Dense(dense)
            parts.append(_Part(torch.tensor(members, device=self.device), tasks))
        return parts

    def _orthogonal(self, name: str, origin: Tensor) -> list[_Part]:
        """What `tsv` adds for every source that moves a tensor; as factors where these are smaller."""
        may = [source.may_move(name) for source in self.sources]
        if not any(may):
            return []
        tasks = [
            source.task(name, origin) if moves else torch.zeros_like(origin)
            for source, moves in zip(self.sources, may, strict=True)
        ]
        moving = [number for number, task in enumerate(tasks) if bool(task.any())]
        found = orthogonal_parts(tasks, self.base.layout.roles[name])
        thin = [part for part in found if isinstance(part, LowRank)]
        members = torch.tensor(moving, device=self.device)
        if sum(part.left.numel() + part.right.numel() for part in thin) < len(moving) * origin.numel() and thin:
            return [_Part(members, Thin([thin[number] for number in moving]))] if moving else []
        kept = torch.bfloat16 if self.form == "bfloat16" else self.dtype
        rows = [part.dense() if isinstance(part, LowRank) else part for part in (found[number] for number in moving)]
        return [_Part(members, Dense(torch.stack([row.flatten() for row in rows]).to(kept)))] if moving else []

    def _dense(self, name: str, origin: Tensor, numbers: Sequence[int]) -> tuple[list[int], Tensor | None]:
        """Which of some sources move a tensor, and their task vectors, one a row; None of those that are not kept.

        Each is written to its place at once: beside those that are kept there is never more than one.
        """
        kept = torch.bfloat16 if self.form == "bfloat16" else self.dtype
        rows = None if self.form == "disk" else origin.new_empty((len(numbers), origin.numel()), dtype=kept)
        members: list[int] = []
        for number in numbers:
            task = self.sources[number].task(name, origin)
            if not bool(task.any()):
                continue
            if rows is not None:
                rows[len(members)] = task.flatten()
            members.append(number)
        if rows is not None and len(members) < len(numbers):
            rows = rows[: len(members)].clone()
        return members, rows

    def _stored(self, name: str, members: Sequence[int]) -> Stored:
        def read() -> Iterator[Tensor]:
            origin = self.base.read(name).to(self.device, self.dtype)
            for number in members:
                yield self.sources[number].task(name, origin)

        return Stored(read)

    @torch.no_grad()
    def put(self, coefficients: Tensor) -> None:
        """Bring the merged tensors to other coefficients, in place.

        Args:
            coefficients: (K, G).
        """
        self.coefficients = coefficients.detach().to("cpu", torch.float64, copy=True)
        by_group = self.coefficients.mT.to(self.device, self.dtype)
        for name, number in self.groups.of.items():
            value = self.tensors[name].data
            value.copy_(self._origins[name] if name in self._origins else self.base.read(name))
            for part in self._parts[name]:
                part.tasks.add_to(value, by_group[number, part.members])

    def _consumer(self, name: str) -> Callable[[Tensor], None]:
        number, parts = self.groups.of[name], self._parts[name]

        def consume(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            for part in parts:
                products = part.tasks.products(gradient.contiguous())
                self._gradient[number].index_add_(0, part.members, products.to(self._gradient.dtype))

        return consume

    def take_gradient(self) -> Tensor:
        """The gradient of the coefficients (K, G) that backward passes have left since the last call, on the CPU."""
        taken = self._gradient.mT.contiguous().to("cpu", copy=True)
        self._gradient.zero_()
        return taken
