"""RegMean, RegMean++ and Fisher merging, from rows of data to the merged folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from checks import assert_good
from conftest import TEXT, fine_tune
from processes import fork
from test_divmerge import rows_for
from test_resume import contents
from torch import Tensor

import hf_fda
from hf_fda.errors import InputError
from hf_fda.merge_methods.regmean import RegMeanConfig, regmean
from hf_fda.preparing.regmean import STATISTICS
from hf_fda.store import Filled, Store

METHODS = ["regmean", "regmean_pp", "fisher"]
SETTINGS: dict[str, Any] = {"device": "cpu", "quiet": True}


def merge(base: Any, sources: Any, method: str, output: Path, **options: Any) -> hf_fda.Merged:
    named = sources if isinstance(sources, Mapping) else {f"task{n}": own for n, own in enumerate(sources)}
    data = options.pop("data", None) or rows_for(named)
    return hf_fda.merge(base, named, method, output, data=data, **{**SETTINGS, **options})


def encoder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a BERT encoder, whatever it ends in."""
    state = t.BertModel.from_pretrained(folder).state_dict()
    return {name: tensor for name, tensor in state.items() if "pooler" not in name}


def inputs_of(model: Any, rows: list[dict[str, list[int]]], path: str) -> Tensor:
    """All inputs of a layer, row by row."""
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row["input_ids"]]))
    hook.remove()
    return torch.cat(found)


