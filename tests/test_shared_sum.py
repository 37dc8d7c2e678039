"""Work of one block that several processes share, and what they add up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import fork, rank
from test_processes import log_writes, logged
from test_propagated import family_of
from test_resume import contents
from torch import Tensor

import hf_fda
from hf_fda import mailbox, processes
from hf_fda.errors import PeerError, RunError
from hf_fda.processes import Team
from hf_fda.shared_sum import LEAVES, SharedSum, largest_share, leaves_of, sharers
from hf_fda.states.objective import StatesObjective
from hf_fda.unit_files import BLOCKS

CPU = torch.device("cpu")
COSTS = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
Family = tuple[Path, dict[str, Path], dict[str, Any]]


def random_terms(seed: int) -> list[Tensor]:
    """What a leaf adds: tensors of several shapes, whose sum depends on the order."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 10.0**seed for shape in ((5, 3), (7,), ())]


LIKE = [torch.zeros(5, 3), torch.zeros(7), torch.zeros(())]


# -- who does what -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8, 31])
def test_both_halves_of_every_node_cost_about_the_same(count: int) -> None:
    costs = [float(1 + number % 5) for number in range(count)]
    leaves = leaves_of(costs)
    assert set(leaves) <= set(range(LEAVES))
    for first in range(0, LEAVES, 2):
        halves = [
            sum(cost for cost, leaf in zip(costs, leaves, strict=True) if leaf == first + side) for side in (0, 1)
        ]
        assert abs(halves[0] - halves[1]) <= max(costs)


def test_as_many_share_as_there_are_items_for_and_on_a_gpu_one() -> None:
    assert [sharers(count, 2, CPU) for count in (1, 2, 3, 9)] == [1, 2, 2, 2]
    assert sharers(4, 1, CPU) == 1
    assert sharers(8, 8, torch.device("cuda")) == 1
    assert largest_share([1.0] * 4, 2, CPU) == 0.5
    assert largest_share([1.0] * 4, 4, torch.device("cuda")) == 1.0
    assert largest_share([], 4, CPU) == 1.0


def test_alone_nothing_is_added_and_everything_is_mine() -> None:
    adding = SharedSum.alone(3)
    assert [adding.mine(item) for item in range(3)] == [True] * 3
    assert adding.leaves == [0] * 3
    given = random_terms(1)
    found = adding.sum({0: 1}, random_terms, LIKE)
    assert all(torch.equal(one, two) for one, two in zip(found, given, strict=True))


# -- the same bits -----------------------------------------------------------------------------------------------------


def _add(results: Path, leaves: Sequence[int], least: int) -> None:
    mailbox.LEAST = least
    with processes.together("cpu") as team:
        adding = SharedSum(COSTS, team, CPU)
        asked: list[int] = []

        def evaluate(seed: int) -> list[Tensor]:
            asked.append(seed)
            return random_terms(seed)

        if team.rank < adding.hands:
            terms = {leaf: leaf + 1 for leaf in leaves}
            for _ in range(2):
                asked.clear()
                found = [own.clone() for own in adding.sum(terms, evaluate, LIKE)]
            total = int(adding.total(torch.tensor(team.rank + 1)))
            torch.save({"found": found, "asked": asked, "total": total}, results / f"rank{team.rank}")
        team.wait()


@pytest.mark.parametrize("least", [0, 1 << 16], ids=["shared memory", "sent"])
@pytest.mark.parametrize("leaves", [[0, 1, 2, 3], [0, 2, 3], [3], [1, 2]])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_any_number_of_processes_adds_alike(count: int, leaves: list[int], least: int, tmp_path: Path) -> None:
    terms = {leaf: leaf + 1 for leaf in leaves}
    expected = SharedSum(COSTS, Team(), CPU).sum(terms, random_terms, LIKE)
    fork(_add, tmp_path, leaves, least, processes=count)
    found = [torch.load(path) for path in sorted(tmp_path.glob("rank*"))]
    hands = 4 if count == 4 else 2
    assert len(found) == hands
    for own in found:
        assert all(torch.equal(one, two) for one, two in zip(own["found"], expected, strict=True))
        assert own["total"] == sum(range(1, hands + 1))
    assert sorted(seed for own in found for seed in own["asked"]) == [leaf + 1 for leaf in leaves]


