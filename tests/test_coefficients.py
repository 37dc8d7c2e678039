"""The gradient of coefficients from one backward pass, and the forms in which task vectors are held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters import KINDS, LINEAR, make_base, relative, save
from conftest import fine_tune, make_model
from learning import CPU, Family
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_fda.data.rows import TaskRows
from hf_fda.divergence.coefficients import MergedParameters
from hf_fda.divergence.directions import orthogonal_parts
from hf_fda.divergence.footprint import held_bytes
from hf_fda.divergence.learning import LearningTask
from hf_fda.divergence.objectives import Divergence, Objective
from hf_fda.divergence.task_models import logits_of, source_model, task_model
from hf_fda.divergence.task_tensors import Dense, Thin
from hf_fda.errors import InputError
from hf_fda.lowrank import LowRank
from hf_fda.merge_methods.tsv import TSVConfig
from hf_fda.streaming.taskvectors import TaskVectors
from hf_fda.streaming.tensorwise import apply_method

DOUBLE = torch.float64


def objective_at(
    parameters: MergedParameters, tasks: Sequence[LearningTask], objective: Objective, coefficients: Tensor
) -> float:
    """The objective on all rows, summed over tasks."""
    parameters.put(coefficients)
    with torch.no_grad():
        return float(sum(_loss(task, number, objective) for number, task in enumerate(tasks)))


def _loss(task: LearningTask, number: int, objective: Objective) -> Tensor:
    rows = range(len(task.rows))
    return objective(number, logits_of(task.model, task.rows.batch(rows)), rows).mean()


def gradients(family: Family, granularity: str, width: float = 1e-4, **options: Any) -> tuple[Tensor, Tensor]:
    """The gradient of all coefficients as it is learnt by, and as central finite differences, both in float64."""
    recorded = family.outputs(DOUBLE, precision="float32")
    generator = torch.Generator().manual_seed(0)
    parameters = family.parameters(granularity, 0.3, dtype=DOUBLE, **options)
    start = 0.3 + 0.2 * torch.randn(parameters.coefficients.shape, generator=generator, dtype=DOUBLE)
    tasks, objective = family.tasks(parameters), Divergence("jensen-shannon", recorded)
    parameters.put(start)
    for number, task in enumerate(tasks):
        _loss(task, number, objective).backward()
    found = parameters.take_gradient()
    assert all(tensor.grad is None for tensor in parameters.tensors.values())
    expected = torch.zeros_like(found)
    for entry in range(found.numel()):
        step = torch.zeros_like(start)
        step.view(-1)[entry] = width
        ends = [objective_at(parameters, tasks, objective, start + sign * step) for sign in (1, -1)]
        expected.view(-1)[entry] = (ends[0] - ends[1]) / (2 * width)
    return found, expected


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
@pytest.mark.parametrize("form", ["float32", "disk"])
def test_gradient_of_every_coefficient_is_that_of_finite_differences(
    classifiers: Any, granularity: str, form: str
) -> None:
    found, expected = gradients(Family(*classifiers), granularity, form=form)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_gradient_of_every_coefficient_of_orthogonalised_directions(classifiers: Any) -> None:
    found, expected = gradients(Family(*classifiers), "tensor", initial="tsv")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_gradient_through_tied_embeddings(tmp_path: Path) -> None:
    base = make_model("llama", tie_word_embeddings=True)
    sources = {"one": fine_tune(base, 1), "two": fine_tune(base, 2)}
    found, expected = gradients(Family(base, sources, "tokens"), "block", width=1e-2)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-7)  # the model's norms compute in float32


@pytest.mark.parametrize("kind", ["plain", "dora", "modules_to_save", "embedding"])
def test_gradient_of_adapters_by_their_thin_factors(tmp_path: Path, kind: str) -> None:
    base = make_base("bert")
    config = KINDS[kind]("bert")
    sources = {f"a{seed}": save(base, config, tmp_path / f"a{seed}", seed) for seed in (1, 2)}
    found, expected = gradients(Family(base, sources), "block")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_adapters_are_held_as_thin_factors_and_give_what_dense_task_vectors_give(tmp_path: Path) -> None:
    base = make_base("gpt2")
    folder = save(base, KINDS["plain"]("gpt2"), tmp_path / "adapter")
    family = Family(base, {"thin": folder}, "tokens")
    parameters = family.parameters("tensor", 0.7)
    assert parameters.groups.names
    for name in parameters.groups.names:
        assert LINEAR["gpt2"][0] in name or LINEAR["gpt2"][1] in name
        (part,) = parameters._parts[name]
        assert isinstance(part.tasks, Thin)
    for name, tensor in parameters.tensors.items():
        origin = family.inputs.base.read(name)
        task = family.inputs.weighted[0].task(name, origin)
        torch.testing.assert_close(tensor.detach(), origin + 0.7 * task)
        assert tensor.requires_grad == (name in parameters.groups.names)


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
def test_merged_tensors_follow_their_coefficients(classifiers: Any, granularity: str) -> None:
    family = Family(*classifiers)
    parameters = family.parameters(granularity)
    coefficients = torch.randn(parameters.coefficients.shape, dtype=DOUBLE)
    parameters.put(torch.zeros_like(coefficients))
    parameters.put(coefficients)
    assert set(parameters.groups.of) == set(family.names)
    for name, tensor in parameters.tensors.items():
        expected = origin = family.inputs.base.read(name).double()
        for row, source in zip(coefficients, family.inputs.weighted, strict=True):
            expected = expected + row[parameters.groups.of[name]] * (source.read(name).double() - origin)
        torch.testing.assert_close(tensor.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("role", ["linear", "conv1d", "stack", "embedding", "other"])
def test_parts_of_sources_sum_up_to_tsv(role: Any) -> None:
    tasks = list(torch.randn(3, *((2, 9, 6) if role == "stack" else (9, 6)), generator=torch.manual_seed(0)))
    weights = (0.5, 2.0, -1.2)
    expected = apply_method(TSVConfig(weights=weights), tasks[0], tasks, role)
    parts = [part.dense() if isinstance(part, LowRank) else part for part in orthogonal_parts(tasks, role)]
    found = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3-moe"])
@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_merged_tensors_of_orthogonalised_directions_are_tsv(family: str, form: Any) -> None:
    base = make_model(family)
    models = Family(base, {f"s{seed}": fine_tune(base, seed, size=0.1) for seed in (1, 2, 3)}, "tokens")
    parameters = models.parameters("task", 1.0, initial="tsv", form=form)
    weights = torch.tensor([[0.9], [-0.1], [1.3]], dtype=DOUBLE)
    parameters.put(weights)
    vectors = TaskVectors(models.inputs, CPU)
    near = {"rtol": 1e-4, "atol": 1e-5} if form == "float32" else {"rtol": 1e-2, "atol": 2e-3}
    for name in parameters.groups.of:
        expected = models.inputs.base.read(name) + vectors.merged_task(name, TSVConfig(weights=weights[:, 0].tolist()))
        torch.testing.assert_close(parameters.tensors[name].detach(), expected, **near)


def test_groups_are_blocks_in_order_with_what_lies_before_and_after() -> None:
    base = make_model("llama")
    family = Family(base, {"one": fine_tune(base, 1)}, "tokens")
    names = family.parameters("block").groups.names
    assert names == ("before", "model.layers.0", "model.layers.1", "after")
    assert len(family.parameters("task").groups) == 1
    assert family.parameters("tensor").groups.names == tuple(family.names)


def test_a_source_with_coefficient_one_is_itself(classifiers: Any) -> None:
    base, sources = classifiers
    family = Family(base, {"two": sources["two"]})
    parameters = family.parameters("task", 1.0)
    (task,) = family.tasks(parameters)
    batch = task.rows.batch([0, 1, 2])
    own = source_model(family.inputs.weighted[0], CPU)
    plain = transformers.BertForSequenceClassification.from_pretrained(sources["two"])
    torch.testing.assert_close(logits_of(own, batch), plain(**batch.inputs).logits)
    torch.testing.assert_close(logits_of(task.model, batch), logits_of(own, batch), rtol=1e-4, atol=1e-5)


def test_forms_of_task_vectors_agree(classifiers: Any) -> None:
    family = Family(*classifiers)
    objective = Divergence("jensen-shannon", family.outputs())
    found = {}
    for form in ("float32", "disk", "bfloat16"):
        parameters = family.parameters("tensor", 0.5, form=form)
        for number, task in enumerate(family.tasks(parameters)):
            _loss(task, number, objective).backward()
        found[form] = parameters.take_gradient()
    torch.testing.assert_close(found["disk"], found["float32"], rtol=1e-4, atol=1e-7)
    assert relative(found["bfloat16"], found["float32"]) < 0.02
    assert not torch.equal(found["bfloat16"], found["float32"])


def test_rounded_task_vectors_are_widened_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fda.divergence.task_tensors.PIECE", 7)
    tasks = Dense(torch.randn(3, 20).bfloat16())
    coefficients, gradient, value = torch.randn(3), torch.randn(4, 5), torch.randn(4, 5)
    expected = value + (coefficients @ tasks.stacked.float()).view(4, 5)
    tasks.add_to(value, coefficients)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(tasks.products(gradient), tasks.stacked.float() @ gradient.flatten())


@pytest.mark.parametrize("family", ["bert", "qwen2", "t5", "gpt2", "qwen3-moe"])
def test_computing_activations_again_changes_nothing(family: str) -> None:
    base = make_model(family)
    kind: Any = "labels" if family == "bert" else "tokens"
    made = Family(base, {"one": fine_tune(base, 1), "two": fine_tune(base, 2)}, kind)
    if family == "t5":
        made.rows = [with_decoder(rows) for rows in made.rows]
    objective = Divergence("jensen-shannon", made.outputs())
    found = []
    for recompute in (False, True):
        parameters = made.parameters("tensor")
        for number, task in enumerate(made.tasks(parameters, recompute=recompute)):
            _loss(task, number, objective).backward()
        found.append(parameters.take_gradient())
    assert bool(found[0].any())
    torch.testing.assert_close(found[1], found[0])


def with_decoder(rows: TaskRows) -> TaskRows:
    """The same rows for a model with a decoder, which is given the same tokens."""
    return replace(rows, inputs=[{**own, "decoder_input_ids": own["input_ids"]} for own in rows.inputs])


def test_tensors_that_the_base_lacks_are_given_by_the_sources_own_names() -> None:
    model = make_model("llama")
    family = Family(model.model, {"one": model, "two": fine_tune(model, 1)}, "tokens")
    first, second = family.inputs.weighted
    assert first.extra == ("lm_head.weight",)
    head = (model.lm_head.weight.detach() + second.checkpoint.read("lm_head.weight")) / 2
    parameters = family.parameters("task", 0.0)
    merged = task_model(second, parameters.tensors, CPU, others={"lm_head.weight": head})
    model.lm_head.weight.data = head
    batch = family.rows[0].batch([0, 1])
    torch.testing.assert_close(logits_of(merged, batch), logits_of(model, batch))


def test_a_source_without_all_its_weights_is_refused(classifiers: Any) -> None:
    base, sources = classifiers
    file = sources["two"] / "model.safetensors"
    tensors = load_file(file)
    del tensors["classifier.weight"]
    save_file(tensors, file, {"format": "pt"})
    family = Family(base, sources)
    with pytest.raises(InputError, match=r"'two'.*lacks classifier\.weight"):
        source_model(family.inputs.weighted[0], CPU)


def test_gradients_of_parameters_are_dropped_one_by_one(classifiers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family(*classifiers)
    parameters = family.parameters()
    held = []

    def counted(self: Dense, gradient: Tensor) -> Tensor:
        held.append(sum(tensor.grad is not None for tensor in parameters.tensors.values()))
        return torch.zeros(len(self.stacked))

    monkeypatch.setattr(Dense, "products", counted)
    objective = Divergence("jensen-shannon", family.outputs())
    _loss(family.tasks(parameters)[0], 0, objective).backward()
    assert len(held) > len(family.names) / 2
    assert set(held) == {0}


@pytest.mark.parametrize(
    ("form", "initial"),
    [(form, "task_arithmetic") for form in ("float32", "bfloat16", "disk")] + [("float32", "tsv"), ("bfloat16", "tsv")],
)
@pytest.mark.parametrize("kind", ["dense", "plain", "modules_to_save"])
def test_what_is_held_is_what_is_told_beforehand(tmp_path: Path, kind: str, form: Any, initial: Any) -> None:
    base = make_base("llama").bfloat16()
    base.save_pretrained(tmp_path / "base")
    if kind == "dense":
        sources: dict[str, Any] = {"one": fine_tune(base, 1), "two": fine_tune(base, 2)}
    else:
        folders = [save(make_base("llama"), KINDS[kind]("llama"), tmp_path / f"a{seed}", seed) for seed in (1, 2)]
        sources = {folder.name: folder for folder in folders}
    family = Family(tmp_path / "base", sources, "tokens")
    parameters = family.parameters(form=form, initial=initial)
    held = [*parameters.tensors.values(), *parameters._origins.values()]
    for part in (part for parts in parameters._parts.values() for part in parts):
        held += [part.tasks.stacked] if isinstance(part.tasks, Dense) else []
        held += [side for own in getattr(part.tasks, "factors", []) for side in (own.left, own.right)]
    told = held_bytes(family.inputs.base, family.inputs.weighted, family.names, form, initial=initial)
    all_held = sum(tensor.nbytes for tensor in held)
    assert all_held <= told if initial == "tsv" else all_held == told  # directions of thin adapters are fewer
