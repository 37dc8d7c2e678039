"""What a source's answers depend on, of what its last block gives, and the metric of errors that follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from conftest import TEXT
from learning import text_rows
from torch import Tensor
from torch.nn import functional

from hf_fda.anchors.metric import read_metric, shift_metric
from hf_fda.blocks import find_units
from hf_fda.checkpoint.alignment import AlignedSource, align
from hf_fda.checkpoint.reader import open_checkpoint
from hf_fda.data.rows import Kind, TaskRows
from hf_fda.states.unit_states import Ragged
from hf_fda.statistics import passes
from hf_fda.statistics.sensitivity import Sensitivity, sensitivity

CPU = torch.device("cpu")

BERT = t.BertConfig(**TEXT, num_labels=3)
MODERN = t.ModernBertConfig(**{**TEXT, "num_labels": 2, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2})
GPT2 = t.GPT2Config(vocab_size=99, n_embd=16, n_layer=2, n_head=2, num_labels=4, pad_token_id=0)


def source_of(model: Any, folder: Path) -> AlignedSource:
    """A model as the only source of itself."""
    model.save_pretrained(folder)
    return align(open_checkpoint(folder), open_checkpoint(folder), "one")


def found(source: AlignedSource, rows: TaskRows) -> Sensitivity | None:
    """Of the last block."""
    last = find_units(source.checkpoint.layout, ("block",))[-1].name
    return sensitivity(source, last, rows, CPU, torch.Generator().manual_seed(0))


def classifier(config: Any, **options: Any) -> Any:
    """A classifier whose head is no smaller than its other layers, so that answers are not all alike."""
    torch.manual_seed(0)
    config = type(config).from_dict({**config.to_dict(), **options})
    model = t.AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize(
    ("config", "options", "which"),
    [
        (BERT, {}, "first"),
        (MODERN, {"classifier_pooling": "cls"}, "first"),
        (MODERN, {"classifier_pooling": "mean"}, "all"),
        (GPT2, {}, "last"),
    ],
)
def test_positions_are_those_that_the_head_reads(
    config: Any, options: Any, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "TOKENS", 100)
    rows = text_rows("one", "labels", count=40)  # of different lengths, in several batches
    read = found(source_of(classifier(config, **options), tmp_path), rows)
    assert read is not None
    for number, row in enumerate(rows.inputs):
        length = len(row["input_ids"])
        there = {"first": [0], "last": [length - 1], "all": list(range(length))}[which]
        assert read.positions[number].nonzero()[:, 0].tolist() == there


@pytest.mark.parametrize("kind", ["labels", "flags", "values"])
def test_fisher_is_the_second_derivative_of_the_divergence_from_the_answers(kind: Kind, tmp_path: Path) -> None:
    model, rows = classifier(BERT), text_rows("one", kind, count=5)
    read = found(source_of(model, tmp_path), rows)
    assert read is not None
    expected = torch.zeros(32, 32, dtype=torch.float64)
    model = model.double()
    for row in rows.inputs:
        with torch.no_grad():
            hidden = model.bert(**{name: tensor[None] for name, tensor in row.items()}).last_hidden_state
        answer = model.classifier(model.bert.pooler(hidden))[0].detach()

        def apart(error: Tensor, hidden: Tensor = hidden, answer: Tensor = answer) -> Tensor:
            own = model.classifier(model.bert.pooler(hidden + error))[0]
            if kind == "values":
                return (own - answer).square().sum() / 2
            if kind == "flags":
                own, answer = (torch.stack([z, -z]) for z in (own, answer))
                return (answer.sigmoid() * (functional.logsigmoid(answer) - functional.logsigmoid(own))).sum()
            return functional.kl_div(own.log_softmax(-1), answer.log_softmax(-1), log_target=True, reduction="sum")

        expected += torch.autograd.functional.hessian(apart, torch.zeros(32, dtype=torch.float64)) / len(rows)
    torch.testing.assert_close(read.fisher.double(), expected, rtol=1e-4, atol=1e-7)


def test_answers_for_each_position_depend_on_all(tmp_path: Path) -> None:
    model = t.BertForTokenClassification(BERT)
    assert found(source_of(model, tmp_path), text_rows("one", "tokens", by_position=True)) is None


def test_a_head_of_zeros_answers_the_same_whatever_it_reads(tmp_path: Path) -> None:
    model = classifier(BERT)
    model.classifier.weight.data.zero_()
    assert found(source_of(model, tmp_path), text_rows("one", "labels")) is None


def test_in_a_metric_of_what_is_read_leaving_a_block_costs_one_and_what_changes_answers_counts() -> None:
    shift = torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor, fisher = shift_metric(shift, 0.5), torch.diag(torch.tensor([9.0, 0, 0, 0, 0], dtype=torch.float64))
    mixed = read_metric(factor, shift, fisher, 0.5)
    assert float((shift @ mixed).square().sum() / 30) == pytest.approx(1)
    unread = torch.tensor([0.0, 1, -2, 1, 3], dtype=torch.float64)
    assert float((unread @ read_metric(factor, shift, fisher, 1.0)).norm()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close((unread @ mixed).square().sum(), (unread @ factor).square().sum() / 2)


def test_a_shift_that_changes_no_answer_keeps_its_metric() -> None:
    shift = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    shift[:, 0] = 0
    factor = shift_metric(shift, 0.5)
    assert read_metric(factor, shift, torch.diag(torch.tensor([1.0, 0, 0, 0, 0]))) is factor


def test_only_chosen_positions_of_rows_are_left() -> None:
    values, real = torch.arange(10.0).reshape(5, 2), torch.tensor([[True, True, True], [True, True, False]])
    chosen = torch.tensor([[False, True, False], [True, False, True]])
    left = Ragged.of(values, real).only(chosen)
    assert left.real.tolist() == [[False, True, False], [True, False, False]]
    assert left.values[:-1].tolist() == [[2, 3], [6, 7]]
