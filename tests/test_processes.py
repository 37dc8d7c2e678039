"""Any number of processes makes the same bytes, shares the work, and fails as one."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from processes import fork, free_port, kill, rank, run, start, torchrun
from test_resume import SETTINGS, contents, merge, times

import hf_fda
from hf_fda import processes, sharing
from hf_fda.errors import InputError, PeerError, RunError
from hf_fda.sharing import check_same, check_shared
from hf_fda.stages import assign
from hf_fda.store import WORK, Filled, Store

Pair = tuple[Path, dict[str, Path]]


def words(base: Path, sources: dict[str, Path], output: Path, **changes: Any) -> list[str]:
    """The command line of the merge under test."""
    options = {name: value for name, value in {**SETTINGS, **changes}.items() if name != "quiet"}
    named = [word for name, folder in sources.items() for word in ("--source", f"{name}={folder}")]
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["merge", "--base", str(base), *named, *given, "--output", str(output)]


def log_writes(output: Path) -> None:
    """Note in the output folder which process writes which file (for forked processes: it changes the store)."""
    real = Store.fill

    def noted(self: Store, name: str, key: str, writer: Any) -> Filled:
        with open(output.parent / f"log{rank()}", "a", encoding="utf-8") as file:
            file.write(name + "\n")
        return real(self, name, key, writer)

    Store.fill = noted  # type: ignore[method-assign]


def logged(folder: Path) -> list[set[str]]:
    """What each process wrote."""
    return [set(path.read_text(encoding="utf-8").split()) for path in sorted(folder.glob("log*"))]


# -- sharing out -------------------------------------------------------------------------------------------------------


def test_work_is_shared_out_longest_first() -> None:
    assert assign([1, 1, 4, 2], 2) == [1, 1, 0, 1]
    assert assign([1, 2, 3], 1) == [0, 0, 0]
    assert assign([], 3) == []
    assert sorted(assign([5.0] * 6, 3)) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_no_process_has_a_piece_more_than_it_must(processes: int) -> None:
    costs = [float(1 + number % 5) for number in range(40)]
    load = [0.0] * processes
    for cost, owner in zip(costs, assign(costs, processes), strict=True):
        load[owner] += cost
    assert max(load) - min(load) <= max(costs)


# -- the same bytes ----------------------------------------------------------------------------------------------------


def _merge_and_note(base: Path, sources: dict[str, Path], output: Path, changes: dict[str, Any]) -> None:
    log_writes(output)
    merged = hf_fda.merge(base, sources, output=output, **{**SETTINGS, **changes})
    assert (merged.folder / "config.json").exists()  # on every process, finished when it returns


@pytest.mark.parametrize("count", [2, 3])
def test_forked_processes_make_the_bytes_of_one(classifiers: Pair, tmp_path: Path, count: int) -> None:
    base, sources = classifiers
    merge(base, sources, tmp_path / "one")
    fork(_merge_and_note, base, sources, tmp_path / "many", {}, processes=count)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    wrote = logged(tmp_path)
    assert len(wrote) == count
    assert all(any("anchors/" in name for name in own) for own in wrote)
    assert not any(one & two for one in wrote for two in wrote if one is not two)


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv"])
def test_forked_processes_share_weight_files(classifiers: Pair, tmp_path: Path, method: str) -> None:
    base, sources = classifiers
    changes = {"method": method}
    plain = {name: SETTINGS[name] for name in ("quiet", "device", "max_shard_bytes")}
    hf_fda.merge(base, sources, output=tmp_path / "one", **plain, **changes)  # type: ignore[arg-type]
    fork(_merge_plain, base, sources, tmp_path / "many", {**plain, **changes})
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert all(any("model-" in name for name in own) for own in logged(tmp_path))


def _merge_plain(base: Path, sources: dict[str, Path], output: Path, settings: dict[str, Any]) -> None:
    log_writes(output)
    hf_fda.merge(base, sources, output=output, **settings)


def test_torchrun_makes_the_bytes_of_one_process_and_only_the_main_one_speaks(
    classifiers: Pair, tmp_path: Path
) -> None:
    base, sources = classifiers
    merge(base, sources, tmp_path / "one")
    status, output, errors = run(*words(base, sources, tmp_path / "both"))
    assert status == 0, errors
    assert contents(tmp_path / "one") == contents(tmp_path / "both")
    assert output.count("Merged into") == 1


def test_two_launchers_work_as_two_machines(classifiers: Pair, tmp_path: Path) -> None:
    base, sources = classifiers
    merge(base, sources, tmp_path / "one")
    meeting = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "7"]
    meeting += ["--rdzv_endpoint", f"localhost:{free_port()}"]
    command = torchrun(*words(base, sources, tmp_path / "both"), launcher=meeting)
    machines = [start(command), start(command)]
    ends = [machine.communicate(timeout=180) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ends
    assert contents(tmp_path / "one") == contents(tmp_path / "both")
    assert sum(output.count("Merged into") for output, _ in ends) == 1


def test_killed_with_two_processes_it_goes_on_with_one(classifiers: Pair, tmp_path: Path) -> None:
    base, sources = classifiers
    merge(base, sources, tmp_path / "one", steps=100)
    output = tmp_path / "both"
    process = start(torchrun(*words(base, sources, output, steps=100)))
    end = time.monotonic() + 120
    while len(times(output, "anchors/*/blocks/*")) < 2 and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.02)
    kill(process)
    assert not (output / "config.json").exists()
    records = [path.relative_to(output / WORK / "records") for path in (output / WORK).rglob("blocks/*.json")]
    before = times(output, "anchors/*/blocks/*")
    merge(base, sources, output, steps=100)
    after = times(output, "anchors/*/blocks/*")
    kept = [str(name.with_suffix("")) for name in records if str(name).startswith("anchors")]
    assert kept
    assert all(before[name] == after[name] for name in kept)
    assert contents(tmp_path / "one") == contents(output)


# -- anchors -----------------------------------------------------------------------------------------------------------

FAST = {"num_anchors": 8, "steps": 10, "device": "cpu", "quiet": True}


def _construct(base: Path, source: Path, output: Path | None, results: Path) -> None:
    anchors = hf_fda.FunctionalDualAnchors.construct(base, source, output=output, **FAST)  # type: ignore[arg-type]
    losses = {block: (anchors[block].loss, float(anchors[block].anchors.sum())) for block in anchors}
    (results / f"rank{rank()}").write_text(json.dumps(losses), encoding="utf-8")


@pytest.mark.parametrize("on_disk", [True, False])
def test_anchors_are_shared_out_and_every_process_gets_all(classifiers: Pair, tmp_path: Path, on_disk: bool) -> None:
    base, sources = classifiers
    one = hf_fda.FunctionalDualAnchors.construct(base, sources["two"], output=tmp_path / "one", **FAST)  # type: ignore[arg-type]
    fork(_construct, base, sources["two"], tmp_path / "both" if on_disk else None, tmp_path)
    expected = {block: [one[block].loss, float(one[block].anchors.sum())] for block in one}
    assert [json.loads(path.read_text(encoding="utf-8")) for path in sorted(tmp_path.glob("rank*"))] == [expected] * 2
    if on_disk:
        assert contents(tmp_path / "one") == contents(tmp_path / "both")


# -- refusals and failures ---------------------------------------------------------------------------------------------


def said(errors: str) -> list[str]:
    """What the command itself said."""
    return [line for line in errors.splitlines() if line.startswith("hf-fda")]


def test_a_refused_input_is_said_once(classifiers: Pair, tmp_path: Path) -> None:
    base, sources = classifiers
    status, _, errors = run(*words(base, {**sources, "nil": tmp_path / "nil"}, tmp_path / "out"))
    assert status == 1  # the launcher's own
    assert len(said(errors)) == 1, errors
    assert "nil" in said(errors)[0]
    assert "exitcode  : 2" in errors
    assert "hf_fda/" not in errors  # no traceback of ours
    assert not (tmp_path / "out").exists()


def test_a_failure_of_one_process_names_its_unit_and_ends_the_job(classifiers: Pair, tmp_path: Path) -> None:
    base, sources = classifiers
    status, _, errors = run(*words(base, sources, tmp_path / "out", learning_rate=1e30))
    assert status == 1
    assert any("encoder.layer.0" in line and "learning_rate" in line for line in said(errors)), errors
    assert not (tmp_path / "out" / "config.json").exists()


def test_commands_of_one_process_are_refused(tmp_path: Path) -> None:
    status, output, errors = run("methods")
    assert status == 1
    assert len(said(errors)) == 1
    assert not output


def _fail_on_one(base: Path, sources: dict[str, Path], output: Path, results: Path) -> None:
    own, real = rank(), Store.fill

    def failing(self: Store, name: str, key: str, writer: Any) -> Filled:
        if own == 1:
            raise RunError("block 'x': no luck")
        return real(self, name, key, writer)

    Store.fill = failing  # type: ignore[method-assign]
    try:
        hf_fda.merge(base, sources, output=output, **SETTINGS)
    except RunError as error:
        (results / f"rank{own}").write_text(type(error).__name__, encoding="utf-8")
    Store.fill = real  # type: ignore[method-assign]
    hf_fda.merge(base, sources, output=output, **SETTINGS)  # nobody hangs, and all can go on


def test_who_catches_a_failure_lets_nobody_wait_and_can_go_on(classifiers: Pair, tmp_path: Path) -> None:
    base, sources = classifiers
    fork(_fail_on_one, base, sources, tmp_path / "out", tmp_path)
    assert [path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("rank*"))] == ["PeerError", "RunError"]
    merge(base, sources, tmp_path / "one")
    assert contents(tmp_path / "one") == contents(tmp_path / "out")


def _with_different_arguments(base: Path, sources: dict[str, Path], output: Path) -> None:
    with pytest.raises(InputError, match=r"process 1 .*sees something else.*arguments"):
        hf_fda.merge(base, sources, output=output, **{**SETTINGS, "epochs": 3 + rank()})


def _with_folders_of_their_own(base: Path, sources: dict[str, Path], output: Path) -> None:
    sharing.LOOK = 0.5
    own = output / f"machine{rank()}"
    with pytest.raises(InputError, match="not the same folder for all processes"):
        hf_fda.merge(base, sources, output=own, **SETTINGS)
    assert not own.exists()


def test_processes_that_do_not_work_on_the_same_are_refused(classifiers: Pair, tmp_path: Path) -> None:
    base, sources = classifiers
    fork(_with_different_arguments, base, sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_shared_are_refused(classifiers: Pair, tmp_path: Path) -> None:
    base, sources = classifiers
    (tmp_path / "out").mkdir()
    fork(_with_folders_of_their_own, base, sources, tmp_path / "out")


def _refused_on_one() -> None:
    def work() -> None:
        if rank() == 1:
            raise InputError("no such thing")

    with (
        processes.together("cpu") as team,
        pytest.raises(InputError, match=r"process 1 on .*: no such thing") as caught,
    ):
        team.agree(work)
    assert caught.value.agreed


def test_what_one_process_refuses_all_refuse() -> None:
    fork(_refused_on_one)


# -- waiting -----------------------------------------------------------------------------------------------------------


def _wait_long() -> None:
    PartialState(cpu=True, timeout=timedelta(seconds=1))
    with processes.together("cpu") as team:
        if team.rank:
            time.sleep(3)
        team.wait()
        assert team.gather(team.rank) == [0, 1]
        assert team.map(lambda number: number * 10, [1, 2, 3]) == [10, 20, 30]
        assert team.from_owner("here" if team.rank else None, 1) == "here"


def test_others_are_waited_for_longer_than_the_default_groups_timeout() -> None:
    fork(_wait_long)


def _leave_early(results: Path) -> None:
    try:
        with processes.together("cpu") as team:
            if team.rank:
                raise ValueError("a mistake")
            team.wait()
    except (PeerError, ValueError) as error:
        (results / f"rank{rank()}").write_text(type(error).__name__, encoding="utf-8")


def test_who_waits_is_told_when_another_fails(tmp_path: Path) -> None:
    fork(_leave_early, tmp_path)
    assert [path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("rank*"))] == ["PeerError", "ValueError"]


def test_alone_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    with processes.together() as team:
        assert (team.rank, team.count, team.main) == (0, 1, True)
        team.wait()
        check_same({"the arguments": "x"}, team)
        check_shared(Path("nowhere"), team)
    assert not torch.distributed.is_initialized()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
