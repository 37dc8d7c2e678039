"""Compare Adam on elementwise coefficients of K task vectors with its plain form: memory, time, trajectory.

    python examples/benchmarks/adaptation.py [--shape minilm] [--sources 8] [--device cuda]

The plain form keeps K coefficient tensors for each parameter in torch.optim.Adam, sums ``theta_0 + sum alpha_k tau_k``
before each step and hands it the gradients ``tau_k g``. `CoefficientAdam` keeps one pair of moments and the sum of the
task vectors' magnitudes. Both take whole steps in turn, with the block's forward and backward pass, which are timed
apart; a third block takes them as `adapt_unit` does by default, with products at precision "medium". Theta differs
where a coefficient's gradient is as small as Adam's epsilon, which the plain form adds to it and `CoefficientAdam` to
the gradient of theta.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

import torch
from construction import random_model, seconds
from torch import Tensor, nn

from hf_fda.anchors import CoefficientAdam
from hf_fda.anchors.distance import distance
from hf_fda.anchors.precision import matmul_precision
from hf_fda.anchors.products import NarrowProducts
from hf_fda.blocks import UnitCall, capture_calls, find_units, make_unit
from hf_fda.checkpoint import ModelCheckpoint

LEARNING_RATE = 1e-2
LAMBDA = 0.3


class PlainAdam:
    """torch.optim.Adam on K coefficients of every entry, all `initial` at first; changes `parameters` in place."""

    def __init__(
        self, parameters: list[Tensor], base: list[Tensor], tasks: list[list[Tensor]], initial: float = LAMBDA
    ) -> None:
        self.parameters, self.base, self.tasks = parameters, base, tasks
        self.alphas = [[torch.full_like(task, initial).requires_grad_(True) for task in own] for own in tasks]
        self.optimizer = torch.optim.Adam([alpha for own in self.alphas for alpha in own], lr=LEARNING_RATE)

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> None:
        """One step along the gradients at theta, in the order of the parameters."""
        for gradient, alphas, tasks in zip(gradients, self.alphas, self.tasks, strict=True):
            for alpha, task in zip(alphas, tasks, strict=True):
                alpha.grad = task * gradient
        self.optimizer.step()
        for parameter, start, alphas, tasks in zip(self.parameters, self.base, self.alphas, self.tasks, strict=True):
            parameter.copy_(start)
            for alpha, task in zip(alphas, tasks, strict=True):
                parameter.addcmul_(alpha, task)

    def state_bytes(self) -> int:
        """Bytes of coefficients and moments."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        alphas = [alpha for own in self.alphas for alpha in own]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*moments, *alphas))


def make_block(shape: str, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, UnitCall]:
    """A random block and how to call it."""
    checkpoint = ModelCheckpoint(random_model(shape, 0), "base")
    unit = find_units(checkpoint.layout, ("block",))[0]
    tensors = {name: checkpoint.read(name).to(device, dtype) for name in unit.tensors}
    call = capture_calls(checkpoint, [unit], 5, device).calls[unit.name].to(dtype)
    return make_unit(checkpoint.layout, unit, tensors, device), call


def main() -> None:
    """Take steps of both in turn, print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["minilm", "roberta", "llama"], default="minilm")
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--double", action="store_true", help="float64, which shows that the trajectories are one")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), torch.float64 if options.double else torch.float32
    module, call = make_block(options.shape, device, dtype)
    torch.manual_seed(0)
    base = [parameter.detach() for parameter in module.parameters()]
    tasks = [[0.01 * torch.randn_like(start) for _ in range(options.sources)] for start in base]
    assert call.size is not None
    x = torch.randn(options.batch, 5, call.size, device=device, dtype=dtype)
    target = call(module, x + 0.1 * torch.randn_like(x)).detach()

    blocks = {name: copy.deepcopy(module).requires_grad_(True) for name in ("plain", "own", "medium")}
    for block in blocks.values():
        for parameter, start, own in zip(block.parameters(), base, tasks, strict=True):
            parameter.data.copy_(start + LAMBDA * sum(own))
    parameters = {name: list(block.parameters()) for name, block in blocks.items()}
    plain = PlainAdam([parameter.data for parameter in parameters["plain"]], base, tasks)
    scales = [torch.stack(own).abs().sum(0) for own in tasks]
    own_adam, medium_adam = (
        CoefficientAdam([parameter.data for parameter in parameters[name]], scales, LEARNING_RATE)
        for name in ("own", "medium")
    )
    steppers: dict[str, Any] = {"plain": plain, "own": own_adam, "medium": medium_adam}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steppers}

    def gradients(name: str) -> list[Tensor]:
        with matmul_precision("medium" if name == "medium" else None, device):
            with NarrowProducts():
                loss = distance("mse", call(blocks[name], x), target) * target.numel()
            return list(torch.autograd.grad(loss, parameters[name], materialize_grads=True))

    for _ in range(options.steps):
        for name, stepper in steppers.items():
            found: list[list[Tensor]] = []
            passes = seconds(lambda name=name, found=found: found.append(gradients(name)), device)  # type: ignore[misc]
            step = seconds(lambda stepper=stepper, found=found: stepper.step(found[0]), device)  # type: ignore[misc]
            times[name].append((step, passes + step))
    held = sum(m.numel() * m.element_size() for m in (*own_adam.first, *own_adam.second, *scales))
    alone, whole = ([statistics.median(t[at] for t in times[name][3:]) for name in steppers] for at in (0, 1))
    pairs = list(zip(parameters["plain"], parameters["own"], base, strict=True))
    moved = max(float((a - start).detach().abs().max()) for a, _, start in pairs)
    apart = max(float((a - b).detach().abs().max()) for a, b, _ in pairs)
    print(f"{options.sources} sources, {sum(start.numel() for start in base) / 1e6:.2f} million entries")
    print(
        f"state: plain {plain.state_bytes() / 1e6:.1f} MB, own {held / 1e6:.1f} MB: {plain.state_bytes() / held:.1f}x"
    )
    print(f"optimiser step: plain / own = {alone[0] / alone[1]:.2f}; whole step: {whole[0] / whole[1]:.2f}, ", end="")
    print(f"with products at precision medium {whole[0] / whole[2]:.2f}")
    print(f"largest difference of theta after {options.steps} steps: {apart:.1e}, of {moved:.1e} moved")


if __name__ == "__main__":
    main()
