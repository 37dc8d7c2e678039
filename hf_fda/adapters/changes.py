"""What an adapter does to each tensor of the base: thin factors where it is thin, PEFT's own merge where it is not."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper, _ConvNd
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_fda.adapters.files import REPLAYED
from hf_fda.adapters.skeleton import Skeleton, plain_name
from hf_fda.errors import InputError
from hf_fda.lowrank import LowRank, add


class Change(ABC):
    """What an adapter does to one tensor."""

    @abstractmethod
    def task(self, base: Tensor) -> Tensor:
        """The task tensor, of the shape, type and device of the base's tensor, which is not changed."""

    def factors(self, base: Tensor | None) -> LowRank | None:
        """The task tensor as a product of thin factors; None where it is not one.

        Args:
            base: the base's tensor; may be None where `needs_base` is false.
        """
        return None

    needs_base: bool = False
    """Whether factors depend on the base's tensor."""

    @property
    def rank(self) -> int | None:
        """The rank of the factors; None where there are none."""
        return None


@dataclass
class Thin(Change):
    """A product of two factors is added."""

    product: LowRank

    def task(self, base: Tensor) -> Tensor:
        """The product itself."""
        return self.product.to(base.device, base.dtype).dense()

    def factors(self, base: Tensor | None) -> LowRank:
        """The product's factors."""
        return self.product

    @property
    def rank(self) -> int:
        """The adapter's rank."""
        return self.product.rank


@dataclass
class Residual(Change):
    """A product is added, and what the adapter was initialised with, which depends on the base, is taken out."""

    product: LowRank
    layer: LoraLayer
    method: str
    adapter: str
    needs_base = True

    @property
    def rank(self) -> int:
        """Twice the adapter's rank."""
        return 2 * self.product.rank

    def task(self, base: Tensor) -> Tensor:
        """The product less the initial one."""
        return self.factors(base).to(base.device, base.dtype).dense()

    def factors(self, base: Tensor | None) -> LowRank:
        """Both products beside each other: twice the adapter's rank."""
        assert base is not None
        layer: Any = _hollow_copy(self.layer, "weight")
        own = base.detach().to("cpu", torch.float32, copy=True)  # the initialisation changes it
        layer.get_base_layer().weight = nn.Parameter(own, requires_grad=False)
        if self.method == "olora":
            layer.olora_init(self.adapter)
        else:
            layer.pissa_init(self.adapter, self.method)
        return add([self.product, _linear_product(layer, self.adapter).scaled(-1.0)])


@dataclass
class Added(Change):
    """A tensor is added."""

    tensor: Tensor

    def task(self, base: Tensor) -> Tensor:
        """The tensor."""
        return self.tensor.to(base.device, base.dtype)


@dataclass
class Replaced(Change):
    """The tensor is another one."""

    tensor: Tensor

    def task(self, base: Tensor) -> Tensor:
        """The difference of both."""
        return self.tensor.to(base.device, base.dtype) - base


@dataclass
class Rebased(Change):
    """The tensor is another one, and something is done to that: PEFT saves adapted embeddings with their weights."""

    tensor: Tensor
    change: Change
    needs_base = True

    def task(self, base: Tensor) -> Tensor:
        """The changed other tensor less the base's."""
        own = self.tensor.to(base.device, base.dtype)
        return own - base + self.change.task(own)

    def factors(self, base: Tensor | None) -> LowRank | None:
        """Those of what is done, where the other tensor is the base's."""
        assert base is not None
        same = self.tensor.shape == base.shape and torch.equal(self.tensor.to(base.device, base.dtype), base)
        return self.change.factors(base) if same else None


@dataclass
class Rows(Change):
    """Some rows of an embedding are others."""

    indices: Tensor
    rows: Tensor
    shape: tuple[int, ...]
    needs_base = True

    def task(self, base: Tensor) -> Tensor:
        """Zero but for the differences of these rows."""
        return self.factors(base).to(base.device, base.dtype).dense()

    def factors(self, base: Tensor | None) -> LowRank:
        """Which rows, and by how much they differ: of their number's rank."""
        assert base is not None
        dtype = torch.promote_types(base.dtype, torch.float32)
        chosen = torch.zeros(self.shape[0], len(self.indices), dtype=dtype)
        chosen[self.indices, torch.arange(len(self.indices))] = 1
        return LowRank(chosen, self.rows.to("cpu", dtype) - base[self.indices].to("cpu", dtype), self.shape)

    @property
    def rank(self) -> int:
        """The number of rows."""
        return len(self.indices)


@dataclass
class Merged(Change):
    """The tensor that PEFT's own merge of a layer makes, in float64."""

    layer: Any
    parameter: str
    adapter: str

    def task(self, base: Tensor) -> Tensor:
        """The merged tensor less the base's."""
        layer = _hollow_copy(self.layer, self.parameter).double()
        inner = layer.get_base_layer()
        setattr(inner, self.parameter, nn.Parameter(base.detach().cpu().double().clone(), requires_grad=False))
        layer.merge(safe_merge=False, adapter_names=[self.adapter])
        merged = getattr(inner, self.parameter).detach()
        return (merged - base.cpu().double()).to(base.device, base.dtype)