# -- whole merges ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family_of("bert", tmp_path_factory.mktemp("family"))


FDA = {"with_data": "propagated", "num_anchors": 4, "steps": 3, "batch_size": 4}
SETTINGS: dict[str, Any] = {"epochs": 2, "device": "cpu", "quiet": True}


def merge(family: Family, output: Path, method: str, options: dict[str, Any]) -> Path:
    base, sources, data = family
    return hf_fda.merge(base, sources, method, output=output, data=data, **{**SETTINGS, **options}).folder


def _share(family: Family, output: Path, method: str, options: dict[str, Any]) -> None:
    log_writes(output)
    mailbox.LEAST = 0
    real = StatesObjective.evaluate
    seen: list[int] = []

    def noted(self: StatesObjective, module: Any, call: Any, part: Any) -> Tensor:
        seen.extend(share.number for share in part)
        return real(self, module, call, part)

    StatesObjective.evaluate = noted  # type: ignore[method-assign]
    merge(family, output, method, options)
    (output.parent / f"seen{rank()}").write_text(json.dumps(sorted(set(seen))), encoding="utf-8")


@pytest.mark.parametrize(
    ("method", "options", "count", "sharing"),
    [
        ("distill", {}, 2, 2),
        ("distill", {}, 3, 2),
        ("fda", FDA, 2, 2),
        ("fda", {**FDA, "adaptation_distance": "mse"}, 2, 2),
        ("fda", FDA, 4, 3),  # the rows of two sources, and all anchors
    ],
)
def test_blocks_that_follow_each_other_are_shared_and_come_out_the_same(
    family: Family, tmp_path: Path, method: str, options: dict[str, Any], count: int, sharing: int
) -> None:
    merge(family, tmp_path / "one", method, options)
    fork(_share, family, tmp_path / "many", method, options, processes=count)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    seen = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(tmp_path.glob("seen*"))]
    assert len([own for own in seen if own]) == sharing
    assert not any(set(one) & set(two) for one in seen for two in seen if one is not two)
    blocks = [{name for name in own if name.startswith(f"{BLOCKS}/bert")} for own in logged(tmp_path)]
    assert [len(own) for own in blocks] == [4] + [0] * (count - 1)  # the main process writes them


def _on_machines(family: Family, output: Path) -> None:
    own = rank()
    processes.socket.gethostname = lambda: f"machine{own // 2}"  # type: ignore[attr-defined]
    with processes.together("cpu") as team:
        assert team.near == 2
    _share(family, output, "distill", {})


def test_processes_of_other_machines_wait(family: Family, tmp_path: Path) -> None:
    merge(family, tmp_path / "one", "distill", {})
    fork(_on_machines, family, tmp_path / "many", processes=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    seen = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(tmp_path.glob("seen*"))]
    assert seen == [[0], [1], []]


def _fail_beside(family: Family, output: Path, results: Path) -> None:
    real, own = StatesObjective.evaluate, rank()

    def failing(self: StatesObjective, module: Any, call: Any, part: Any) -> Tensor:
        if own == 1:
            raise RunError("no luck")
        return real(self, module, call, part)

    StatesObjective.evaluate = failing  # type: ignore[method-assign]
    try:
        merge(family, output, "distill", {})
    except RunError as error:
        (results / f"rank{own}").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
    StatesObjective.evaluate = real  # type: ignore[method-assign]
    merge(family, output, "distill", {})  # nobody hangs, and all can go on


def test_a_process_that_fails_lets_nobody_wait_for_its_gradients(family: Family, tmp_path: Path) -> None:
    fork(_fail_beside, family, tmp_path / "out", tmp_path)
    said = [path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("rank*"))]
    assert said[0].startswith(PeerError.__name__)
    assert said[1] == "RunError: block 'bert.encoder.layer.0': no luck"
    merge(family, tmp_path / "one", "distill", {})
    assert contents(tmp_path / "one") == contents(tmp_path / "out")
