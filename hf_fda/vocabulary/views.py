"""Base and sources seen through maps of rows, so that a row is the same token in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.view import RowView
from hf_fda.errors import InputError, few
from hf_fda.vocabulary.configuration import (
    check_one_vocabulary,
    renaming,
    resized,
    vocabulary_axes,
    with_ids,
    with_rows,
)
from hf_fda.vocabulary.request import TokenRule
from hf_fda.vocabulary.rows import SharedRows, own_rows
from hf_fda.vocabulary.tokens import Tokens


@dataclass(frozen=True)
class Party:
    """A model of the merge: the base (called "base"), or a source.

    `common` maps the model's tensor names to names that are the same in all models.
    """

    name: str
    label: str
    checkpoint: Checkpoint
    tokens: Tokens
    common: Mapping[str, str]


@dataclass(frozen=True)
class Seen:
    """The models as the merge sees them, the base first; what was done to each in words; a hash of what every row of
    the output is made of, "" where nothing was done."""

    checkpoints: tuple[Checkpoint, ...]
    notes: tuple[str, ...] = ()
    fingerprint: str = ""


def see(
    parties: Sequence[Party],
    out: Tokens,
    rules: Mapping[str, TokenRule],
    preferred: PretrainedConfig | None = None,
    with_base: bool = True,
) -> Seen:
    """Let all models have the output's tokens in the output's rows.

    Args:
        parties: the base, then the sources.
        out: the output's tokens.
        rules: what a user said of single tokens.
        preferred: the configuration whose token ids the models get; None: their own, renumbered.
        with_base: whether the first is a base, whose rows the others get for tokens that they lack.

    Raises:
        InputError: when a rule cannot be kept, or a model's vocabulary cannot be changed.
    """
    own = torch.stack([own_rows(out, party.tokens) for party in parties])
    given = {_row(token, out): _given(rule, parties) for token, rule in rules.items()}
    rows = own.clone()
    rows[:, [out.ids[token] for token, rule in rules.items() if rule.force]] = -1
    changed = [not is_same(found, party.tokens, out) for found, party in zip(rows, parties, strict=True)]
    if not any(changed) and preferred is None:
        return Seen(tuple(party.checkpoint for party in parties))
    axes = [vocabulary_axes(party.checkpoint.layout) for party in parties]
    names = [_held(party, found) for party, found in zip(parties, axes, strict=True)]
    common = {
        party.common[name]: axis for party, found in zip(parties, axes, strict=True) for name, axis in found.items()
    }
    _check_given(rules, parties, names, common)
    used = torch.zeros(out.rows, dtype=torch.bool)
    used[list(out.ids.values())] = True
    shared = SharedRows([party.checkpoint for party in parties], names, common, own, used, given, with_base)
    seen, notes = [], []
    for index, party in enumerate(parties):
        if not axes[index] or not (changed[index] or (index == 0 and preferred is not None)):
            seen.append(party.checkpoint)
            continue
        seen.append(_view(party, axes[index], rows[index], out, shared, preferred))
        notes.extend(_note(party, out, rules, with_base))
    return Seen(tuple(seen), tuple(notes), shared.fingerprint())


def _held(party: Party, axes: Mapping[str, int]) -> dict[str, str]:
    """The vocabulary tensors that a model really holds, by the names that are the same in all models."""
    held = set(party.checkpoint.names)
    return {party.common[name]: name for name in axes if name in held}


def is_same(rows: Tensor, own: Tokens, out: Tokens) -> bool:
    """Whether a map of rows leaves a model as it is."""
    return own.rows == out.rows and torch.equal(rows, torch.arange(out.rows))


def _view(
    party: Party,
    axes: Mapping[str, int],
    rows: Tensor,
    out: Tokens,
    shared: SharedRows,
    preferred: PretrainedConfig | None,
) -> RowView:
    """One model seen through its map."""
    layout = party.checkpoint.layout
    check_one_vocabulary(layout, party.label)
    config = resized(layout.config, out.rows)
    with_ids(config, renaming(party.tokens, out), preferred, party.label)
    wider = with_rows(layout, config, axes, out.rows)
    return RowView(party.checkpoint, wider, axes, rows, lambda name, wanted: shared.take(party.common[name], wanted))


def _row(token: str, out: Tokens) -> int:
    if token not in out.ids:
        raise InputError(f"tokens: '{token}' has no row in the output's vocabulary of {out.rows}")
    return out.ids[token]


def _given(rule: TokenRule, parties: Sequence[Party]) -> tuple[int, int] | None:
    """The model and the row of it that a rule names; None for zeros."""
    if rule.model is None:
        return None
    index, party = next((index, party) for index, party in enumerate(parties) if party.name == rule.model)
    row = party.tokens.ids.get(rule.token) if rule.token_id is None else rule.token_id
    if row is None:
        raise InputError(f"tokens: {party.label} ({party.checkpoint.id}) has no token '{rule.token}'")
    if row >= party.tokens.rows:
        raise InputError(
            f"tokens: {party.label} ({party.checkpoint.id}) has {party.tokens.rows} rows, none of id {row}"
        )
    return index, row


def _check_given(
    rules: Mapping[str, TokenRule],
    parties: Sequence[Party],
    names: Sequence[Mapping[str, str]],
    common: Mapping[str, int],
) -> None:
    """Refuse a rule that takes a row from a model without that tensor."""
    for token, rule in rules.items():
        for party, known in zip(parties, names, strict=True):
            lacking = [key for key in common if key not in known]
            if party.name == rule.model and lacking:
                raise InputError(
                    f"tokens: '{token}' is to have the row of {party.label} ({party.checkpoint.id}), which has no "
                    f"tensor '{lacking[0]}'; take it from another model"
                )


def _note(party: Party, out: Tokens, rules: Mapping[str, TokenRule], with_base: bool) -> list[str]:
    """What is done to one model, in words."""
    own = party.tokens.ids
    lacking = [token for token in out.ids if token not in own and token not in rules]
    ruled = [token for token, rule in rules.items() if token not in own or rule.force]
    moved = [token for token, row in own.items() if out.ids.get(token, row) != row]
    dropped = [token for token in own if token not in out.ids]
    if party.name == "base" and not with_base:
        return []
    mean = party.name == "base" or not with_base
    shared = "added as the mean of the sources that have them" if mean else "taken from the base"
    kinds = ((lacking, shared), (ruled, "set by rule"), (moved, "moved to other rows"), (dropped, "left out"))
    said = [f"{_counted(tokens)} {what} ({few(tokens)})" for tokens, what in kinds if tokens]
    if party.tokens.rows != out.rows:
        said.append(f"{party.tokens.rows} rows become {out.rows}")
    return [f"{party.label}: {'; '.join(said)}"] if said else []


def _counted(tokens: Sequence[str]) -> str:
    return f"{len(tokens)} token{'' if len(tokens) == 1 else 's'}"