def find_changes(label: str, skeleton: Skeleton, init: Any) -> dict[str, Change]:
    """Every tensor that an adapter changes, by its name in the model without the adapter; tied ones each on its own.

    Args:
        label: the adapter, for messages.
        skeleton: the model it is in.
        init: its `init_lora_weights`.

    Raises:
        InputError: when it changes what the model does not have (a bias), or what cannot be told.
    """
    model: Any = skeleton.model.base_model.model
    found: dict[str, Change] = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and skeleton.adapter in module._get_available_adapters():
            for parameter, change in _layer_changes(label, path, module, init, skeleton.adapter):
                name = plain_name(f"{path}.{parameter}")
                if name in found:
                    raise InputError(f"{label}: the adapter changes '{name}' in two ways, which cannot be merged")
                found[name] = change
    layout = skeleton.layout
    found |= {name: Replaced(value) for name, value in skeleton.whole.items()}
    for name in found:
        if name not in layout.shapes and name not in layout.tied:
            raise InputError(f"{label}: the adapter changes '{name}', which the model does not have or does not store")
    return found


def _hollow_copy(layer: Any, parameter: str) -> Any:
    """A copy of an adapted layer on the CPU, with nothing for one of the base's parameters."""
    original = getattr(layer.get_base_layer(), parameter)
    return copy.deepcopy(layer, {id(original): nn.Parameter(torch.empty(0), requires_grad=False)}).cpu()


def _is(layer: Any, kind: type) -> bool:
    """`isinstance` without narrowing the type: the attributes of a module are of too many types to be checked."""
    return isinstance(layer, kind)


def _layer_changes(label: str, path: str, layer: Any, init: Any, adapter: str) -> Iterator[tuple[str, Change]]:
    inner = layer.get_base_layer()
    if _is(layer, ParamWrapper):
        yield layer.parameter_name, Thin(_stacked_product(layer, adapter))
        return
    if _is(layer, TrainableTokensLayer):
        own: Any = layer if layer.tied_adapter is None else layer.tied_adapter
        indices = torch.tensor(own.token_indices[adapter], dtype=torch.long)
        yield "weight", Rows(indices, own.trainable_tokens_delta[adapter].detach(), tuple(inner.weight.shape))
        return
    if not _is(layer, LoraLayer):
        yield "weight", Merged(layer, "weight", adapter)
        if getattr(layer, "is_feedforward", True) is False and getattr(inner, "bias", None) is not None:
            yield "bias", Merged(layer, "bias", adapter)  # IA3 scales what a layer puts out
        return
    if adapter in layer.lora_variant and not layer.use_dora[adapter]:
        kind = type(layer.lora_variant[adapter]).__name__
        raise InputError(f"{label}: layer '{path}' is a {kind}, which is not understood; it cannot be merged")
    yield "weight", _weight_change(layer, init, adapter)
    if layer.lora_bias[adapter]:
        yield "bias", Added(layer.lora_B[adapter].bias.detach() * layer.scaling[adapter])


def _weight_change(layer: Any, init: Any, adapter: str) -> Change:
    """What a layer of LoRA does to its weight."""
    if layer.use_dora[adapter] or (_is(layer, _ConvNd) and layer.get_base_layer().groups > 1):
        return Merged(layer, "weight", adapter)
    scaling = layer.scaling[adapter]
    if _is(layer, Embedding):
        left, right = layer.lora_embedding_A[adapter].detach().mT, layer.lora_embedding_B[adapter].detach().mT
        return Thin(LowRank(left * scaling, right, (left.shape[0], right.shape[1])))
    if _is(layer, _ConvNd):
        left, right = (part[adapter].weight.detach().flatten(1) for part in (layer.lora_B, layer.lora_A))
        return Thin(LowRank(left * scaling, right, tuple(layer.get_base_layer().weight.shape)))
    if isinstance(init, str) and init in REPLAYED:
        return Residual(_linear_product(layer, adapter), layer, init, adapter)
    return Thin(_linear_product(layer, adapter))


def _linear_product(layer: Any, adapter: str) -> LowRank:
    left, right = layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()
    left = left * layer.scaling[adapter]
    if layer.fan_in_fan_out:  # the weight lies as (d_in, d_out)
        left, right = right.mT, left.mT
    return LowRank(left, right, (left.shape[0], right.shape[1]))


def _stacked_product(layer: Any, adapter: str) -> LowRank:
    shape = tuple(layer.get_param().shape)
    if len(shape) == 2:  # PEFT's factors are those of the transpose, but what it adds is not
        left, right, scaling = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight, layer.scaling[adapter]
    else:
        left, right, scaling = layer.get_delta_factors(adapter)
    return LowRank(left.detach() * scaling, right.detach(), shape)
