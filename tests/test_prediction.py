"""What a merge will cost and how long it will take, before it begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_fda
from hf_fda import costs
from hf_fda.cli import main
from hf_fda.costs import Work
from hf_fda.errors import InputError
from hf_fda.merge_methods import FDAConfig
from hf_fda.prediction import Speed, makespan, measure_speed, readable_time

Library = Callable[[str], tuple[Path, list[Path]]]


def plan(library: Library, family: str = "bert", **options: Any) -> hf_fda.Plan:
    """A plan of a tiny merge."""
    base, sources = library(family)
    return hf_fda.plan(base, sources, output="nowhere", device="cpu", **options)


def unit_work(planned: hf_fda.Plan) -> Work:
    """The construction of a plan's first unit."""
    assert isinstance(planned.config, FDAConfig)
    return costs.construction(planned.inputs.base, planned.config, planned.units[0])


def test_construction_grows_with_steps_and_anchors(library: Library) -> None:
    one, two = unit_work(plan(library, steps=10)), unit_work(plan(library, steps=20))
    assert two.flops == 2 * one.flops
    assert two.calls == 2 * one.calls
    assert unit_work(plan(library, steps=10, num_anchors=128)).flops == 2 * one.flops


def test_a_units_products_are_counted(library: Library) -> None:
    planned = plan(library, steps=1, num_anchors=2, num_tokens=3)
    entries = 4 * 32 * 32 + 2 * 32 * 64  # query, key, value, output; up and down
    assert unit_work(planned).flops == costs.STEP_PRODUCTS * 2 * 6 * entries


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "gpt2", "t5", "mixtral"])
def test_every_piece_of_every_family_costs_something(library: Library, family: str) -> None:
    planned = plan(library, family)
    assert isinstance(planned.config, FDAConfig)
    base = planned.inputs.base
    for unit in planned.units:
        assert costs.construction(base, planned.config, unit).weight > 0
        assert costs.adaptation(base, planned.config, unit, 2).weight > 0
    assert all(costs.writing(planned.inputs, planned.result, shard).weight > 0 for shard in planned.shards)


def test_of_experts_only_those_that_are_asked_count(library: Library) -> None:
    planned = plan(library, "mixtral")
    layout = planned.inputs.base.layout
    stacks = [name for name in planned.units[0].tensors if layout.roles[name] == "stack"]
    whole = sum(torch.Size(layout.shapes[name]).numel() for name in stacks)
    assert costs.active_entries(planned.inputs.base, stacks) == whole / 2  # two of four


def test_a_method_that_decomposes_costs_more_than_a_mean(library: Library) -> None:
    weights = {
        method: costs.writing(planned.inputs, planned.result, planned.shards[0]).weight
        for method in ("linear", "isotropic", "tsv")
        for planned in [plan(library, method=method)]
    }
    assert weights["linear"] < weights["isotropic"] < weights["tsv"]


def test_seconds_follow_from_work_and_speed() -> None:
    speed = Speed(flops=100.0, moved=10.0, files=5.0, calls=2.0)
    assert speed.seconds(Work(flops=100, moved=10, files=5, calls=2)) == 4.0
    assert speed.seconds(Work(flops=100), efficiency=0.5) == 2.0


def test_processes_end_when_the_last_one_does() -> None:
    assert makespan([3.0, 1.0, 1.0, 1.0], 1) == 6.0
    assert makespan([3.0, 1.0, 1.0, 1.0], 2) == 3.0
    assert makespan([3.0, 1.0], 8) == 3.0
    assert makespan([], 2) == 0.0


def test_the_speed_is_measured_in_a_moment() -> None:
    speed = measure_speed(torch.device("cpu"), (64, 32, 32))
    assert min(speed.flops, speed.moved, speed.files, speed.calls) > 1e3


def test_the_speed_is_measured_in_little_memory() -> None:
    assert measure_speed(torch.device("cpu"), (10**6, 10**6, 10**6)).flops > 0  # the product itself has 4 TB


def test_a_plan_tells_the_time_when_asked(library: Library) -> None:
    assert plan(library).time is None
    assert "  time " not in str(plan(library))
    planned = plan(library, processes=2)
    assert planned.time is not None
    assert planned.time.seconds == pytest.approx(
        planned.time.construction + planned.time.adaptation + planned.time.writing
    )
    assert "on 2 processes" in str(planned)
    assert not Path("nowhere").exists()


def test_a_prediction_leaves_the_threads_as_they_were(library: Library) -> None:
    before = torch.get_num_threads()
    plan(library, processes=4)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("processes", [0, -1, 1.5, True, "two"])
def test_processes_must_be_a_number(library: Library, processes: Any) -> None:
    with pytest.raises(InputError, match="processes"):
        plan(library, processes=processes)


def test_the_command_tells_the_time(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    base, sources = library("bert")
    words = ["plan", "--base", str(base), "--source", str(sources[0]), "--device", "cpu", "--processes", "3"]
    assert main(words) == 0
    assert "on 3 processes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12 ms"), (42.0, "42.0 s"), (600, "10.0 min"), (7200, "2.0 h"), (86400 * 3, "3.0 d")]
)
def test_times_are_readable(seconds: float, text: str) -> None:
    assert readable_time(seconds) == text
