"""Real hidden states: recorded as the whole model has them, matched by fda and distill; coefficients from anchors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from conftest import make_model
from learning import text_rows
from processes import fork
from test_resume import contents, times
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hf_fda
from hf_fda import adapting
from hf_fda.anchors import Objective
from hf_fda.anchors.adaptation import mean_distance
from hf_fda.anchors.coefficients import Combined, UnitProblem, learn_coefficients
from hf_fda.blocks import UnitCall, find_units
from hf_fda.checkpoint.reader import open_checkpoint
from hf_fda.data.rows import TaskRows
from hf_fda.engine import run
from hf_fda.errors import InputError, RunError
from hf_fda.prediction import Speed, predict
from hf_fda.states import StatesRecorder, UnitStates, objective
from hf_fda.states.files import read_states, save_states
from hf_fda.states.objective import Examples, StatesObjective, alike, outputs
from hf_fda.states.rows_together import companions, parts_of_rows
from hf_fda.states.unit_states import Ragged, compact, held
from hf_fda.store import WORK

CPU = torch.device("cpu")

RECORDED = [
    *(("bert", "block"), ("vit", "block"), ("vit", "mlp"), ("clip-text", "mlp"), ("llama", "block"), ("llama", "mlp")),
    *(("gemma3", "block"), ("gpt2", "block"), ("t5", "block"), ("mixtral", "block")),
]


def rows_for(family: str, count: int = 6) -> TaskRows:
    """Rows of different lengths for a family."""
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        images = [{"pixel_values": torch.randn(3, 16, 16, generator=generator)} for _ in range(count)]
        return TaskRows("task", "labels", images, None, {}, "images")
    rows: list[Mapping[str, Tensor]] = []
    for number in range(count):
        ids = torch.randint(3, 90, (3 + number,), generator=generator)
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if family == "t5":
            row["decoder_input_ids"] = torch.randint(3, 90, (2 + number % 3,), generator=generator)
        rows.append(row)
    return TaskRows("task", "labels", rows, None, {}, f"{family} {count}")


def seen_by(model: Any, unit: str, row: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What a unit of a whole model takes and gives on one row, alone."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        taken = args[0] if args else kwargs["hidden_states"]
        seen.append((taken, output[0] if isinstance(output, tuple) else output))

    hook = model.get_submodule(unit).register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        model.base_model(**{name: tensor[None] for name, tensor in row.items()})
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(("family", "part"), RECORDED)
def test_recorded_states_and_targets_are_those_of_the_whole_model_row_by_row(
    family: str, part: str, tmp_path: Path
) -> None:
    model, rows = make_model(family), rows_for(family)
    checkpoint = open_checkpoint(model, label="model")
    units = find_units(checkpoint.layout, (part,))
    recorder = StatesRecorder(checkpoint, {unit.name: unit.name for unit in units}, CPU)
    files = []
    for number, part_of in enumerate(([0, 1], [2, 3, 4], [5])):  # parts of different sizes become one
        files.append(tmp_path / f"{number}.safetensors")
        save_states(files[-1], recorder.record(rows, part_of))
    for unit in units:
        states = read_states(files, unit.name)
        module = model.get_submodule(unit.name)
        with torch.no_grad():
            targets = outputs(module, states.inputs, states.call)
        assert len(states) == len(rows)
        for row, own in enumerate(rows.inputs):
            inputs, given = seen_by(model, unit.name, own)
            length, at = inputs.shape[1], torch.tensor([row])
            assert states.inputs.real[row].sum() == length
            torch.testing.assert_close(states.inputs.at(at)[:, :length], inputs, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(targets.at(at)[:, :length], given, rtol=3e-3, atol=3e-3)
            if states.call.along is not None:  # the same without what rows are filled up with
                with torch.no_grad():
                    cut = states.call.cut(length).at(at)(module, states.inputs.at(at, length))
                torch.testing.assert_close(cut, targets.at(at, length), rtol=1e-4, atol=1e-5)


def test_masks_of_encoders_are_held_once_for_all_queries() -> None:
    recorder, rows = _bert_recorder()
    (states,) = recorder.record(rows, list(range(6))).values()
    masks = [leaf for leaf in states.call.arguments[0] if isinstance(leaf, Tensor)]
    assert masks and all(held(mask).numel() == mask.numel() / mask.shape[-1] for mask in masks)


def test_rows_run_beside_the_longest_and_the_shortest() -> None:
    rows = rows_for("bert", 6)
    assert {0, 5} <= set(companions(rows, 2))
    for count in range(1, 9):
        assert count + len(companions(rows, count)) not in (1, 8)
    assert [len(part) for part in parts_of_rows(rows, 2, 2**24)] == [1] * 6
    assert parts_of_rows(rows, 1, 32) == [list(range(6))]


def test_decoder_blocks_need_rows_that_say_what_is_written() -> None:
    checkpoint = open_checkpoint(make_model("t5"), label="model")
    recorder = StatesRecorder(checkpoint, {"unit": "decoder.block.0"}, CPU)
    with pytest.raises(RunError, match="what is written"):
        recorder.record(rows_for("bert"), [0, 1])


def test_what_is_constant_is_held_once() -> None:
    tensor = torch.arange(3.0)[:, None, None].expand(3, 4, 5).clone()
    assert held(compact(tensor)).shape == (3, 1, 1)
    assert torch.equal(compact(tensor), tensor)


def test_parts_of_rows_have_similar_lengths_and_all_rows() -> None:
    lengths = torch.tensor([1, 9, 2, 8, 3, 7, 4, 6])
    parts = alike(torch.randperm(8, generator=torch.Generator().manual_seed(0)), lengths, 4)
    assert sorted(torch.cat(parts).tolist()) == list(range(8))
    assert all(int(lengths[part].max() - lengths[part].min()) <= 2 for part in parts)


# -- the objective on rows of different lengths --------------------------------------------------------------------


def _bert_recorder() -> tuple[StatesRecorder, TaskRows]:
    checkpoint = open_checkpoint(make_model("bert"), label="model")
    unit = find_units(checkpoint.layout, ("block",))[1].name
    return StatesRecorder(checkpoint, {unit: unit}, CPU), rows_for("bert")


def _examples(states: UnitStates, seed: int, factor: Tensor | None = None) -> Examples:
    """Examples whose targets are those of a unit with other weights."""
    torch.manual_seed(seed)
    count, width = states.inputs.values.shape
    targets = Ragged.of(torch.randn(count - 1, width), states.inputs.real)
    return Examples(states.inputs, targets, states.call, factor)


@pytest.mark.parametrize("kind", ["shift", "cosine", "mse", "mae"])
def test_a_row_alone_gives_the_same_loss_as_filled_up_in_a_batch(kind: Any) -> None:
    recorder, rows = _bert_recorder()
    (states,) = recorder.record(rows, list(range(6))).values()
    module = make_model("bert", seed=3).bert.encoder.layer[1]
    examples = _examples(states, 0, torch.randn(32, 32) if kind == "shift" else None)
    objective = StatesObjective(kind, [examples])
    with torch.no_grad():
        together = float(objective.evaluate(module, UnitCall(), objective.batches(torch.arange(6), 6)[0]))
        alone = [objective.batches(torch.arange(6), 1)[number] for number in range(6)]
        assert [share.positions for (share,) in alone] == sorted(range(3, 9), key=lambda length: length)
        one_by_one = sum(float(objective.evaluate(module, UnitCall(), batch)) for batch in alone)
    assert one_by_one == pytest.approx(together, rel=1e-4)
    assert mean_distance(objective, module, UnitCall(), 4) == pytest.approx(together / objective.divisor, rel=1e-4)


@pytest.mark.parametrize("kind", ["shift", "cosine", "mse", "mae"])
def test_on_anchors_it_is_the_distance_of_the_anchors_objective(kind: Any) -> None:
    torch.manual_seed(0)
    module, call = nn.Linear(6, 6), UnitCall()
    anchors, targets = [torch.randn(5, 3, 6), torch.randn(4, 3, 6)], [torch.randn(5, 3, 6), torch.randn(4, 3, 6)]
    factors = [torch.randn(6, 6) for _ in anchors]
    plain = Objective(kind, anchors, targets, anchors)
    plain.factors = torch.stack(factors)
    examples = [
        Examples(Ragged.whole(x), Ragged.whole(y), call, factor)
        for x, y, factor in zip(anchors, targets, factors, strict=True)
    ]
    mine = mean_distance(StatesObjective(kind, examples), module, call, 4)
    assert mine == pytest.approx(mean_distance(plain, module, call, 4), rel=1e-5)


def test_states_that_are_not_finite_are_refused() -> None:
    bad = Ragged.whole(torch.full((2, 3, 4), torch.nan))
    with pytest.raises(RunError, match="not finite"):
        StatesObjective("mse", [Examples(bad, bad, UnitCall())])


# -- merges --------------------------------------------------------------------------------------------------------


def loader(task: int, count: int = 8) -> DataLoader[Any]:
    """Encoded rows, as a user gives them."""
    rows = text_rows(str(task), "labels", count, seed=task)
    return DataLoader([dict(row) for row in rows.inputs], batch_size=1)  # type: ignore[arg-type]


Classifiers = tuple[Path, dict[str, Path]]

FDA: dict[str, Any] = {"num_anchors": 8, "steps": 5, "epochs": 3, "batch_size": 8}
SETTINGS: dict[str, dict[str, Any]] = {
    "fda": FDA,
    "fda propagated": {**FDA, "with_data": "propagated"},
    "distill": {"epochs": 3, "batch_size": 8},
}
METHODS = list(SETTINGS)


def merge(pair: Classifiers, output: Path, method: str, **changes: Any) -> Any:
    """A merge with data for every source."""
    base, sources = pair
    data = {task: loader(number) for number, task in enumerate(sources)}
    settings = {"device": "cpu", "quiet": True, "data": data, **SETTINGS[method], **changes}
    return hf_fda.merge(base, sources, method=method.split()[0], output=output, **settings)


def body(merged: Any) -> dict[str, Tensor]:
    """The merged encoder's tensors."""
    return dict(merged.load().state_dict())


