"""Closed-form merges from statistics of rows: RegMean, RegMean++ and Fisher merging."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from conftest import TEXT, fine_tune, make_model
from torch import Tensor

from hf_fda.checkpoint.alignment import AlignedSource, align
from hf_fda.checkpoint.reader import open_checkpoint
from hf_fda.data.rows import Kind, TaskRows
from hf_fda.errors import InputError
from hf_fda.merge_methods.fisher import FisherConfig, fisher
from hf_fda.merge_methods.regmean import RegMeanConfig, regmean
from hf_fda.statistics import layers, passes
from hf_fda.statistics.fishers import SQUARES, diagonal_fisher
from hf_fda.statistics.grams import GramFiles
from hf_fda.statistics.likelihood import directions

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def text_rows(task: str = "two", count: int = 6, kind: Kind = "labels", longest: int = 9, **more: Any) -> TaskRows:
    """Rows of random tokens, of different lengths."""
    generator = torch.Generator().manual_seed(len(task))
    inputs = []
    for row in range(count):
        length = 3 + row % (longest - 2)
        ids = torch.randint(1, 99, (length,), generator=generator)
        inputs.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    scored = [torch.arange(len(row["input_ids"])) > 0 for row in inputs] if kind == "tokens" else None
    return TaskRows(task, kind, inputs, scored, {}, f"{task} {count}", **more)


def aligned(base: Path, source: Path, name: str = "two") -> AlignedSource:
    """A source in a folder, matched to its base."""
    return align(open_checkpoint(base), open_checkpoint(source), name)


def grams_of(
    source: AlignedSource, base: Path, rows: TaskRows, folder: Path, group: layers.Group | None = None
) -> dict[str, Tensor]:
    """Gram matrices of all layers of a source, by the base's names."""
    there = open_checkpoint(base)
    names = layers.layer_weights(there, there.names)
    groups = [group] if group else layers.group_layers(there, names)
    paths = []
    for number, own in enumerate(groups):
        from safetensors.torch import save_file

        paths.append(folder / f"{source.name}-{number}.safetensors")
        save_file(passes.input_grams(source, own, rows, CPU), paths[-1])
    files = GramFiles(paths)
    return {name: files.read(name, normalize=False) for name in names if name in files}


# -- RegMean's closed form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.0)])
def test_regmean_minimises_the_squared_differences_of_outputs(weights: tuple[float, ...] | None) -> None:
    inputs = [randn(20 + 5 * number, 7, seed=number) for number in range(3)]
    tasks = [randn(4, 7, seed=10 + number) for number in range(3)]
    config = RegMeanConfig(off_diagonal=1.0, weights=weights)
    merged = regmean(tasks, [x.mT @ x for x in inputs], config)
    factors = [weight**0.5 for weight in config.weight_of_each(3)]
    left = torch.cat([factor * x for factor, x in zip(factors, inputs, strict=True)])
    right = torch.cat([factor * x @ tau.mT for factor, x, tau in zip(factors, inputs, tasks, strict=True)])
    torch.testing.assert_close(merged, torch.linalg.lstsq(left, right).solution.mT)


def test_regmean_shrinks_what_lies_beside_the_diagonal() -> None:
    grams = [x.mT @ x for x in (randn(9, 5, seed=1), randn(9, 5, seed=2))]
    tasks = [randn(3, 5, seed=3), randn(3, 5, seed=4)]
    shrunk = [0.4 * gram + 0.6 * torch.diag(gram.diagonal()) for gram in grams]
    expected = sum(task @ gram for task, gram in zip(tasks, shrunk, strict=True)) @ torch.linalg.inv(sum(shrunk))
    torch.testing.assert_close(regmean(tasks, grams, RegMeanConfig(off_diagonal=0.4)), expected)


@pytest.mark.parametrize("off_diagonal", [0.9, 1.0])
def test_regmean_takes_the_mean_where_no_input_goes(off_diagonal: float) -> None:
    inputs = [randn(9, 6, seed=number) for number in range(2)]
    for x in inputs:
        x[:, 2] = 0
    tasks = [randn(3, 6, seed=5), randn(3, 6, seed=6)]
    merged = regmean(tasks, [x.mT @ x for x in inputs], RegMeanConfig(off_diagonal=off_diagonal))
    torch.testing.assert_close(merged[:, 2], (tasks[0] + tasks[1])[:, 2] / 2)


def test_regmean_of_few_inputs_keeps_the_mean_in_the_directions_they_leave() -> None:
    inputs = [randn(2, 8, seed=1), randn(3, 8, seed=2)]
    tasks = [randn(3, 8, seed=3), randn(3, 8, seed=4)]
    merged = regmean(tasks, [x.mT @ x for x in inputs], RegMeanConfig(off_diagonal=1.0))
    beside = torch.linalg.svd(torch.cat(inputs))[2][5:]  # directions in which no input lies
    torch.testing.assert_close(merged @ beside.mT, (tasks[0] + tasks[1]) @ beside.mT / 2)
    for x, task in zip(inputs, tasks, strict=True):  # there is a weight that does everything right
        torch.testing.assert_close(merged @ x.mT, task @ x.mT)


