"""What adaptation steps on: parameters, elementwise coefficients of task vectors, or thin factors, all by Adam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_fda.lowrank import LowRank

CHUNK = 1 << 16
"""Entries that a CPU takes a whole step on before it goes to the next ones, so that they stay in its caches."""


class CoefficientAdam:
    """Adam on elementwise coefficients of K task vectors, with the state of one.

    With ``theta = theta_0 + sum_k alpha_k * tau_k`` and g the gradient at theta, the gradient of alpha_k is
    ``tau_k g``, so its moments are ``tau_k m`` and ``tau_k^2 v`` where m and v are those of g. Adam's step on all
    alpha_k therefore moves theta by

        ``-lr * m_hat / sqrt(v_hat) * sum_k |tau_k|``

    which needs one (m, v) per entry instead of K, and the sum of the magnitudes instead of the K task vectors. Adam's
    epsilon is added to ``sqrt(v_hat)``, that is to the gradient of theta, not of alpha_k. With scales of one this is
    Adam on the parameters themselves.

    Args:
        parameters: P tensors, changed in place.
        scales: for each parameter ``sum_k |tau_k|``, of its shape; None: ones.
        learning_rate: Adam's step size, in units of a coefficient (of a parameter, where `scales` is None).
        betas: decay rates of the moments.
        eps: Adam's epsilon.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parameters = [parameter.detach() for parameter in parameters]
        self.scales = None if scales is None else list(scales)
        self.learning_rate, self.betas, self.eps = learning_rate, betas, eps
        self.first = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.second = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = 0
        state = (self.parameters, self.first, self.second, self.scales or self.parameters)
        self._parts = list(zip(*map(self._apart, state), strict=True))

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float = 1.0) -> None:
        """One step along `gradients`, in the order of the parameters; `rate` is a factor of the step size."""
        self.steps += 1
        low, high = self.betas
        size = -rate * self.learning_rate / (1 - low**self.steps)
        for own, (parameters, first, second, scales) in zip(self._apart(gradients), self._parts, strict=True):
            torch._foreach_lerp_(first, own, 1 - low)
            torch._foreach_mul_(second, high)
            torch._foreach_addcmul_(second, own, own, 1 - high)
            root = torch._foreach_div(second, 1 - high**self.steps)
            torch._foreach_sqrt_(root)
            torch._foreach_add_(root, self.eps)
            if self.scales is None:
                torch._foreach_addcdiv_(parameters, first, root, size)
            else:
                torch._foreach_addcmul_(parameters, torch._foreach_div(first, root), scales, size)

    def _apart(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """What is stepped on at once, of tensors of the parameters' shapes: everything, on a CPU `CHUNK` entries."""
        if any(one.device.type != "cpu" for one in self.parameters):
            return [list(tensors)]
        lying = [one.is_contiguous() for one in self.parameters]
        cut = [one.reshape(-1).split(CHUNK) if flat else [one] for one, flat in zip(tensors, lying, strict=True)]
        return [[part] for parts in cut for part in parts]


FACTOR_STEP = 3.0
"""How much larger a factor's step is, relative to the root of the mean square of its start, than a coefficient's,
relative to the sum of the task vectors' magnitudes; chosen on training rows."""


@dataclass(frozen=True)
class Moves:
    """How a unit's parameters are stepped on, by their names in the unit.

    Args:
        scales: ``sum_k |tau_k|`` of each parameter that is not factored: step on elementwise coefficients. None: on the
            parameters themselves.
        factors: of parameters that stay ``theta_0 + L R``: where L and R start. The unit holds theta_0 then.
        change: norm of the smallest task vector, relative to that of the parameters; 0 where nobody looked.
    """

    scales: Mapping[str, Tensor] | None = None
    factors: Mapping[str, LowRank] = field(default_factory=dict)
    change: float = 0.0


class Product:
    """A parameter that is ``theta_0 + L R`` and follows its thin factors.

    Args:
        parameter: theta_0, of any shape that the product's matrix (or stack of matrices) can be viewed in; changed in
            place.
        start: L (..., m, r) and R (..., r, n).
    """

    def __init__(self, parameter: Tensor, start: LowRank) -> None:
        self.parameter, self.origin = parameter.detach(), parameter.detach().clone()
        self.left, self.right = (part.to(parameter.device, copy=True) for part in (start.left, start.right))
        self.put()

    @property
    def product(self) -> LowRank:
        """The factors as they are now."""
        return LowRank(self.left, self.right, tuple(self.parameter.shape))

    @torch.no_grad()
    def put(self) -> None:
        """Bring the parameter to where the factors are."""
        torch.add(self.origin, self.product.dense(), out=self.parameter)

    def sizes(self) -> list[Tensor]:
        """What a step of both factors is relative to, of their shapes."""
        left, right = (own.square().mean().sqrt() for own in (self.left, self.right))
        pairs = (self.left, torch.where(left > 0, left, right)), (self.right, torch.where(right > 0, right, left))
        return [FACTOR_STEP * size.expand_as(own) for own, size in pairs]

    @torch.no_grad()
    def gradients(self, gradient: Tensor) -> list[Tensor]:
        """The gradients of L and R from that of the parameter."""
        matrix = gradient.reshape(*self.left.shape[:-1], self.right.shape[-1])
        return [matrix @ self.right.mT, self.left.mT @ matrix]


class Stepper:
    """Adam on everything of a unit that moves.

    A step size is relative: to ``sum_k |tau_k|`` for coefficients, and for a factor to `FACTOR_STEP` times the root of
    the mean square of its start (of the other factor's, where its own is zero).

    Args:
        parameters: what moves, by name; changed in place.
        products: those of them that follow their factors.
        scales: ``sum_k |tau_k|`` of the others; None: step on these themselves.
        learning_rate: Adam's step size.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        products: Mapping[str, Product],
        scales: Mapping[str, Tensor] | None,
        learning_rate: float,
    ) -> None:
        self.names, self.products = list(parameters), products
        self.plain = [name for name in self.names if name not in products]
        stepped = [parameters[name].detach() for name in self.plain]
        sizes = [torch.ones_like(own) for own in stepped] if scales is None else [scales[name] for name in self.plain]
        for product in products.values():
            stepped += [product.left, product.right]
            sizes += product.sizes()
        self.adam = CoefficientAdam(stepped, None if scales is None and not products else sizes, learning_rate)

    @property
    def steps(self) -> int:
        """Steps so far."""
        return self.adam.steps

    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """One step along the gradients of all parameters, in their order."""
        by_name = dict(zip(self.names, gradients, strict=True))
        own = [by_name[name] for name in self.plain]
        for name, product in self.products.items():
            own += product.gradients(by_name[name])
        self.adam.step(own, rate)
        self._put()

    def values(self) -> list[Tensor]:
        """A copy of everything that is stepped on, on the CPU."""
        return [own.to("cpu", copy=True) for own in self.adam.parameters]

    @torch.no_grad()
    def draw_back(self, start: Sequence[Tensor], interpolation: float) -> None:
        """Go back towards an earlier state of `values`: to it (0), or not at all (1)."""
        for own, origin in zip(self.adam.parameters, start, strict=True):
            own.copy_(torch.lerp(origin.to(own.device), own, interpolation))
        self._put()

    def _put(self) -> None:
        for product in self.products.values():
            product.put()