def encoder(path: Path) -> dict[str, Tensor]:
    """A classifier's encoder."""
    return dict(t.BertForSequenceClassification.from_pretrained(path).bert.state_dict())


def close(one: Mapping[str, Tensor], two: Mapping[str, Tensor], atol: float) -> bool:
    """Whether blocks are the same."""
    return all(torch.allclose(one[name], two[name], rtol=0, atol=atol) for name in one if name.startswith("encoder."))


@pytest.mark.parametrize("method", METHODS)
def test_one_source_at_full_scaling_stays_exact(method: str, classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers
    start = {"initial": "task_arithmetic", "scaling": 1.0, "rest": {"method": "task_arithmetic", "scaling": 1.0}}
    merged = merge((base, {"two": sources["two"]}), tmp_path / "out", method, **start)
    atol = 0.0 if method == "distill" else 1e-7  # fda computes its start in single precision
    assert close(body(merged), encoder(sources["two"]), atol)


@pytest.mark.parametrize("method", METHODS)
def test_identical_sources_give_themselves(method: str, classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers
    start = {"initial": "task_arithmetic", "scaling": 0.5, "rest": {"method": "task_arithmetic", "scaling": 0.5}}
    merged = merge((base, {"a": sources["two"], "b": sources["two"]}), tmp_path / "out", method, **start)
    assert close(body(merged), encoder(sources["two"]), 1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_learning_brings_the_merged_model_nearer_to_its_sources(
    method: str, classifiers: Classifiers, tmp_path: Path
) -> None:
    base, given = classifiers
    sources = {}
    for task in ("two", "three"):  # whose blocks alone were trained
        model = t.BertForSequenceClassification.from_pretrained(given[task])
        model.bert.embeddings.load_state_dict(t.BertModel.from_pretrained(base).embeddings.state_dict())
        model.save_pretrained(tmp_path / task)
        sources[task] = tmp_path / task

    def apart(epochs: int) -> float:
        start = {"initial": "task_arithmetic", "scaling": 0.3, "rest": "base"}
        distance = "distance" if method == "distill" else "adaptation_distance"
        options = {**start, distance: "mse", "epochs": epochs, "batch_size": 4}
        merged = merge((base, sources), tmp_path / f"{epochs}", method, **options)
        total = 0.0
        for number, (task, folder) in enumerate(sources.items()):
            mine, own = merged.load(task=task), t.BertForSequenceClassification.from_pretrained(folder).eval()
            for batch in loader(number):
                with torch.no_grad():
                    one, two = (
                        model.bert(**batch).last_hidden_state[:, 0] for model in (mine, own)
                    )  # heads read these
                total += float((one - two).square().sum())
        return total

    assert apart(40) < 0.8 * apart(0)


@pytest.mark.parametrize("method", ["fda", "fda propagated"])
def test_the_last_of_blocks_that_follow_each_other_is_matched_on_what_heads_read(
    method: str, classifiers: Classifiers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Examples] = []

    def noted(*given: Any) -> Examples | None:
        found = objective.shown(*given)
        assert found is not None
        seen.append(found)
        return found

    monkeypatch.setattr(adapting, "shown", noted)
    merge(classifiers, tmp_path / "out", method)
    *before, one, two, three = seen  # the last block's, of three sources
    assert all(torch.equal(own.targets.real, own.inputs.real) for own in before)
    for own in (one, two, three):
        if method == "fda":
            assert torch.equal(own.targets.real, own.inputs.real)
        else:
            assert own.targets.real[:, 0].all() and not own.targets.real[:, 1:].any()


def test_without_mixing_no_anchors_are_constructed(classifiers: Classifiers, tmp_path: Path) -> None:
    merge(classifiers, tmp_path / "states", "fda")
    assert not (tmp_path / "states" / "anchors").exists()
    merge(classifiers, tmp_path / "mixed", "fda", with_data="mixed")
    assert len(list((tmp_path / "mixed" / "anchors").glob("*/blocks/*"))) == 6


def test_mixed_uses_anchors_and_states(classifiers: Classifiers, tmp_path: Path) -> None:
    mixed = body(merge(classifiers, tmp_path / "mixed", "fda", with_data="mixed"))
    states = body(merge(classifiers, tmp_path / "states", "fda"))
    anchors = body(merge(classifiers, tmp_path / "anchors", "fda", data=None))
    assert not close(mixed, states, 1e-5) and not close(mixed, anchors, 1e-5) and not close(states, anchors, 1e-5)


def test_propagated_uses_anchors_and_what_the_merged_blocks_make(classifiers: Classifiers, tmp_path: Path) -> None:
    options = {"epochs": 3, "batch_size": 8, "interpolation": 1.0}
    found = body(merge(classifiers, tmp_path / "propagated", "fda propagated", **options))
    assert len(list((tmp_path / "propagated" / "anchors").glob("*/blocks/*"))) == 6
    mixed = body(merge(classifiers, tmp_path / "mixed", "fda", with_data="mixed", **options))
    distilled = body(merge(classifiers, tmp_path / "distilled", "distill"))
    assert not close(found, mixed, 1e-5) and not close(found, distilled, 1e-5)


@pytest.mark.parametrize("with_data", ["mixed", "propagated"])
def test_without_data_nothing_of_rows_matters(with_data: str, classifiers: Classifiers, tmp_path: Path) -> None:
    plain = body(merge(classifiers, tmp_path / "plain", "fda", data=None))
    other = body(merge(classifiers, tmp_path / "other", "fda", data=None, with_data=with_data, rows=3))
    assert close(plain, other, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_killed_it_goes_on_and_ends_in_the_same_bytes(
    method: str, classifiers: Classifiers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(classifiers, tmp_path / "whole", method)
    step, seen = hf_fda.store.Store.settle, []  # type: ignore[attr-defined]

    def stop(self: Any, filled: Any) -> Path:
        seen.append(filled.name)
        if filled.name.endswith("layer.1.safetensors") and not filled.name.startswith("anchors/"):
            raise RunError("stopped")
        return step(self, filled)

    monkeypatch.setattr(hf_fda.store.Store, "settle", stop)  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="stopped"):
        merge(classifiers, tmp_path / "again", method)
    before = times(tmp_path / "again", f"{WORK}/states/*/*") | times(tmp_path / "again", f"{WORK}/blocks/*layer.0*")
    assert len(before) == 4
    monkeypatch.setattr(hf_fda.store.Store, "settle", step)  # type: ignore[attr-defined]
    after: dict[str, int] = {}
    clean = hf_fda.publish.clean  # type: ignore[attr-defined]

    def look(store: Any) -> None:
        after.update(times(store.folder, f"{WORK}/states/*/*") | times(store.folder, f"{WORK}/blocks/*layer.0*"))
        clean(store)

    monkeypatch.setattr("hf_fda.publish.clean", look)
    merge(classifiers, tmp_path / "again", method)
    assert after == before
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert not (tmp_path / "again" / WORK / "states").exists()


def _merged_in_part(pair: Classifiers, output: Path, method: str) -> None:
    torch.set_num_threads(1)
    merge(pair, output, method)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_make_the_bytes_of_one(method: str, classifiers: Classifiers, tmp_path: Path) -> None:
    merge(classifiers, tmp_path / "one", method)
    fork(_merged_in_part, classifiers, tmp_path / "both", method, processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "both")


@pytest.mark.parametrize("method", METHODS)
def test_other_rows_are_another_merge(method: str, classifiers: Classifiers, tmp_path: Path) -> None:
    first = body(merge(classifiers, tmp_path / "out", method))
    data = {task: loader(number + 7) for number, task in enumerate(classifiers[1])}
    second = body(merge(classifiers, tmp_path / "out", method, data=data))
    assert close(second, body(merge(classifiers, tmp_path / "new", method, data=data)), 0.0)
    assert not close(first, second, 1e-6)


@pytest.mark.parametrize("family", ["llama", "t5", "vit"])
def test_distil_merges_every_family(family: str, saved: Callable[..., Any], tmp_path: Path) -> None:
    base, sources = saved(family, **({"decoder_start_token_id": 0} if family == "t5" else {}))
    plan = hf_fda.plan(base, sources, "task_arithmetic", output=tmp_path / "plain", scaling=0.4, device="cpu")
    plain = hf_fda.Merged(run(plan, quiet=True)).load().state_dict()
    data = {
        source.name: DataLoader([dict(row) for row in rows_for(family).inputs], batch_size=1)
        for source in plan.inputs.sources
    }  # type: ignore[arg-type]
    options: dict[str, Any] = {"initial": "task_arithmetic", "unit": "mlp" if family == "llama" else "block"}
    merged = hf_fda.merge(
        *(base, sources, "distill"), output=tmp_path / "out", data=data, epochs=2, **options, device="cpu", quiet=True
    )
    tensors = merged.load().state_dict()
    moved = {name for name in tensors if not torch.equal(tensors[name], plain[name])}
    inside = "mlp" if family == "llama" else "layer" if family == "vit" else "block"
    assert moved and all(f".{inside}" in name or "layers" in name for name in moved)


def test_distil_writes_an_adapter(classifiers: Classifiers, tmp_path: Path) -> None:
    whole = body(merge(classifiers, tmp_path / "whole", "distill", rest="base"))
    adapter = merge(classifiers, tmp_path / "adapter", "distill", rest="base", as_adapter=True)
    merged = adapter.load(task="two").merge_and_unload().bert.state_dict()
    assert close(whole, merged, 1e-5)


def test_distil_refuses_what_it_cannot_do(classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers
    with pytest.raises(InputError, match="looks at unlabelled rows"):
        hf_fda.plan(base, sources, "distill", output=tmp_path / "out")
    with pytest.raises(InputError, match="initial must be 'base' or a parameter-space method"):
        hf_fda.plan(base, sources, "fda", output=tmp_path / "out", initial="distill")


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_says_what_states_need(method: str, classifiers: Classifiers, tmp_path: Path) -> None:
    base, sources = classifiers

    def planned(count: int) -> Any:
        data = {task: loader(number, count) for number, task in enumerate(sources)}
        options = {**SETTINGS[method], "rows": count}
        return hf_fda.plan(base, sources, method.split()[0], tmp_path / "out", data=data, device="cpu", **options)

    few, many = planned(8), planned(4000)
    assert many.disk_bytes > few.disk_bytes and many.peak_memory_bytes > few.peak_memory_bytes
    anchored = method == "fda propagated"
    assert ("anchors/" in str(few)) == anchored
    seconds = [predict(plan, 1) for plan in (few, many)]
    assert (seconds[0].construction > 0) == anchored and seconds[0].adaptation < seconds[1].adaptation


def test_units_that_follow_each_other_gain_from_processes_as_sources_are_shared_out(
    classifiers: Classifiers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_fda.prediction.measure_speed", lambda *_: Speed(1e9, 1e9, 1e9, 1e6))
    base, sources = classifiers
    data = {task: loader(number) for number, task in enumerate(sources)}

    def ratio(with_data: str, processes: int = 2) -> float:
        options = {**FDA, "with_data": with_data}
        plan = hf_fda.plan(base, sources, "fda", tmp_path / "out", data=data, device="cpu", **options)
        return predict(plan, 1).adaptation / predict(plan, processes).adaptation

    assert ratio("mixed") == pytest.approx(2)
    assert ratio("propagated") == pytest.approx(1.5, rel=0.01)  # two of three sources, beside few anchors
    assert ratio("propagated", 4) == ratio("propagated", 64) == pytest.approx(3, rel=0.01)


# -- coefficients --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block small enough for finite differences."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, T, 5)."""
        return x + self.second(torch.tanh(self.first(x)))


def block_problem(seed: int = 0, sources: int = 2, kind: Any = "mse", size: float = 0.3) -> UnitProblem:
    """A block, task vectors of some sources, and what these do on inputs of their own."""
    torch.manual_seed(seed)
    base = Block().double()
    tasks = {
        name: [size * torch.randn_like(parameter) for _ in range(sources)]
        for name, parameter in base.named_parameters()
    }
    anchors = [torch.randn(6, 3, 5, dtype=torch.float64) for _ in range(sources)]
    targets, shifts = [], []
    for number, x in enumerate(anchors):
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                parameter += tasks[name][number]
            targets.append(tuned(x))
            shifts.append(targets[-1] - base(x))
    return UnitProblem(base, tasks, Objective(kind, anchors, targets, shifts))


NAMES = ("first.weight", "first.bias", "second.weight", "second.bias")


@pytest.mark.parametrize("kind", ["mse", "shift", "cosine"])
def test_slopes_of_coefficients_are_finite_differences(kind: Any) -> None:
    groups = {name: number // 2 for number, name in enumerate(NAMES)}
    combined = Combined(block_problem(kind=kind), groups, 5)
    at = torch.tensor([[0.3, 0.5], [0.2, -0.1]], dtype=torch.float64)
    _, slopes = combined(at)
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        step = torch.zeros_like(at)
        step[place] = 1e-6
        difference = (combined(at + step)[0] - combined(at - step)[0]) / 2e-6
        assert float(slopes[place]) == pytest.approx(difference, rel=1e-5, abs=1e-8)


GROUPINGS: dict[str, Callable[[str, str], str]] = {
    "task": lambda unit, name: "all",
    "block": lambda unit, name: unit,
    "tensor": lambda unit, name: f"{unit}.{name}",
}


def learnt(problems: Mapping[str, UnitProblem], granularity: str, start: float = 0.3) -> Tensor:
    """Coefficients of two blocks at a granularity."""
    label = GROUPINGS[granularity]
    labels = {f"{unit}.{name}": label(unit, name) for unit in problems for name in NAMES}
    numbers = {text: number for number, text in enumerate(dict.fromkeys(labels.values()))}
    groups = {name: numbers[text] for name, text in labels.items()}
    sources = len(problems["one"].tasks[NAMES[0]])
    units = {unit: lambda own=problem: own for unit, problem in problems.items()}
    begin = torch.full((sources, len(numbers)), start, dtype=torch.float64)
    return learn_coefficients(units, groups, begin)


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
@pytest.mark.parametrize("kind", ["mse", "shift"])
def test_with_one_source_every_coefficient_is_one(granularity: str, kind: Any) -> None:
    problems = {"one": block_problem(0, 1, kind), "two": block_problem(1, 1, kind)}
    found = learnt(problems, granularity)
    assert found.shape == (1, {"task": 1, "block": 2, "tensor": 8}[granularity])
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-3)


def test_finer_coefficients_come_nearer() -> None:
    def left(granularity: str) -> float:
        problems = {"one": block_problem(0), "two": block_problem(1)}
        found = learnt(problems, granularity)
        total = 0.0
        for number, problem in enumerate(problems.values()):
            count = {"task": 1, "block": 2, "tensor": 8}[granularity]
            groups = {
                name: 0 if count == 1 else number if count == 2 else 4 * number + place
                for place, name in enumerate(NAMES)
            }
            with torch.no_grad():
                for name, parameter in problem.module.named_parameters():
                    parameter.copy_(block_problem(number).module.state_dict()[name])
            total += Combined(problem, groups, 100)(found)[0]
        return total

    assert left("tensor") < left("block") < left("task")


def test_a_source_that_moves_nothing_keeps_its_coefficient() -> None:
    problem = block_problem()
    still = {name: [tasks[0], torch.zeros_like(tasks[1])] for name, tasks in problem.tasks.items()}
    found = learn_coefficients(
        {"one": lambda: UnitProblem(problem.module, still, problem.aim)},
        {f"one.{name}": 0 for name in NAMES},
        torch.full((2, 1), 0.4, dtype=torch.float64),
    )
    assert float(found[1, 0]) == 0.4 and float(found[0, 0]) != 0.4
