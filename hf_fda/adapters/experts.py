"""Factors of single parameters, such as stacks of experts, as PEFT keeps them (`target_parameters`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_fda.lowrank import LowRank


def wrapper_paths(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Where PEFT keeps the factors of parameters.

    It wraps a module once for each of its adapted parameters, in their order: the last one's factors lie outermost.

    Args:
        model: the model without an adapter.
        names: of the adapted parameters.

    Returns:
        by name, the path of the wrapper, such as "layers.0.experts.base_layer".
    """
    of_module: dict[str, set[str]] = {}
    for name in names:
        module, _, parameter = name.rpartition(".")
        of_module.setdefault(module, set()).add(parameter)
    paths = {}
    for path, wanted in of_module.items():
        adapted = [name for name, _ in model.get_submodule(path).named_parameters(recurse=False) if name in wanted]
        for depth, parameter in enumerate(reversed(adapted)):
            paths[f"{path}.{parameter}"] = path + ".base_layer" * depth
    return paths


def parameter_halves(module: Any, product: LowRank) -> dict[str, Tensor]:
    """A product as the two tensors that PEFT keeps for a parameter: of a stack of E matrices, those of all beside each
    other, in A matrix by matrix (E r, n), in B column by column (m, r E).

    Args:
        module: that the parameter belongs to; one that says `is_transposed` holds matrices (d_in, d_out).
        product: of the parameter: left (m, r) and right (r, n), or (E, m, r) and (E, r, n).
    """
    left, right = product.left, product.right
    if left.ndim == 2:
        return {"lora_A.weight": right, "lora_B.weight": left}
    if getattr(module, "is_transposed", False):
        left, right = right.mT, left.mT
    return {"lora_A.weight": right.flatten(0, 1), "lora_B.weight": left.permute(1, 2, 0).flatten(1)}
