"""What all encoders have in common: from a row to the tensors that a model's forward takes."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_fda.blocks import family_of
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.data.forms import Form
from hf_fda.data.tables import Row
from hf_fda.errors import InputError
from hf_fda.vocabulary.configuration import vocabulary_size


@dataclass(frozen=True)
class EncodedRow:
    """One row as the model takes it: `inputs` and `scored` as in `TaskRows`; `cut` says whether text was cut off.

    `written` are the tokens (n,) that an encoder-decoder should write, one for each position that counts.
    """

    inputs: dict[str, Tensor]
    scored: Tensor | None = None
    cut: bool = False
    written: Tensor | None = None

    @property
    def length(self) -> int:
        """How many tokens a text has."""
        return len(self.inputs["input_ids"])


class Encoder(ABC):
    """Encodes rows of one source; `padding` is as in `TaskRows`."""

    padding: Mapping[str, int]

    @abstractmethod
    def __call__(self, row: Row) -> EncodedRow | None:
        """One row; None where nothing is in it, or nothing of it is to be predicted."""


@dataclass(frozen=True)
class Taker:
    """The model that takes the rows, as far as encoders know it.

    `names` are its forward's arguments, `limit` the most tokens of a text (None: no limit), `vocabulary` how many there
    are, `pad` the id that fills up texts.
    """

    label: str
    form: Form
    layout: ModelLayout
    names: frozenset[str]
    limit: int | None
    vocabulary: int | None

    @classmethod
    def of(cls, layout: ModelLayout, form: Form, label: str) -> Taker:
        """The model of a layout."""
        names = frozenset(inspect.signature(layout.model_class.forward).parameters)
        return cls(label, form, layout, names, longest_text(layout), vocabulary_size(layout.config))

    def pad(self, own: int | None = None) -> int:
        """The id that texts are filled up with: the model's, which some models know the end of a text by; else the
        tokenizer's `own`, or 0, which attention masks hide.

        Raises:
            InputError: when a classifier needs the model's, and it has none.
        """
        said = getattr(self.layout.config.get_text_config(), "pad_token_id", None)
        if said is None and self.form.head == "classes" and family_of(self.layout) == "decoder":
            raise InputError(
                f"{self.label} is a {self.layout.model_class.__name__}, which finds the last token of a text by "
                "pad_token_id, and its config.json has none; write there which one it was trained with"
            )
        return said if said is not None else own if own is not None else 0

    def taken(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those of some encoded values that the model takes, as tensors.

        Raises:
            InputError: when a token has no row in the model.
        """
        inputs = {name: torch.as_tensor(value) for name, value in values.items() if name in self.names}
        ids = inputs.get("input_ids")
        if ids is not None and ids.numel() and self.vocabulary is not None and int(ids.max()) >= self.vocabulary:
            raise InputError(
                f"{self.label}: its rows have token {int(ids.max())}, and its vocabulary {self.vocabulary}; they were "
                "encoded by a tokenizer that is not the model's"
            )
        return inputs


def longest_text(layout: ModelLayout) -> int | None:
    """The most tokens that a model has positions for; None where it sets no limit."""
    text = layout.config.get_text_config()
    said = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits = [limit for limit in said if isinstance(limit, int) and limit > 0]
    for name, module in layout.model.named_modules():
        # positions of some models are counted from behind that of padding
        if (
            isinstance(module, nn.Embedding)
            and "position" in name.rpartition(".")[2]
            and module.padding_idx is not None
        ):
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits, default=None)


def text_of(row: Row, names: Sequence[str]) -> list[str] | None:
    """A row's texts; None where one of them is empty."""
    texts = [row.get(name) for name in names]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return None
    return [str(text) for text in texts]


def next_tokens(counted: Tensor) -> Tensor:
    """Where logits count when certain tokens are to be predicted: one position before each.

    >>> next_tokens(torch.tensor([False, False, True, True])).tolist()
    [False, True, True, False]

    Args:
        counted: (positions,) bool, the tokens.
    """
    return torch.cat([counted[1:], counted.new_zeros(1)])
