"""Pushes to a Hub that fails on the way, and cards that no Hub takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import fine_tune, make_model
from hub_client import TOKEN, Away, environment_of, process
from hub_server import FakeHub, Fault, Refusal

import hf_fda
from hf_fda.errors import HFFDAError, InputError
from hf_fda.patience import wait_after

REQUESTS = {
    "create": "POST /api/repos/create",
    "preupload": r"POST /api/models/me/merged/preupload/.*",
    "batch": r"POST .*/info/lfs/objects/batch",
    "object": r"PUT /.*",
    "commit": r"POST /api/models/me/merged/commit/.*",
}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    hub.stop()


@pytest.fixture
def hub(server: FakeHub) -> FakeHub:
    server.clear()
    return server


@pytest.fixture(scope="module")
def away(server: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Away]:
    with process(**environment_of(server, tmp_path_factory.mktemp("home"))) as call:
        yield call


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = make_model("llama")
    base.save_pretrained(folder / "base")
    fine_tune(base, 1).save_pretrained(folder / "one")
    hf_fda.merge(folder / "base", [folder / "one"], "linear", folder / "merged", device="cpu", quiet=True)
    return folder / "merged"


def pushed(folder: Path) -> str:
    return hf_fda.Merged(folder).push_to_hub("me/merged")


def contents(folder: Path) -> dict[str, bytes]:
    """What a folder's repository holds."""
    inside = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in inside}


@pytest.mark.parametrize("fault", ["500", "429", "dropped"])
@pytest.mark.parametrize("request_", REQUESTS)
def test_a_push_gets_through_when_a_request_fails_once(
    request_: str, fault: str, hub: FakeHub, away: Away, merged: Path
) -> None:
    refusals = {"500": Refusal(500), "429": Refusal(429, headers={"Retry-After": "1"}), "dropped": None}
    hub.faults.append(Fault(REQUESTS[request_], refusals[fault]))
    away(pushed, merged)
    assert hub.faults[0].times == 0
    assert {name: data for name, data in hub.files("me/merged").items() if name != ".gitattributes"} == contents(merged)
    assert len(hub.repositories["models", "me/merged"].commits) <= 2


@pytest.mark.parametrize("request_", ["object", "commit"])
def test_without_room_readers_see_nothing_and_nothing_is_lost(
    request_: str, hub: FakeHub, away: Away, merged: Path
) -> None:
    before = contents(merged)
    hub.faults.append(Fault(REQUESTS[request_], Refusal(403, "storage quota exceeded"), times=100))
    with pytest.raises(HFFDAError, match=r"me/merged.*403"):
        away(pushed, merged)
    assert set(hub.files("me/merged")) <= {".gitattributes"}
    assert contents(merged) == before
    hub.faults.clear()
    stored = set(hub.uploaded)
    hub.forget_traffic()
    away(pushed, merged)
    assert {name: data for name, data in hub.files("me/merged").items() if name != ".gitattributes"} == before
    if request_ == "commit":  # the weights are there, and are not sent again
        assert stored and not [asked for asked in hub.asked if asked.startswith("PUT")]


def test_a_token_is_written_nowhere(hub: FakeHub, away: Away, merged: Path, tmp_path: Path) -> None:
    hub.faults.append(Fault(REQUESTS["commit"], Refusal(500)))
    away(pushed, merged)
    hub.read_only = True
    with pytest.raises(HFFDAError) as refused:
        away(pushed, merged)
    assert TOKEN not in str(refused.value)
    files = [Path(root) / name for root, _, names in os.walk(merged) for name in names]
    assert files and not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not [name for name, data in hub.files("me/merged").items() if TOKEN.encode() in data]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: "no metadata at all", "no metadata"),
        (lambda text: text.replace("---\n", "---\nlicense: [mit\n", 1), "broken"),
        (lambda text: text.replace("---\n", "---\nbase_model: [../../etc]\n", 1), "no name of a repository"),
        (lambda text: text.replace("---\n", "---\nlanguage: 3\n", 1), "language holds 3"),
        (lambda text: text.replace("---\n", "---\nbase_model_relation: mix\n", 1), "base_model_relation"),
        (lambda text: text.replace("---\n", "---\nx: !!python/object:os.system 1\n", 1), "broken"),
        (None, "no card"),
    ],
)
def test_a_broken_card_is_refused_before_anything_is_sent(
    change: Any, said: str, hub: FakeHub, away: Away, merged: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", "merge_config.yaml", "README.md"):
        (folder / name).write_bytes((merged / name).read_bytes())
    card = folder / "README.md"
    if change is None:
        card.unlink()
    else:
        card.write_text(change(card.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(InputError, match=said):
        away(pushed, folder)
    assert not hub.asked


def test_cards_of_merges_are_such_as_the_hub_takes(merged: Path) -> None:
    from hf_fda.card_check import check_card

    check_card(merged, "model")
    assert yaml.safe_load((merged / "README.md").read_text(encoding="utf-8").split("---")[1])["tags"]


def test_only_what_may_pass_is_waited_for() -> None:
    class Response:
        def __init__(self, status: int, headers: dict[str, str]) -> None:
            self.status_code, self.headers = status, headers

    def failed(status: int, **headers: str) -> Exception:
        error = OSError("refused")
        error.response = Response(status, headers)  # type: ignore[attr-defined]
        return error

    assert [wait_after(failed(503), tried) for tried in (1, 2, 3)] == [1, 2, 4]
    assert wait_after(failed(429, **{"Retry-After": "7"}), 1) == 7
    assert wait_after(failed(429, **{"Retry-After": "999999"}), 1) == 300
    assert wait_after(failed(403), 1) is None
    assert wait_after(OSError("no network"), 1) is None