def test_equal_sources_and_one_alone_come_out_as_they_are() -> None:
    task, x, y = randn(3, 5, seed=1), randn(9, 5, seed=2), randn(9, 5, seed=3)
    assert torch.equal(regmean([task], [x.mT @ x], RegMeanConfig()), task)
    assert torch.equal(fisher([task], [randn(3, 5).square()], FisherConfig()), task)
    assert torch.equal(regmean([task, task], [x.mT @ x, y.mT @ y], RegMeanConfig()), task)
    assert torch.equal(fisher([task, task], [randn(3, 5).square(), randn(3, 5, seed=1).square()], FisherConfig()), task)


def test_weights_below_zero_are_refused() -> None:
    for config in (RegMeanConfig, FisherConfig):
        with pytest.raises(InputError, match="below zero"):
            config(weights=(1.0, -0.5))
        with pytest.raises(InputError, match="sum to zero"):
            config(weights=(0.0, 0.0))


# -- Fisher's closed form ----------------------------------------------------------------------------------------------


def test_fisher_is_the_weighted_mean_and_the_mean_where_nothing_counts() -> None:
    tasks, fishers = [randn(6, seed=1), randn(6, seed=2)], [randn(6, seed=3).square(), randn(6, seed=4).square()]
    for own in fishers:
        own[4:] = 0
    merged = fisher(tasks, fishers, FisherConfig(weights=(1.0, 3.0), floor=0.0))
    expected = (fishers[0] * tasks[0] + 3 * fishers[1] * tasks[1])[:4] / (fishers[0] + 3 * fishers[1])[:4]
    torch.testing.assert_close(merged[:4], expected)
    torch.testing.assert_close(merged[4:], (0.25 * tasks[0] + 0.75 * tasks[1])[4:])
    torch.testing.assert_close(
        fisher(tasks, fishers, FisherConfig(weights=(1.0, 3.0), floor=1e9)), 0.25 * tasks[0] + 0.75 * tasks[1]
    )


def _outer(found: Sequence[Tensor]) -> Tensor:
    return sum((torch.outer(own.flatten(), own.flatten()) for own in found), torch.zeros(()))


def test_directions_add_up_to_the_information_of_the_logits() -> None:
    z, generator = randn(4, seed=3), torch.Generator()
    p, q = z.softmax(-1), z.sigmoid()
    scores = torch.eye(4, dtype=z.dtype) - p
    exact = {
        "labels": sum(p[y] * torch.outer(scores[y], scores[y]) for y in range(4)),
        "flags": torch.diag(q * (1 - q)),
        "values": torch.eye(4, dtype=z.dtype),
    }
    for kind, expected in exact.items():
        found = directions(z, None, kind, None, generator)  # type: ignore[arg-type]
        torch.testing.assert_close(_outer(found), expected)
        drawn = directions(z, None, kind, 20_000, generator)  # type: ignore[arg-type]
        torch.testing.assert_close(_outer(drawn), expected, atol=0.03, rtol=0)
    assert len(directions(z[:2], None, "labels", None, generator)) == 1  # one backward pass for two labels


def test_positions_that_do_not_count_have_no_information() -> None:
    z, scored = randn(3, 5), torch.tensor([False, True, True])
    (found,) = directions(z, scored, "tokens", None, torch.Generator())
    assert not found[0].any() and found[1].any() and found[2].any()
    torch.testing.assert_close(found.sum(-1), torch.zeros(3, dtype=z.dtype))


# -- statistics of a model ---------------------------------------------------------------------------------------------


