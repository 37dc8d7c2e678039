"""Which of a layer's inputs belong to a row, and which only fill it up."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fda.data.rows import Batch


class Positions:
    """Picks the inputs of a model's layers that are no padding, batch by batch.

    What was filled up is told by `attention_mask`, in a decoder behind an encoder by `decoder_attention_mask` or by the
    positions that are scored; inputs of other shapes (images, what was pooled) are none of it.

    Args:
        model: which will run.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._decoder, self._encoded = "", None
        self._masks: tuple[Tensor | None, Tensor | None] = (None, None)
        if model.config.is_encoder_decoder:
            decoder: Any = model.get_decoder()
            encoder: Any = model.get_encoder()
            self._decoder = next(f"{path}." for path, module in model.named_modules() if module is decoder)
            encoder.register_forward_hook(self._remember)

    def begin(self, batch: Batch) -> None:
        """The batch that runs next."""
        given = batch.inputs
        decoded = given.get("decoder_attention_mask", batch.scored)
        self._masks, self._encoded = (_as_mask(given.get("attention_mask")), _as_mask(decoded)), None

    def pick(self, path: str, x: Tensor) -> Tensor:
        """The inputs that are no padding, (tokens, d).

        Args:
            path: of the module in the model.
            x: (..., d), its input.
        """
        behind = bool(self._decoder) and path.startswith(self._decoder)
        mask = self._masks[1 if behind and not (self._encoded is not None and same(x, self._encoded)) else 0]
        if mask is not None and x.ndim > 2 and x.shape[:2] == mask.shape:
            return x[mask].reshape(-1, x.shape[-1])
        if mask is not None and x.ndim == 2 and len(x) == mask.numel():
            return x[mask.flatten()]
        return x.reshape(-1, x.shape[-1])

    def _remember(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._encoded = output[0]


def _as_mask(mask: Tensor | None) -> Tensor | None:
    return mask.bool() if mask is not None and mask.ndim == 2 else None


def same(x: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, seen alike; both must be alive."""
    return x.data_ptr() == other.data_ptr() and x.shape == other.shape and x.stride() == other.stride()