def layers_of(model: Any) -> list[str]:
    return [path for path, own in model.named_modules() if isinstance(own, torch.nn.Linear) and "pooler" not in path]


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_regmean_solves_every_layer_and_averages_the_rest(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    weights = (1.0, 2.0, 0.5)
    merge(base, sources, "regmean", tmp_path / "out", weights=weights, off_diagonal=0.8)
    models = [t.BertModel.from_pretrained(folder).eval() for folder in sources.values()]
    own, theta, merged = [encoder(folder) for folder in sources.values()], encoder(base), encoder(tmp_path / "out")
    layers = {f"{path}.weight": path for path in layers_of(models[0])}
    for name, tensor in merged.items():
        tasks = [(tensors[name] - theta[name]).double() for tensors in own]
        task = sum(w * tau for w, tau in zip(weights, tasks, strict=True)) / sum(weights)
        if name in layers:
            inputs = [
                inputs_of(model, rows, layers[name]).double()
                for model, rows in zip(models, rows_for(sources).values(), strict=True)
            ]
            config = RegMeanConfig(weights=weights, off_diagonal=0.8)
            solved = regmean(tasks, [x.mT @ x / len(x) for x in inputs], config)
            assert not torch.allclose(solved, task, atol=1e-4)
            task = solved
        torch.testing.assert_close(tensor, (theta[name] + task).float(), rtol=1e-4, atol=2e-6)


def test_regmean_pp_merges_each_block_on_what_the_merged_ones_before_give(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    merge(base, sources, "regmean_pp", tmp_path / "out")
    theta, merged = encoder(base), encoder(tmp_path / "out")
    models = [t.BertModel.from_pretrained(folder).eval() for folder in sources.values()]
    own = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    for block in range(2):
        start = f"encoder.layer.{block}."
        for model in models:  # all before the block is merged, the block itself is the source's own
            before = {n: x for n, x in merged.items() if n.startswith("embeddings") or (n < start and "layer" in n)}
            model.load_state_dict({**model.state_dict(), **before})
        for path in [path for path in layers_of(models[0]) if path.startswith(start)]:
            name = f"{path}.weight"
            inputs = [
                inputs_of(m, rows, path).double() for m, rows in zip(models, rows_for(sources).values(), strict=True)
            ]
            tasks = [(tensors[name] - theta[name]).double() for tensors in own]
            solved = regmean(tasks, [x.mT @ x / len(x) for x in inputs], RegMeanConfig())
            torch.testing.assert_close(merged[name], (theta[name] + solved).float(), rtol=1e-3, atol=2e-5)


def test_on_one_block_behind_common_embeddings_both_are_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = t.BertModel(t.BertConfig(**{**TEXT, "num_hidden_layers": 1}, max_position_embeddings=40)).eval()
    base.save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        tuned = fine_tune(base, seed)
        tuned.embeddings.load_state_dict(base.embeddings.state_dict())
        model = t.BertForSequenceClassification(base.config).eval()
        model.bert.load_state_dict(tuned.state_dict(), strict=False)
        model.save_pretrained(tmp_path / f"source{seed}")
    sources = {name: tmp_path / name for name in ("source1", "source2")}
    merge(tmp_path / "base", sources, "regmean", tmp_path / "one")
    merge(tmp_path / "base", sources, "regmean_pp", tmp_path / "other")
    one, other, theta = (encoder(tmp_path / name) for name in ("one", "other", "base"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(tensor, theta[name]) for name, tensor in one.items())


@pytest.mark.parametrize("method", METHODS)
def test_equal_sources_and_one_alone_come_out_as_they_are(method: str, classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    for number, named in enumerate(({"two": sources["two"]}, {"two": sources["two"], "again": sources["two"]})):
        output = tmp_path / f"out{number}"
        merge(base, named, method, output)
        expected = encoder(sources["two"])
        for name, tensor in encoder(output).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_an_entry_follows_the_source_whose_answers_depend_on_it(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    data = rows_for(sources)
    for row in data["two"]:  # tokens that no other task's rows have
        row["input_ids"] = [1, 2, 3]
        row["attention_mask"] = [1, 1, 1]
    merge(base, sources, "fisher", tmp_path / "out", data=data, floor=0.0)
    name = "embeddings.word_embeddings.weight"
    merged, own = encoder(tmp_path / "out")[name], encoder(sources["two"])[name]
    torch.testing.assert_close(merged[1:4], own[1:4], rtol=1e-5, atol=1e-7)
    mean = sum(encoder(folder)[name] for folder in sources.values()) / 3
    torch.testing.assert_close(merged[4], mean[4], rtol=1e-5, atol=1e-7)  # in nobody's rows


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2", "gemma3", "t5", "qwen3-moe"])
def test_every_family_is_merged(method: str, family: str, saved: Any, tmp_path: Path) -> None:
    base, sources = saved(family, 2, **{"decoder_start_token_id": 0} if family == "t5" else {})
    merge(base, sources, method, tmp_path / "out")
    assert_good(family, tmp_path / "out")


# -- running -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What stands for the end of a process."""


def note_writes(monkeypatch: pytest.MonkeyPatch, until: int | None = None) -> list[str]:
    """The files that are written from now on; after so many the merge is killed."""
    real, seen = Store.settle, []

    def settle(self: Store, filled: Filled) -> Path:
        if len(seen) == until:
            raise Killed
        seen.append(filled.name)
        return real(self, filled)

    monkeypatch.setattr(Store, "settle", settle)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_killed_on_the_way_it_goes_on_and_does_nothing_twice(
    method: str, classifiers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sources = classifiers
    undisturbed = note_writes(monkeypatch)
    merge(base, sources, method, tmp_path / "whole", max_shard_bytes=20_000)
    monkeypatch.undo()
    steps = [name for name in undisturbed if name.startswith(STATISTICS)]
    assert len(steps) == {"regmean": 3, "regmean_pp": 8, "fisher": 3}[method]
    output, done = tmp_path / "out", []
    for until in (1, 1, 2, 1):
        seen = note_writes(monkeypatch, until)
        with pytest.raises(Killed):
            merge(base, sources, method, output, max_shard_bytes=20_000)
        monkeypatch.undo()
        assert len(seen) == until
        done += seen
    seen = note_writes(monkeypatch)
    merge(base, sources, method, output, max_shard_bytes=20_000)
    monkeypatch.undo()
    assert sorted(done + seen) == sorted(undisturbed)
    assert contents(output) == contents(tmp_path / "whole")
    assert not (output / STATISTICS).exists()


def test_lost_states_of_blocks_are_made_again(
    classifiers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sources = classifiers
    merge(base, sources, "regmean_pp", tmp_path / "whole")
    note_writes(monkeypatch, until=5)
    with pytest.raises(Killed):
        merge(base, sources, "regmean_pp", tmp_path / "out")
    monkeypatch.undo()
    for path in (tmp_path / "out" / STATISTICS).glob("*/step-*"):
        path.unlink()
    merge(base, sources, "regmean_pp", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _merge_all(base: Path, sources: dict[str, Path], output: Path) -> None:
    torch.set_num_threads(1)
    for method in METHODS:
        merge(base, sources, method, output / method, max_shard_bytes=20_000)


def test_two_processes_make_the_same_bytes(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    _merge_all(base, sources, tmp_path / "alone")
    fork(_merge_all, base, sources, tmp_path / "together")
    for method in METHODS:
        assert contents(tmp_path / "together" / method) == contents(tmp_path / "alone" / method)


@pytest.mark.parametrize("method", METHODS)
def test_other_rows_are_looked_at_again(method: str, classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    merge(base, sources, method, tmp_path / "out")
    first = encoder(tmp_path / "out")
    merge(base, sources, method, tmp_path / "out", data=rows_for(sources, count=3))
    merge(base, sources, method, tmp_path / "fresh", data=rows_for(sources, count=3))
    assert any(not torch.equal(tensor, first[name]) for name, tensor in encoder(tmp_path / "out").items())
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_full_rank_is_the_merged_model(method: str, library: Any, tmp_path: Path) -> None:
    base, sources = library("llama")
    merge(base, sources, method, tmp_path / "whole")
    merge(base, sources, method, tmp_path / "adapter", as_adapter=True)
    ids = torch.arange(1, 7)[None]
    with torch.no_grad():
        whole = hf_fda.load(tmp_path / "whole")(ids).logits
        adapted = hf_fda.load(tmp_path / "adapter", base=base)(ids).logits
    torch.testing.assert_close(adapted, whole, rtol=1e-3, atol=1e-4)


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_counts_what_statistics_take_on_the_disk(
    method: str, classifiers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sources = classifiers
    plain = hf_fda.plan(base, sources, "linear", tmp_path / "out", device="cpu")
    plan = hf_fda.plan(base, sources, method, tmp_path / "out", data=rows_for(sources), device="cpu", max_length=6)
    assert plan.peak_memory_bytes >= plain.peak_memory_bytes
    most, real = [0], Store.settle

    def settle(self: Store, filled: Filled) -> Path:
        path = real(self, filled)
        most.append(sum(file.stat().st_size for file in (tmp_path / "out" / STATISTICS).rglob("*.safetensors")))
        return path

    monkeypatch.setattr(Store, "settle", settle)
    merge(base, sources, method, tmp_path / "out", max_length=6)
    assert 0.5 * max(most) < plan.disk_bytes - plain.disk_bytes
    assert max(most) > 0.2 * (plan.disk_bytes - plain.disk_bytes)


def test_the_plan_says_what_is_solved_for(library: Any, tmp_path: Path) -> None:
    base, sources = library("qwen3-moe")
    named = {"one": sources[0], "two": sources[1]}
    plan = hf_fda.plan(base, named, "regmean", tmp_path / "out", data=rows_for(named), device="cpu")
    assert "9 weights of linear layers are solved for" in str(plan)
    assert "stacks of experts too" in str(plan)


def test_fda_starts_from_no_method_that_looks_at_data(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    with pytest.raises(InputError, match="initial must be"):
        hf_fda.plan(base, sources, "fda", tmp_path / "out", initial="regmean")