def plain_grams(model: Any, rows: TaskRows) -> dict[str, Tensor]:
    """Gram matrices by module from single rows, which need no padding, of a plain model."""
    found: dict[str, Tensor] = {}

    def see(path: str) -> Any:
        def hook(_module: Any, args: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            found[path] = found.get(path, 0) + x.mT @ x

        return hook

    for path, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, t.pytorch_utils.Conv1D)):
            module.register_forward_pre_hook(see(path))
    with torch.no_grad():
        for row in range(len(rows)):
            model(**rows.batch([row]).inputs)
    return found


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3", "vit", "t5", "qwen2-moe"])
def test_streamed_grams_of_padded_batches_are_those_of_single_rows_in_the_plain_model(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(passes, "TOKENS", 27)  # three rows a batch
    monkeypatch.setattr(layers, "GROUP_BYTES", 2**13)
    base, (folder, _) = library(family)
    rows = family_rows(family)
    source = aligned(base, folder, "one")
    found = grams_of(source, base, rows, tmp_path)
    model = type(make_model(family)).from_pretrained(folder).eval()
    expected = plain_grams(model, rows)
    names = {name: source.tensor_of[name].rpartition(".")[0] for name in found}
    assert set(names.values()) == {path for path in expected if f"{path}.weight" in source.tensor_of.values()}
    for name, path in names.items():
        torch.testing.assert_close(found[name], expected[path], rtol=1e-4, atol=1e-3)


def family_rows(family: str, count: int = 6) -> TaskRows:
    """Rows that a family's model takes."""
    if family == "vit":
        pixels = [{"pixel_values": randn(3, 16, 16, seed=row).float()} for row in range(count)]
        return TaskRows("one", "labels", pixels, None, {}, "images")
    rows = text_rows("one", count)
    if family == "t5":
        inputs = []
        for number, row in enumerate(rows.inputs):
            ids = torch.arange(1, 3 + number % 3)
            inputs.append({**row, "decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)})
        return TaskRows(
            "one", "tokens", inputs, [torch.ones(len(row["decoder_input_ids"])).bool() for row in inputs], {}, ""
        )
    return rows


def test_layers_with_the_very_same_input_share_one_matrix(library: Any) -> None:
    base, (folder, _) = library("bert")
    there = open_checkpoint(base)
    (group, *_) = layers.group_layers(there, layers.layer_weights(there, there.names))
    tensors = passes.input_grams(aligned(base, folder, "one"), group, text_rows(), CPU)
    matrices = {name for name, tensor in tensors.items() if tensor.ndim == 2}
    assert len([name for name in matrices if "layer.0." in name]) == 4  # attention, its output, both of the MLP
    assert "bert.encoder.layer.0.attention.self.key.weight.as" in tensors


def test_groups_keep_to_their_bytes_and_hold_every_layer_once(library: Any) -> None:
    there = open_checkpoint(library("llama")[0])
    names = layers.layer_weights(there, there.names)
    one, *_ = alone = layers.group_layers(there, names, budget=1)
    assert [group.blocks for group in alone] == [("model.layers.0",), ("model.layers.1",), ()]
    together = layers.group_layers(there, names, budget=2 * layers.gram_bytes(there, one.weights))
    assert [group.blocks for group in together] == [("model.layers.0", "model.layers.1"), ()]
    for groups in (alone, together):
        assert sorted(name for group in groups for name in group.weights) == sorted(names)


def test_a_pass_ends_with_the_last_block_of_its_group(library: Any) -> None:
    base, (_folder, _) = library("bert")
    there = open_checkpoint(base)
    model = there.layout.model
    seen: list[str] = []
    stop = passes.StopAfter(model, ["bert.encoder.layer.0"])
    blocks = [model.get_submodule(f"bert.encoder.layer.{number}") for number in range(2)]

    def run() -> None:
        seen.clear()
        try:
            for number, block in enumerate(blocks):
                for hook in block._forward_hooks.values():
                    hook(block, (), None)
                seen.append(str(number))
        except passes.Stop:
            seen.append("stopped")
        stop.end_batch()

    run()
    assert seen == ["0", "1"]
    run()
    assert seen == ["stopped"]
    for block in blocks:
        block._forward_hooks.clear()


# -- Fisher information of a model -------------------------------------------------------------------------------------


def classifier(folder: Path, labels: int = 3, **more: Any) -> Any:
    """A small classifier."""
    torch.manual_seed(1)
    config = t.BertConfig(**TEXT, max_position_embeddings=40, num_labels=labels, **more)
    model = t.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


def test_the_fisher_information_is_that_of_a_plain_loop_over_rows_and_labels(tmp_path: Path) -> None:
    model = classifier(tmp_path / "source")
    fine_tune(model, 1).save_pretrained(tmp_path / "base")
    source, rows = aligned(tmp_path / "base", tmp_path / "source"), text_rows(count=4)
    names = list(source.tensor_of)
    found = diagonal_fisher(source, names, rows, CPU, None, torch.Generator())
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for row in range(len(rows)):
        for label in range(3):
            model.zero_grad()
            answers = model(**rows.batch([row]).inputs).logits[0].log_softmax(-1)
            answers[label].backward()
            for name, parameter in model.named_parameters():
                expected[name] += answers[label].exp().detach() * parameter.grad.square() / len(rows)
    squares = found.pop(SQUARES)
    assert found.keys() == set(names)
    for name, own in found.items():
        torch.testing.assert_close(own, expected[source.tensor_of[name]], rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(float(squares), float(sum(own.double().square().sum() for own in found.values())))


@pytest.mark.parametrize("family", ["qwen2", "t5"])
def test_the_fisher_information_of_positions_is_that_of_what_was_drawn(library: Any, family: str) -> None:
    base, (folder, _) = library(family)
    source, rows = aligned(base, folder, "one"), family_rows(family, 2)
    rows = text_rows("one", 2, "tokens") if family == "qwen2" else rows
    found = diagonal_fisher(source, source.tensor_of, rows, CPU, 2, torch.Generator().manual_seed(3))
    model = type(make_model(family)).from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(3)
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for row in range(2):
        batch = rows.batch([row])
        logits = model(**batch.inputs).logits[0]
        for direction in directions(logits, batch.scored[0], "tokens", 2, generator):  # type: ignore[index]
            model.zero_grad()
            logits.backward(direction, retain_graph=True)
            for name, parameter in model.named_parameters():
                expected[name] += parameter.grad.square() / 2
    found.pop(SQUARES)
    for name, own in found.items():
        torch.testing.assert_close(own, expected[source.tensor_of[name]], rtol=1e-3, atol=1e-9)
