"""What a source takes in and what its logits mean, told from its class and configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.data.rows import Kind
from hf_fda.errors import InputError

Head = Literal["classes", "words", "causal", "masked", "seq2seq", "none"]
"""What is predicted: something of a whole row, a label of each token, the next token, the token itself, the next
token of another text, or nothing that can be compared between models."""


@dataclass(frozen=True)
class Form:
    """How rows of one source look: `takes` text or images, `head` says what is predicted, `kind` what logits mean."""

    takes: Literal["text", "image"]
    head: Head
    kind: Kind


HEADS: tuple[tuple[str, Head, tuple[str, ...]], ...] = (
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "classes", ("ForSequenceClassification",)),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "classes", ("ForImageClassification",)),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "words", ("ForTokenClassification",)),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "masked", ("ForMaskedLM",)),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "causal", ("ForCausalLM", "LMHeadModel")),
)
"""Where the library lists the classes of each head, and how classes that it does not list end."""


TAKES: dict[str, Literal["text", "image"]] = {"input_ids": "text", "pixel_values": "image"}
"""What models take in, by the name of their forward's main argument."""


def form_of(layout: ModelLayout, label: str, compared: bool = True) -> Form:
    """The form of a source's rows.

    Args:
        layout: the source's.
        label: what to call it in errors.
        compared: whether outputs are compared on the rows, and not hidden states alone.

    Raises:
        InputError: when its outputs are no distribution that can be compared between models.
    """
    name = layout.model_class.__name__
    if not layout.known:
        raise InputError(
            f"{label}: transformers does not know {name}, so what it takes and gives is not known; pass "
            "trust_remote_code=True if it comes with code that you trust, or use a method that needs no data"
        )
    head, takes = _head(layout), TAKES.get(layout.model.main_input_name)
    if head is None and takes is not None and not (compared or layout.config.is_encoder_decoder):
        return Form(takes, "none", "states")
    if head is None or takes is None or (takes == "image" and head != "classes"):
        raise InputError(
            f"{label} is a {name}, whose outputs cannot be compared on rows of data: that takes a model of text or "
            "images with a head that gives 'logits' over labels or tokens (ForSequenceClassification, "
            "ForTokenClassification, ForImageClassification, ForCausalLM, ForMaskedLM, or an encoder-decoder's "
            "ForConditionalGeneration); give the checkpoint with its head, or use a method that needs no data"
        )
    return Form(takes, head, _kind(layout.config) if head == "classes" else "tokens")


def _head(layout: ModelLayout) -> Head | None:
    name = layout.model_class.__name__
    if layout.config.is_encoder_decoder and (
        name in _listed("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES") or name.endswith("ForConditionalGeneration")
    ):
        return "seq2seq"
    for mapping, head, endings in HEADS:
        if name in _listed(mapping) or name.endswith(endings):
            return head
    return None


@cache
def _listed(mapping: str) -> frozenset[str]:
    """The classes in one of the library's lists."""
    names: set[str] = set()
    for value in getattr(modeling_auto, mapping).values():
        names.update([value] if isinstance(value, str) else value)
    return frozenset(names)


def _kind(config: PretrainedConfig) -> Kind:
    """What the logits of a classifier mean, as the library's own losses take them."""
    if config.problem_type == "multi_label_classification":
        return "flags"
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        return "values"
    return "labels"
