"""What of a model counts tokens: tensors, found by trying, and the configuration's size and token ids."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PretrainedConfig

from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.errors import InputError, few
from hf_fda.vocabulary.tokens import Tokens

TOKEN_IDS = re.compile(r".*_token_(id|ids|index)|(begin_)?suppress_tokens|bad_words_ids")
"""Settings that name tokens by their ids."""

OF_TYPES = "type_vocab_size"

Rename = Callable[[int], int | None]
"""From an id to that of the same token in another vocabulary; None where that lacks it."""


def renaming(own: Tokens, out: Tokens) -> Rename:
    """From a model's ids to the output's; an id that is no token's stays.

    >>> rename = renaming(Tokens("own", {"a": 0, "b": 1}, 2), Tokens("out", {"b": 0}, 1))
    >>> rename(0), rename(1), rename(-1)
    (None, 0, -1)
    """
    tokens: dict[int, list[str]] = {}
    for token, number in own.ids.items():
        tokens.setdefault(number, []).append(token)

    def rename(number: int) -> int | None:
        if number not in tokens:
            return number
        return next((out.ids[token] for token in tokens[number] if token in out.ids), None)

    return rename


def vocabulary_size(config: PretrainedConfig) -> int | None:
    """How many rows a model's vocabulary tensors have; None of a model that takes no text."""
    try:
        size = getattr(config.get_text_config(), "vocab_size", None)
    except ValueError:  # several text towers, each with a vocabulary of its own
        return None
    return size if isinstance(size, int) else None


def vocabulary_axes(layout: ModelLayout) -> dict[str, int]:
    """The tensors that count tokens, with the axis that does: those that grow with the configuration's vocabulary.

    Embeddings, heads, heads' biases and per-token buffers, whatever they are called and however many there are.
    """
    size = vocabulary_size(layout.config)
    if size is None:
        return {}
    larger = ModelLayout(resized(layout.config, size + 1), layout.model_class).shapes
    return {
        name: next(axis for axis, (ours, theirs) in enumerate(zip(shape, larger[name], strict=True)) if ours != theirs)
        for name, shape in layout.shapes.items()
        if shape != larger[name]
    }


def check_one_vocabulary(layout: ModelLayout, label: str) -> None:
    """Refuse a model with further vocabularies, whose tensors would stay as they are.

    Raises:
        InputError: naming the settings.
    """
    text = layout.config.get_text_config()
    further = [name for name in text.to_dict() if "vocab_size" in name and name not in ("vocab_size", OF_TYPES)]
    found = [name for name in further if isinstance(getattr(text, name, None), int)]
    for name in layout.config.sub_configs:
        part = getattr(layout.config, name, None)
        if part is not text and isinstance(getattr(part, "vocab_size", None), int):
            found.append(f"{name}.vocab_size")
    if found:
        raise InputError(
            f"{label} is a {layout.model_class.__name__} with several vocabularies ({few(found)}); these cannot be "
            "aligned: merge models whose tokens are the same"
        )


def resized(config: PretrainedConfig, rows: int) -> PretrainedConfig:
    """A copy of a configuration for another number of rows."""
    config = copy.deepcopy(config)
    config.get_text_config().vocab_size = rows
    return config


def with_rows(layout: ModelLayout, config: PretrainedConfig, axes: Mapping[str, int], rows: int) -> ModelLayout:
    """The layout of the same model with another number of rows.

    Args:
        layout: the model's own.
        config: for the new number of rows.
        axes: its vocabulary tensors.
        rows: the new number.

    Raises:
        InputError: when another tensor changes, too.
    """
    found = ModelLayout(config, layout.model_class)
    conversions = getattr(layout.model, "_weight_conversions", None)
    if conversions is not None:
        found.model._weight_conversions = conversions
    for name, shape in layout.shapes.items():
        expected = list(shape)
        if name in axes:
            expected[axes[name]] = rows
        if found.shapes.get(name) != tuple(expected):
            raise InputError(
                f"a {layout.model_class.__name__} with {rows} tokens has a tensor '{name}' {found.shapes.get(name)}, "
                f"not {tuple(expected)}; its vocabulary cannot be changed"
            )
    return found


def with_ids(config: PretrainedConfig, rename: Rename, preferred: PretrainedConfig | None, label: str) -> None:
    """Let a configuration, and those of its towers, mean the same tokens by other ids; changes it.

    Args:
        config: what is changed.
        rename: from its ids to the new ones.
        preferred: a configuration whose settings are taken instead, where it has them.
        label: what to call the model in errors.

    Raises:
        InputError: when a token that the model cannot do without is not in the new vocabulary.
    """
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            with_ids(value, rename, getattr(preferred, name, None), label)
        elif TOKEN_IDS.fullmatch(name) and value is not None:
            known = preferred is not None and hasattr(preferred, name)
            wanted = getattr(preferred, name) if known else renamed(value, rename)
            try:
                setattr(config, name, wanted)
            except Exception:  # the library validates what is set in ways of its own
                raise InputError(
                    f"{label}: the model's {name} ({value}) is a token that the output vocabulary lacks; choose a "
                    "tokenizer that has it"
                ) from None


def renamed(value: Any, rename: Rename) -> Any:
    """A setting's ids, one or lists of them, by their new numbers; tokens that are gone are left out."""
    if isinstance(value, bool) or not isinstance(value, (int, list)):
        return value
    if isinstance(value, int):
        return rename(value)
    return [own for own in (renamed(item, rename) for item in value) if own is not None]
