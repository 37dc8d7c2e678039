"""Pulling from the Hub and pushing to it, against a small Hub on this machine.

huggingface_hub reads its address when it is imported, so what is to talk to the fake Hub runs in a process of its own:
`away(function, ...)` calls a function of this module there and hands back its answer or its error.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
import yaml
from checks import timeless
from conftest import TEXT, fine_tune
from hub_client import TOKEN, Away, environment_of, process
from hub_server import FakeHub
from huggingface_hub import ModelCard, parse_eval_result_entries
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from vocabularies import MARKERS, bpe, llama, save, tuned, wordpiece

import hf_fda
from hf_fda.anchors import UnitAnchors
from hf_fda.checkpoint import open_checkpoint
from hf_fda.cli import main
from hf_fda.data.opening import open_data
from hf_fda.data.request import Reading
from hf_fda.errors import HFFDAError, InputError
from hf_fda.inputs import name_sources, open_inputs

SOURCES = {"one": "org/one", "two": "org/two"}
WEIGHTS = "model.safetensors"
METHOD = "task_arithmetic"
ANCHORS: dict[str, Any] = {"num_anchors": 4, "num_tokens": 2, "steps": 3, "seed": 5}
BLOCKS = ["encoder.layer.0", "encoder.layer.1"]


# -- what runs in the other process --------------------------------------------------------------------------------


def plan(base: str, sources: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """A plan's record of itself."""
    return hf_fda.plan(base, sources, output=folder, device="cpu", **options).arguments


def merge(base: str, sources: Any, folder: Path, **options: Any) -> Path:
    """A merge's folder."""
    return hf_fda.merge(base, sources, output=folder, device="cpu", quiet=True, **{"method": METHOD, **options}).folder


def load(source: str | Path, task: str | None = None, revision: str | None = None) -> dict[str, str]:
    """A merged model's class and its tensors, each as a hash of its bits."""
    model = hf_fda.load(source, task, revision)
    hashes = {name: hash_of(tensor) for name, tensor in model.state_dict().items()}
    return {"class": type(model).__name__, "training": str(model.training), **hashes}


def upload(folder: Path, id: str, **options: Any) -> str:
    """The address of a pushed merge."""
    return hf_fda.Merged(folder).push_to_hub(id, **options)


def uploaded_plainly(folder: Path, id: str, *words: str) -> None:
    """A folder as the Hub's own command line uploads it."""
    program = [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", id, str(folder), ".", *words]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stdout + done.stderr


def load_adapter(id: str, base: str) -> dict[str, str]:
    """The factors of a merged adapter on the Hub as plain PEFT loads them, each as a hash of its bits."""
    model = PeftModel.from_pretrained(t.AutoModelForSequenceClassification.from_pretrained(base), id)
    return {name: hash_of(tensor) for name, tensor in model.state_dict().items() if "lora_" in name}


def command(*words: str) -> tuple[int, str, str]:
    """A command line's exit status and what it says."""
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        status = main(words)
    return status, said.getvalue(), complained.getvalue()


def tensors(id: str, *names: str) -> dict[str, str]:
    """Some tensors of a checkpoint, each as a hash of its bits."""
    checkpoint = open_checkpoint(id)
    return {name: hash_of(checkpoint.read(name)) for name in names}


def anchors_pushed(folder: Path | str, id: str, **options: Any) -> str:
    """The address of pushed anchors."""
    return hf_fda.FunctionalDualAnchors.from_pretrained(folder).push_to_hub(id, **options)


def anchors_constructed(base: str, source: str, folder: Path) -> dict[str, Any]:
    """What `anchors.json` says of the models, of anchors with all that goes beside them."""
    more: dict[str, Any] = {"include_rest": True, "include_head": True, "quiet": True, "output": folder}
    info = hf_fda.FunctionalDualAnchors.construct(base, source, "cpu", **more, **ANCHORS).info
    return {"base": info.base, "source": info.source}


def anchors_table(id: str, revision: str | None = None) -> list[dict[str, Any]]:
    """The table that `datasets` reads of an anchors dataset."""
    from datasets import load_dataset

    return list(load_dataset(id, split="train", revision=revision))


def anchors_shown(id: str) -> tuple[str, str]:
    """Anchors on the Hub as a terminal and as a notebook shows them."""
    anchors = hf_fda.FunctionalDualAnchors.from_pretrained(id)
    return repr(anchors), anchors._repr_html_()


def anchors_opened(id: str, *blocks: str, revision: str | None = None) -> tuple[list[str], dict[str, list[Any]]]:
    """The names of all blocks of anchors, and the content of some."""
    anchors = hf_fda.FunctionalDualAnchors.from_pretrained(id, revision)
    return anchors.blocks, {block: facts_of(anchors[block]) for block in blocks}


def merge_anchors(base: str, ids: list[str], folder: Path, **options: Any) -> Path:
    """A merge of anchors alone."""
    opened = {f"task{number}": hf_fda.FunctionalDualAnchors.from_pretrained(id) for number, id in enumerate(ids)}
    return hf_fda.merge(base, opened, output=folder, device="cpu", quiet=True, epochs=2, **options).folder


def rows_of(base: str, sources: dict[str, str], data: dict[str, Any], **reading: Any) -> dict[str, Any]:
    """The records of rows by task, with how many were expected and how many there are."""
    found = open_data(data, open_inputs(base, sources), Reading(**reading))
    encoded = {task: opened.encode() for task, opened in found.items()}
    return {
        task: {**opened.recorded(encoded[task]), "expected": opened.count, "found": len(encoded[task])}
        for task, opened in found.items()
    }


def scored(merged: str | Path, data: dict[str, Any]) -> dict[str, Any]:
    """What a model scores on each task, and on what."""
    scores = hf_fda.evaluate(merged, data, device="cpu", quiet=True)
    return {task: (own.merged, own.data) for task, own in scores.tasks.items()}


def hash_of(tensor: torch.Tensor) -> str:
    """A hash of a tensor's type, shape and bits."""
    facts = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(facts + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def facts_of(unit: UnitAnchors) -> list[Any]:
    """One block's anchors as plain values."""
    return [hash_of(unit.anchors), hash_of(unit.targets), unit.loss, unit.steps]


# -- the fake Hub and the processes that talk to it -----------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes keep what they have downloaded."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def environment(server: FakeHub, home: Path) -> dict[str, str]:
    return environment_of(server, home)


@pytest.fixture(scope="module")
def away(environment: dict[str, str]) -> Iterator[Away]:
    with process(**environment) as call:
        yield call


@pytest.fixture(scope="module")
def offline(environment: dict[str, str]) -> Iterator[Away]:
    """As `away`, with the same cache, but told not to ask the Hub."""
    with process(**environment | {"HF_HUB_OFFLINE": "1"}) as call:
        yield call


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base ("base", and its first version "base-v1") and two classifiers fine-tuned from that, about 1 MB each."""
    folder = tmp_path_factory.mktemp("models")
    config = t.BertConfig(**TEXT | {"vocab_size": 8000}, max_position_embeddings=40)
    torch.manual_seed(0)
    first = t.BertModel(config).eval()
    places = {"base-v1": first, "base": fine_tune(first, seed=9)}
    for seed, (name, labels) in enumerate({"one": 2, "two": 3}.items(), 1):
        changed = copy.deepcopy(config)
        changed.num_labels = labels
        torch.manual_seed(seed)
        places[name] = t.BertForSequenceClassification(changed).eval()
        places[name].bert.load_state_dict(fine_tune(first, seed=seed).state_dict())
    for name, model in places.items():
        model.save_pretrained(folder / name)
        licence = "mit" if name == "two" else "apache-2.0"
        (folder / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n# {name}\n", encoding="utf-8")
    (folder / "base-v1" / "vocab.txt").write_text("[PAD]\n[UNK]\nword\n", encoding="utf-8")
    return {name: folder / name for name in places}


@pytest.fixture
def hub(server: FakeHub, home: Path, folders: dict[str, Path]) -> Iterator[FakeHub]:
    """The Hub with org/base (tag v1, then main), org/one and org/two, and nothing downloaded yet."""
    shutil.rmtree(home / "hub", ignore_errors=True)
    server.clear()
    server.publish("org/base", folders["base-v1"], revision="v1")
    server.publish("org/base", folders["base"])
    for name in SOURCES:
        server.publish(f"org/{name}", folders[name])
    yield server
    server.stop()
    server.start()


def commit_of(hub: FakeHub, id: str, revision: str = "main", kind: str = "models") -> str:
    return hub.repositories[kind, id].find(revision)


def contents(folder: Path) -> dict[str, bytes]:
    """Weights and heads of a merged folder by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("model*.safetensors")}


@pytest.fixture
def merged(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A finished merge of the local folders."""
    return merge(str(folders["base-v1"]), {name: folders[name] for name in SOURCES}, tmp_path / "merged")


# -- plan ------------------------------------------------------------------------------------------------------------


def test_a_plan_from_hub_ids_fetches_configurations_and_headers_only(hub: FakeHub, away: Away, tmp_path: Path) -> None:
    arguments = away(plan, "org/base@v1", ["org/one", "org/two"], tmp_path / "out")
    assert arguments["method"] == "fda"
    assert arguments["base"] == f"org/base@{commit_of(hub, 'org/base', 'v1')}"
    assert arguments["sources"] == {name: f"{id}@{commit_of(hub, id)}" for name, id in SOURCES.items()}
    ids = ["org/base", *SOURCES.values()]
    assert {name for name in hub.served if not name.endswith("README.md")} == {
        "org/base/vocab.txt",  # for the rows that are to be drawn from the weights
        *(f"{id}/{name}" for id in ids for name in ("config.json", WEIGHTS)),
    }
    for id in ids:
        whole = len(hub.files(id, "v1" if id == "org/base" else "main")[WEIGHTS])
        assert whole > 1_000_000
        assert hub.served[f"{id}/{WEIGHTS}"] < whole / 8
    assert not (tmp_path / "out").exists()


def test_sources_of_a_list_are_named_after_their_repositories_whatever_the_revision() -> None:
    ids = ["org/one@v1", "org/two@refs/pr/1", "plain@feature/x"]
    assert list(name_sources(ids)) == ["one", "two", "plain"]


# -- merge -----------------------------------------------------------------------------------------------------------


def test_an_adapter_in_a_folder_of_a_repository_is_merged(
    hub: FakeHub, away: Away, offline: Away, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["query"])
    model: Any = get_peft_model(t.BertModel.from_pretrained(folders["base"]), config, "first")
    model.add_adapter("second", config)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    model.save_pretrained(tmp_path / "adapters")
    expected = merge(str(folders["base"]), [tmp_path / "adapters/second"], tmp_path / "local", method="linear")
    hub.publish("me/adapters", tmp_path / "adapters")
    for number, call in enumerate((away, offline)):
        pulled = call(merge, "org/base", ["me/adapters/second"], tmp_path / f"pulled{number}", method="linear")
        assert contents(pulled) == contents(expected)
        commit = commit_of(hub, "me/adapters")
        assert f"second: me/adapters/second@{commit}" in (pulled / "merge_config.yaml").read_text()
        metadata = yaml.safe_load((pulled / "README.md").read_text(encoding="utf-8").split("---")[1])
        assert metadata["base_model"] == ["org/base", "me/adapters"]
    with pytest.raises(InputError, match="say which: 'me/adapters/first', 'me/adapters/second'"):
        away(plan, "org/base", {"own": "me/adapters"}, tmp_path / "out", method="linear")
    with pytest.raises(InputError, match="'me/adapters' has none of that name"):
        away(plan, "org/base", {"own": "me/adapters/third"}, tmp_path / "out", method="linear")


def test_a_merge_from_hub_ids_equals_that_of_the_folders(
    hub: FakeHub, away: Away, merged: Path, tmp_path: Path
) -> None:
    pulled = away(merge, "org/base@v1", SOURCES, tmp_path / "pulled")
    assert set(contents(pulled)) == {WEIGHTS, f"task_heads/one/{WEIGHTS}", f"task_heads/two/{WEIGHTS}"}
    assert contents(pulled) == contents(merged)
    for name in ("config.json", "vocab.txt", "task_heads/one/config.json"):
        assert (pulled / name).read_bytes() == (merged / name).read_bytes()
    recorded = yaml.safe_load((pulled / "merge_config.yaml").read_text(encoding="utf-8"))
    assert recorded["base"] == f"org/base@{commit_of(hub, 'org/base', 'v1')}"
    assert recorded["sources"] == {name: f"{id}@{commit_of(hub, id)}" for name, id in SOURCES.items()}


def test_a_merge_by_anchors_from_hub_ids_equals_that_of_the_folders(
    hub: FakeHub, away: Away, folders: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {**ANCHORS, "method": "fda", "epochs": 2}
    local = merge(str(folders["base-v1"]), {"one": folders["one"]}, tmp_path / "local", **options)
    pulled = away(merge, "org/base@v1", {"one": "org/one"}, tmp_path / "pulled", **options)
    assert contents(pulled) == contents(local)


def test_tokens_of_hub_models_are_aligned_as_those_of_folders(hub: FakeHub, away: Away, tmp_path: Path) -> None:
    plain, one = bpe(), bpe(MARKERS)
    base = llama(len(plain), plain)
    fine = tuned(base, {row: row for row in range(len(plain))}, len(one), 1)
    for name, model, tokenizer in (("base", base, plain), ("one", fine, one)):
        hub.publish(f"org/chat-{name}", save(tmp_path / name, model, tokenizer))
    options: dict[str, Any] = {"tokenizer": "union", "method": "linear"}
    local = merge(str(tmp_path / "base"), {"one": tmp_path / "one"}, tmp_path / "local", **options)
    pulled = away(merge, "org/chat-base", {"one": "org/chat-one"}, tmp_path / "pulled", **options)
    assert contents(pulled) == contents(local)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (pulled / name).read_bytes() == (local / name).read_bytes()
    with pytest.raises(InputError, match=r"source 'one' \(org/chat-one\) has other tokens.*im_start"):
        away(plan, "org/chat-base", {"one": "org/chat-one"}, tmp_path / "out", method="linear")


@pytest.mark.parametrize(
    ("revision", "folder"), [("", "base"), ("@main", "base"), ("@v1", "base-v1"), ("@feature/x", "base-v1")]
)
def test_the_revision_in_an_id_picks_its_weights(
    revision: str, folder: str, hub: FakeHub, away: Away, folders: dict[str, Path], tmp_path: Path
) -> None:
    hub.repositories["models", "org/base"].refs["feature/x"] = commit_of(hub, "org/base", "v1")
    local = merge(str(folders[folder]), {"one": folders["one"]}, tmp_path / "local")
    pulled = away(merge, f"org/base{revision}", {"one": "org/one"}, tmp_path / "pulled")
    assert contents(pulled) == contents(local)


def test_what_merge_config_records_makes_the_same_merge_after_the_repositories_moved_on(
    hub: FakeHub, away: Away, folders: dict[str, Path], home: Path, tmp_path: Path
) -> None:
    first = away(merge, "org/base@v1", {"one": "org/one"}, tmp_path / "first")
    hub.publish("org/base", folders["base"], revision="v1")
    hub.publish("org/one", folders["two"])
    shutil.rmtree(home / "hub")
    words = ("merge", str(first / "merge_config.yaml"), "--output", str(tmp_path / "again"), "--quiet")
    assert away(command, *words) == (0, "", "")
    assert contents(tmp_path / "again") == contents(first)
    assert (tmp_path / "again" / "merge_config.yaml").read_text() == (first / "merge_config.yaml").read_text()


def test_the_card_lists_the_hub_names_commits_and_licences(hub: FakeHub, away: Away, tmp_path: Path) -> None:
    pulled = away(merge, "org/base@v1", SOURCES, tmp_path / "pulled")
    card = (pulled / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == ["org/base", "org/one", "org/two"]
    assert metadata["base_model_relation"] == "merge"
    assert "license" not in metadata
    assert "the models' licences differ (apache-2.0, mit)" in card
    assert f"| `two` | org/two@{commit_of(hub, 'org/two')} | mit |" in card


def test_one_licence_of_all_models_becomes_that_of_the_merge(hub: FakeHub, away: Away, tmp_path: Path) -> None:
    pulled = away(merge, "org/base@v1", {"one": "org/one"}, tmp_path / "pulled")
    metadata = yaml.safe_load((pulled / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert metadata["license"] == "apache-2.0"


def test_a_repository_without_an_organisation_is_listed_too(
    hub: FakeHub, away: Away, folders: dict[str, Path], tmp_path: Path
) -> None:
    hub.publish("plain-bert", folders["base-v1"])
    pulled = away(merge, "plain-bert", {"one": "org/one"}, tmp_path / "pulled")
    metadata = yaml.safe_load((pulled / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert metadata["base_model"] == ["plain-bert", "org/one"]


def test_a_second_merge_downloads_nothing_again(hub: FakeHub, away: Away, tmp_path: Path) -> None:
    first = away(merge, "org/base@v1", SOURCES, tmp_path / "first")
    assert hub.served[f"org/base/{WEIGHTS}"] > 1_000_000
    hub.forget_traffic()
    second = away(merge, "org/base@v1", SOURCES, tmp_path / "second")
    assert not hub.served
    assert contents(second) == contents(first)


def test_only_the_shards_that_are_read_are_downloaded(
    hub: FakeHub, away: Away, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = t.BertModel.from_pretrained(folders["base"])
    model.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    hub.publish("org/sharded", tmp_path / "sharded")
    placed = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(placed.values())) > 1
    name = "encoder.layer.1.output.dense.weight"
    assert away(tensors, "org/sharded", name) == {name: hash_of(model.state_dict()[name])}
    place = f"GET /org/sharded/resolve/{commit_of(hub, 'org/sharded')}"
    asked = {file: hub.asked.count(f"{place}/{file}") for file in set(placed.values())}
    assert asked == {file: 2 if file == placed[name] else 1 for file in asked}  # its header, and the whole of one
    assert all(hub.served[f"org/sharded/{file}"] <= 100_001 for file in asked if file != placed[name])


def test_code_that_comes_with_a_checkpoint_is_that_of_the_pinned_commit(
    hub: FakeHub, away: Away, folders: dict[str, Path], tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(folders["base-v1"], own)
    facts = json.loads((own / "config.json").read_text())
    facts |= {"architectures": ["OwnBert"], "auto_map": {"AutoModel": "modeling_own.OwnBert"}}
    (own / "config.json").write_text(json.dumps(facts))
    code = "from transformers import BertModel\n\n\nclass OwnBert(BertModel):\n    pass\n"
    (own / "modeling_own.py").write_text(code)
    hub.publish("org/own", own, revision="v1")
    (own / "modeling_own.py").write_text("raise RuntimeError('code of another commit')\n")
    hub.publish("org/own", own)
    arguments = away(plan, "org/own@v1", {"one": "org/own@v1"}, tmp_path / "out", method=METHOD, trust_remote_code=True)
    assert arguments["base"] == f"org/own@{commit_of(hub, 'org/own', 'v1')}"
    with pytest.raises(hf_fda.InputError, match="trust_remote_code"):
        away(plan, "org/own@v1", {"one": "org/own@v1"}, tmp_path / "out", method="fda")


# -- what cannot be had ----------------------------------------------------------------------------------------------


def test_an_unknown_repository_is_refused_by_name(hub: FakeHub, away: Away, tmp_path: Path) -> None:
    with pytest.raises(hf_fda.InputError, match=r"base: org/nothing: .*no such repository.*hf auth login"):
        away(plan, "org/nothing", SOURCES, tmp_path / "out")
    with pytest.raises(hf_fda.InputError, match=r"source 'two': org/nothing: .*no such repository.*hf auth login"):
        away(plan, "org/base", {"one": "org/one", "two": "org/nothing"}, tmp_path / "out")


def test_an_unknown_revision_is_refused_by_name(hub: FakeHub, away: Away, tmp_path: Path) -> None:
    with pytest.raises(hf_fda.InputError, match=r"base: org/base@v7: .*no .*revision"):
        away(plan, "org/base@v7", SOURCES, tmp_path / "out")


def test_a_gated_repository_is_refused_with_the_way_in(hub: FakeHub, away: Away, tmp_path: Path) -> None:
    hub.repositories["models", "org/two"].gated = True
    with pytest.raises(hf_fda.InputError, match=r"source 'two': org/two: .*gated; accept its terms.*hf auth login"):
        away(plan, "org/base", SOURCES, tmp_path / "out")


def test_a_repository_without_weights_says_so(
    hub: FakeHub, away: Away, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["base"], tmp_path / "bare", ignore=shutil.ignore_patterns(WEIGHTS))
    hub.publish("org/bare", tmp_path / "bare")
    with pytest.raises(hf_fda.InputError, match=f"base: org/bare: no {WEIGHTS}"):
        away(plan, "org/bare", SOURCES, tmp_path / "out")


def test_a_damaged_weight_file_is_refused_by_name(
    hub: FakeHub, away: Away, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["base"], tmp_path / "damaged")
    (tmp_path / "damaged" / WEIGHTS).write_bytes(b"<html>not found</html>")
    hub.publish("org/damaged", tmp_path / "damaged")
    with pytest.raises(hf_fda.InputError, match=f"base: org/damaged: .*{WEIGHTS}"):
        away(plan, "org/damaged", SOURCES, tmp_path / "out")


def test_tensors_of_an_unknown_type_are_refused_by_name(
    hub: FakeHub, away: Away, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["base"], tmp_path / "odd")
    data = (tmp_path / "odd" / WEIGHTS).read_bytes()
    (tmp_path / "odd" / WEIGHTS).write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"F99"', 1))
    hub.publish("org/odd", tmp_path / "odd")
    with pytest.raises(hf_fda.InputError, match=r"base: org/odd: .*F99"):
        away(plan, "org/odd", SOURCES, tmp_path / "out")


@pytest.mark.parametrize("name", ["../evil/adapter_config.json", "/etc/evil.py", "a/../../evil.py", "..\\evil.py"])
def test_a_repository_that_lists_files_outside_itself_is_refused(
    name: str, hub: FakeHub, away: Away, tmp_path: Path
) -> None:
    hub.files("org/one")[name] = b"{}"
    with pytest.raises(hf_fda.InputError, match=r"source 'one'.*org/one.*outside the repository; refused"):
        away(merge, "org/base@v1", {"one": "org/one"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hub_that_is_down_is_named_when_nothing_is_cached(hub: FakeHub, away: Away, tmp_path: Path) -> None:
    hub.stop()
    with pytest.raises(hf_fda.InputError, match=r"base: org/base@v1: .*not in the cache.*[Cc]onnect"):
        away(plan, "org/base@v1", SOURCES, tmp_path / "out")


def test_offline_mode_is_named_when_nothing_is_cached(hub: FakeHub, offline: Away, tmp_path: Path) -> None:
    with pytest.raises(hf_fda.InputError, match=r"base: org/base@v1: .*not in the cache.*HF_HUB_OFFLINE"):
        offline(plan, "org/base@v1", SOURCES, tmp_path / "out")
    assert not hub.asked


def test_what_is_cached_is_merged_while_the_hub_is_down(hub: FakeHub, away: Away, tmp_path: Path) -> None:
    first = away(merge, "org/base@v1", SOURCES, tmp_path / "first")
    hub.stop()
    second = away(merge, "org/base@v1", SOURCES, tmp_path / "second")
    assert contents(second) == contents(first)
    assert timeless(second / "README.md") == timeless(first / "README.md")
    assert (second / "merge_config.yaml").read_text() == (first / "merge_config.yaml").read_text()


def test_what_is_cached_is_merged_offline(hub: FakeHub, away: Away, offline: Away, tmp_path: Path) -> None:
    first = away(merge, "org/base@v1", SOURCES, tmp_path / "first")
    hub.forget_traffic()
    second = offline(merge, "org/base@v1", SOURCES, tmp_path / "second")
    assert contents(second) == contents(first)
    assert (second / "merge_config.yaml").read_text() == (first / "merge_config.yaml").read_text()
    assert not hub.asked


def test_an_interrupted_download_is_not_taken_for_a_checkpoint_offline(
    hub: FakeHub, away: Away, offline: Away, tmp_path: Path
) -> None:
    away(plan, "org/base@v1", SOURCES, tmp_path / "out")
    with pytest.raises(hf_fda.InputError, match=r"base: org/base@v1: .*cache"):
        offline(plan, "org/base@v1", SOURCES, tmp_path / "out")


def test_a_finished_merge_is_not_made_again_offline(hub: FakeHub, away: Away, offline: Away, tmp_path: Path) -> None:
    folder = away(merge, "org/base@v1", SOURCES, tmp_path / "out")
    before = (folder / WEIGHTS).stat().st_mtime_ns
    offline(merge, "org/base@v1", SOURCES, folder)
    assert (folder / WEIGHTS).stat().st_mtime_ns == before


@pytest.mark.parametrize("file", [WEIGHTS, "README.md"])  # the first and the last that a merge asks for
def test_a_download_that_fails_on_the_way_is_named_and_the_same_call_goes_on(
    file: str, hub: FakeHub, away: Away, merged: Path, tmp_path: Path
) -> None:
    hub.refused.add(f"org/two/{file}")
    with pytest.raises(hf_fda.RunError, match=r"org/two: .*goes on"):
        away(merge, "org/base@v1", SOURCES, tmp_path / "pulled")
    assert not (tmp_path / "pulled" / "config.json").exists()
    hub.refused.clear()
    assert contents(away(merge, "org/base@v1", SOURCES, tmp_path / "pulled")) == contents(merged)


@pytest.mark.parametrize("moved", [True, False])
def test_whether_weights_show_text_is_seen_once_they_are_downloaded(
    moved: bool, hub: FakeHub, away: Away, folders: dict[str, Path], tmp_path: Path
) -> None:
    base, local, ids = folders["base-v1"], {name: folders[name] for name in SOURCES}, dict(SOURCES)
    if not moved:
        embedding = t.BertModel.from_pretrained(base).embeddings.word_embeddings.weight
        for name, folder in local.items():
            model = t.BertForSequenceClassification.from_pretrained(folder)
            model.bert.embeddings.word_embeddings.weight.data = embedding.data
            model.save_pretrained(tmp_path / name)
            local[name], ids[name] = tmp_path / name, f"me/{name}"
            hub.publish(ids[name], local[name])
    how = {"method": "fda", "epochs": 1, **ANCHORS}
    hub.refused.add("org/base/vocab.txt")
    with pytest.raises(hf_fda.InputError, match=r"org/base@v1: vocab.txt: .*Hub"):
        away(plan, "org/base@v1", ids, tmp_path / "pulled", **how)
    hub.refused.clear()
    hub.refused.add(f"{ids['two']}/{WEIGHTS}")
    with pytest.raises(hf_fda.RunError, match=r"two: .*goes on"):
        away(merge, "org/base@v1", ids, tmp_path / "pulled", **how)
    hub.refused.clear()
    pulled = away(merge, "org/base@v1", ids, tmp_path / "pulled", **how)
    assert contents(pulled) == contents(merge(str(base), local, tmp_path / "merged", **how))
    card = (pulled / "README.md").read_text(encoding="utf-8")
    assert ("synthetic rows" in card) == moved
    assert ("anchors alone are matched" in card) != moved
    assert "looked at once" not in card


# -- push a merge, and load it from the Hub --------------------------------------------------------------------------


def test_a_pushed_merge_holds_the_folder_but_not_its_cache(hub: FakeHub, away: Away, merged: Path) -> None:
    address = away(upload, merged, "me/merged", private=True)
    repository = hub.repositories["models", "me/merged"]
    assert repository.private
    assert hub.tokens == {TOKEN}
    assert address == f"{hub.endpoint}/me/merged/commit/{repository.refs['main']}"
    files = {name: data for name, data in hub.files("me/merged").items() if name != ".gitattributes"}
    own = [path.relative_to(merged).as_posix() for path in merged.rglob("*") if path.is_file()]
    assert any(name.startswith(".cache/") for name in own)
    assert set(files) == {name for name in own if not name.startswith(".cache/")}
    assert set(files) >= {"README.md", "config.json", WEIGHTS, "merge_config.yaml", "task_heads/one/config.json"}
    assert all(data == (merged / name).read_bytes() for name, data in files.items())


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_a_plain_upload_of_the_folder_gives_the_same_repository(
    kind: str, hub: FakeHub, away: Away, merged: Path, anchors: dict[str, Path]
) -> None:
    folder = merged if kind == "models" else anchors["one"]
    away(command, "push", str(folder), "me/ours")
    away(uploaded_plainly, folder, "me/theirs", "--type", kind.removesuffix("s"))
    assert hub.files("me/ours", kind=kind) == hub.files("me/theirs", kind=kind)


def test_a_pushed_adapter_loads_with_plain_peft(hub: FakeHub, away: Away, merged: Path, tmp_path: Path) -> None:
    adapter = away(merge, "org/base", {"one": "org/one"}, tmp_path / "adapter", as_adapter=True, rank=2)
    address = away(upload, adapter, "me/adapter")
    assert address.endswith(commit_of(hub, "me/adapter"))
    factors = away(load_adapter, "me/adapter", "org/base")
    assert factors and factors == away(load_adapter, str(adapter), "org/base")
    assert away(load, "me/adapter", "one") == away(load, adapter, "one")
    away(upload, merged, "me/adapter")  # of a whole model now nothing is left of the adapter
    assert not [name for name in hub.files("me/adapter") if name.startswith("adapter_")]
    assert away(load, "me/adapter", "one") == load(merged, "one")


@pytest.mark.parametrize("task", [None, "one", "two"])
def test_a_pushed_merge_loads_as_the_folder_does(task: str | None, hub: FakeHub, away: Away, merged: Path) -> None:
    away(upload, merged, "me/merged")
    assert away(load, "me/merged", task) == load(merged, task)
    if task == "one":
        assert f"me/merged/task_heads/two/{WEIGHTS}" not in hub.served


def test_a_pushed_merge_loads_while_the_hub_is_down_once_it_is_cached(hub: FakeHub, away: Away, merged: Path) -> None:
    away(upload, merged, "me/merged")
    first = away(load, "me/merged", "one")
    hub.stop()
    assert away(load, "me/merged", "one") == first
    with pytest.raises(hf_fda.InputError, match=r"me/merged.*two"):
        away(load, "me/merged", "two")


def test_a_revision_pins_what_is_loaded(
    hub: FakeHub, away: Away, merged: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    away(upload, merged, "me/merged")
    first = commit_of(hub, "me/merged")
    other = merge(str(folders["base-v1"]), {"one": folders["one"]}, tmp_path / "other")
    away(upload, other, "me/merged")
    assert away(load, f"me/merged@{first}", "one") == away(load, "me/merged", "one", first) == load(merged, "one")
    assert away(load, "me/merged", "one") == load(other, "one") != load(merged, "one")


def test_loading_an_unknown_task_from_the_hub_lists_the_known_ones(hub: FakeHub, away: Away, merged: Path) -> None:
    away(upload, merged, "me/merged")
    with pytest.raises(hf_fda.InputError, match=r"me/merged: .*'tow'.*did you mean 'two'"):
        away(load, "me/merged", "tow")


def test_pushing_a_merge_again_removes_what_it_no_longer_has(
    hub: FakeHub, away: Away, folders: dict[str, Path], tmp_path: Path
) -> None:
    base, sources = str(folders["base-v1"]), {name: folders[name] for name in SOURCES}
    sharded = merge(base, sources, tmp_path / "sharded", max_shard_bytes=200_000)
    away(upload, sharded, "me/merged")
    assert "model.safetensors.index.json" in hub.files("me/merged")
    whole = merge(base, {"one": folders["one"]}, tmp_path / "whole")
    away(upload, whole, "me/merged")
    assert {name for name in hub.files("me/merged") if name.endswith(".safetensors")} == set(contents(whole))
    assert away(load, "me/merged", "one") == load(whole, "one")


def test_the_push_command_prints_the_address(hub: FakeHub, away: Away, merged: Path) -> None:
    for _ in range(2):  # the second time the repository is there and nothing has changed
        status, said, complained = away(command, "push", str(merged), "me/merged")
        assert (status, complained) == (0, "")
        assert said == f"{hub.endpoint}/me/merged/commit/{commit_of(hub, 'me/merged')}\n"
    assert not hub.repositories["models", "me/merged"].private


def test_a_push_to_a_revision_makes_that_branch(hub: FakeHub, away: Away, merged: Path) -> None:
    status, _, complained = away(command, "push", str(merged), "me/merged", "--revision", "try-2", "--private")
    assert (status, complained) == (0, "")
    assert hub.repositories["models", "me/merged"].private
    assert WEIGHTS in hub.files("me/merged", "try-2")
    assert WEIGHTS not in hub.files("me/merged")
    assert away(load, "me/merged@try-2", "two") == load(merged, "two")


def test_a_push_uses_the_token_that_it_is_given(hub: FakeHub, away: Away, merged: Path) -> None:
    away(upload, merged, "me/merged", token="hf_another")
    assert hub.tokens == {"hf_another"}


def test_a_folder_that_is_no_finished_merge_is_not_pushed(
    hub: FakeHub, away: Away, merged: Path, folders: dict[str, Path]
) -> None:
    (merged / "config.json").unlink()
    for folder in (merged, folders["base"]):
        with pytest.raises(hf_fda.InputError, match=f"{folder}: neither a finished merge nor anchors"):
            away(upload, folder, "me/merged")
        status, said, complained = away(command, "push", str(folder), "me/merged")
        assert (status, said) == (2, "")
        assert complained.startswith(f"hf-fda: {folder}: neither")
    assert ("models", "me/merged") not in hub.repositories
    assert not hub.asked


@pytest.mark.parametrize("id", ["me/na me", "me/a/b", "me--x"])
def test_a_push_to_what_is_no_hub_name_is_refused(id: str, hub: FakeHub, away: Away, merged: Path) -> None:
    with pytest.raises(hf_fda.InputError, match=id):
        away(upload, merged, id)
    assert not hub.asked


def test_a_push_to_a_hub_that_is_down_says_so(hub: FakeHub, away: Away, merged: Path) -> None:
    hub.stop()
    with pytest.raises(HFFDAError, match="me/merged"):
        away(upload, merged, "me/merged")
    status, said, complained = away(command, "push", str(merged), "me/merged")
    assert status in (1, 2)
    assert not said
    assert complained.startswith("hf-fda: ") and "me/merged" in complained
    assert complained.count("\n") == 1


def test_a_push_that_the_hub_refuses_says_so(hub: FakeHub, away: Away, merged: Path) -> None:
    hub.read_only = True
    with pytest.raises(HFFDAError, match=r"me/merged.*hf auth login"):
        away(upload, merged, "me/merged")


# -- anchors as datasets ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def anchors(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Anchors folders of both sources."""
    folder = tmp_path_factory.mktemp("anchors")
    for name in SOURCES:
        where, output = folders[name], folder / name
        hf_fda.FunctionalDualAnchors.construct(
            folders["base-v1"], where, device="cpu", output=output, quiet=True, **ANCHORS
        )
    return {name: folder / name for name in SOURCES}


def local_anchors(folder: Path) -> dict[str, list[Any]]:
    opened = hf_fda.FunctionalDualAnchors.from_pretrained(folder)
    return {block: facts_of(opened[block]) for block in opened}


def test_pushed_anchors_are_a_dataset_that_is_read_block_by_block(
    hub: FakeHub, away: Away, anchors: dict[str, Path]
) -> None:
    address = away(anchors_pushed, anchors["one"], "me/anchors")
    sha = commit_of(hub, "me/anchors", kind="datasets")
    assert address == f"{hub.endpoint}/datasets/me/anchors/commit/{sha}"
    files = {f"blocks/{block}.safetensors" for block in BLOCKS}
    names = set(hub.files("me/anchors", kind="datasets")) - {".gitattributes"}
    assert names == {"README.md", "anchors.json", "anchors.png", "index/anchors.parquet", *files}

    local = local_anchors(anchors["one"])
    assert away(anchors_opened, "me/anchors") == (BLOCKS, {})
    assert set(hub.served) == {"me/anchors/anchors.json"}
    assert away(anchors_opened, "me/anchors", BLOCKS[1]) == (BLOCKS, {BLOCKS[1]: local[BLOCKS[1]]})
    assert set(hub.served) == {"me/anchors/anchors.json", f"me/anchors/blocks/{BLOCKS[1]}.safetensors"}
    assert away(anchors_opened, "me/anchors", *BLOCKS) == (BLOCKS, local)


def test_a_revision_pins_anchors(hub: FakeHub, away: Away, anchors: dict[str, Path]) -> None:
    away(anchors_pushed, anchors["one"], "me/anchors")
    first = commit_of(hub, "me/anchors", kind="datasets")
    away(anchors_pushed, anchors["two"], "me/anchors")
    one, two = (BLOCKS, local_anchors(anchors["one"])), (BLOCKS, local_anchors(anchors["two"]))
    assert away(anchors_opened, f"me/anchors@{first}", *BLOCKS) == one
    assert away(anchors_opened, "me/anchors", *BLOCKS, revision=first) == one
    assert away(anchors_opened, "me/anchors", *BLOCKS) == two != one


def test_the_push_command_makes_an_anchors_folder_a_dataset(hub: FakeHub, away: Away, anchors: dict[str, Path]) -> None:
    status, said, _ = away(command, "push", str(anchors["one"]), "me/anchors")
    sha = commit_of(hub, "me/anchors", kind="datasets")
    assert (status, said) == (0, f"{hub.endpoint}/datasets/me/anchors/commit/{sha}\n")
    assert not any(name.startswith(".cache/") for name in hub.files("me/anchors", kind="datasets"))
    assert away(anchors_opened, "me/anchors", *BLOCKS) == (BLOCKS, local_anchors(anchors["one"]))


def test_anchors_from_the_hub_merge_as_those_of_the_folders_do(
    hub: FakeHub, away: Away, anchors: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, folder in anchors.items():
        away(anchors_pushed, folder, f"me/{name}")
    pulled = away(merge_anchors, "org/base@v1", ["me/one", "me/two"], tmp_path / "pulled")
    local = merge_anchors(str(folders["base-v1"]), [str(folder) for folder in anchors.values()], tmp_path / "local")
    assert contents(pulled) == contents(local)


def test_a_merge_of_anchors_from_the_hub_is_made_again_from_its_record(
    hub: FakeHub, away: Away, anchors: dict[str, Path], tmp_path: Path
) -> None:
    away(anchors_pushed, anchors["one"], "me/one")
    first = away(merge_anchors, "org/base@v1", ["me/one"], tmp_path / "first")
    recorded = yaml.safe_load((first / "merge_config.yaml").read_text(encoding="utf-8"))
    assert recorded["sources"]["task0"].endswith(f"me/one@{commit_of(hub, 'me/one', kind='datasets')}")
    metadata = yaml.safe_load((first / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert metadata["base_model"] == ["org/base"]  # models only
    assert metadata["datasets"] == ["me/one"]
    away(anchors_pushed, anchors["two"], "me/one")
    words = ("merge", str(first / "merge_config.yaml"), "--output", str(tmp_path / "again"), "--quiet")
    assert away(command, *words) == (0, "", "")
    assert contents(tmp_path / "again") == contents(first)


def test_cached_anchors_are_read_while_the_hub_is_down_and_offline(
    hub: FakeHub, away: Away, offline: Away, anchors: dict[str, Path]
) -> None:
    away(anchors_pushed, anchors["one"], "me/anchors")
    first = away(anchors_opened, "me/anchors", *BLOCKS)
    assert offline(anchors_opened, "me/anchors", *BLOCKS) == first
    hub.stop()
    assert away(anchors_opened, "me/anchors", *BLOCKS) == first


def test_anchors_that_cannot_be_had_are_refused_by_name(
    hub: FakeHub, away: Away, offline: Away, anchors: dict[str, Path]
) -> None:
    away(anchors_pushed, anchors["one"], "me/anchors")
    hub.publish("me/others", anchors["one"] / "blocks", kind="datasets")
    for id, why in {
        "me/nothing": "no such",
        "me/others": "anchors.json",
        "me/anchors@v7": "no .*revision",
        "no/such/folder": "no such folder",
    }.items():
        with pytest.raises(hf_fda.InputError, match=f"{id}: .*{why}"):
            away(anchors_opened, id)
    with pytest.raises(hf_fda.InputError, match=r"me/anchors: .*HF_HUB_OFFLINE"):
        offline(anchors_opened, "me/anchors")
    hub.repositories["datasets", "me/anchors"].gated = True
    with pytest.raises(hf_fda.InputError, match=r"me/anchors: .*gated.*hf auth login"):
        away(anchors_opened, "me/anchors")
    hub.stop()
    with pytest.raises(hf_fda.InputError, match=r"me/unseen: .*Hub cannot be asked.*[Cc]onnect"):
        away(anchors_opened, "me/unseen")


@pytest.fixture(scope="module")
def skills(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Anchors folders of both sources with all that goes beside them."""
    folder = tmp_path_factory.mktemp("skills")
    for name in SOURCES:
        anchors_constructed(str(folders["base-v1"]), str(folders[name]), folder / name)
    return {name: folder / name for name in SOURCES}


def test_a_pushed_skill_is_merged_as_the_source_itself(
    hub: FakeHub, away: Away, skills: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, folder in skills.items():
        away(anchors_pushed, folder, f"me/{name}")
    assert {"rest.safetensors", "task_head/model.safetensors", "task_head/config.json"} < set(
        hub.files("me/one", kind="datasets")
    )
    how = {"initial": "base", "parametrization": "parameters", "epochs": 2, "data": "anchors", **ANCHORS}
    del hub.repositories["models", "org/one"], hub.repositories["models", "org/two"]
    pulled = away(
        merge, "org/base@v1", {name: f"datasets/me/{name}" for name in SOURCES}, tmp_path / "a", method="fda", **how
    )
    whole = merge(
        str(folders["base-v1"]), {name: folders[name] for name in SOURCES}, tmp_path / "b", method="fda", **how
    )
    assert {name for name in contents(pulled) if "anchors" not in name} == set(contents(whole))
    assert contents(pulled) == contents(whole)
    assert away(load, pulled, "two")["class"] == "BertForSequenceClassification"


def test_a_plan_of_anchors_on_the_hub_fetches_headers_only(
    hub: FakeHub, away: Away, skills: dict[str, Path], tmp_path: Path
) -> None:
    away(anchors_pushed, skills["one"], "me/one")
    away(plan, "org/base@v1", {"one": "me/one"}, tmp_path / "out")
    rest = len(hub.files("me/one", kind="datasets")["rest.safetensors"])
    assert hub.served["me/one/rest.safetensors"] < rest
    assert not any(name.startswith("me/one/blocks") for name in hub.served)


def test_anchors_record_the_models_on_the_hub_and_their_licences(hub: FakeHub, away: Away, tmp_path: Path) -> None:
    said = away(anchors_constructed, "org/base@v1", "org/one", tmp_path / "anchors")
    assert said["base"]["id"] == "org/base"
    assert said["base"]["commit"] == commit_of(hub, "org/base", "v1")
    assert said["source"]["licences"] == ["apache-2.0"]
    card = (tmp_path / "anchors/README.md").read_text(encoding="utf-8")
    assert f'fda.merge("org/base@{commit_of(hub, "org/base", "v1")}"' in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"


def test_anchors_of_another_commit_of_the_base_are_refused_unless_forced(
    hub: FakeHub, away: Away, tmp_path: Path
) -> None:
    away(anchors_constructed, "org/base@v1", "org/one", tmp_path / "anchors")
    away(anchors_pushed, tmp_path / "anchors", "me/one")
    with pytest.raises(hf_fda.InputError, match=r"'task0'.*another revision of the base: on 'org/base@.*force=True"):
        away(merge_anchors, "org/base", ["me/one"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    away(merge_anchors, "org/base", ["me/one"], tmp_path / "merged", force=True)
    away(merge_anchors, "org/base@v1", ["me/one"], tmp_path / "right")


def test_datasets_read_pushed_anchors_as_a_table(hub: FakeHub, away: Away, skills: dict[str, Path]) -> None:
    away(anchors_pushed, skills["one"], "me/one")
    first = commit_of(hub, "me/one", kind="datasets")
    index = hf_fda.FunctionalDualAnchors.from_pretrained(skills["one"]).index
    away(anchors_pushed, skills["two"], "me/one")
    assert away(anchors_table, "me/one", first) == index
    assert away(anchors_table, "me/one") == hf_fda.FunctionalDualAnchors.from_pretrained(skills["two"]).index


def test_a_push_of_anchors_takes_what_the_hub_takes(hub: FakeHub, away: Away, skills: dict[str, Path]) -> None:
    away(anchors_pushed, skills["one"], "me/one", private=True, token="hf_other", commit_message="First", revision="v2")
    assert hub.repositories["datasets", "me/one"].private
    assert "hf_other" in hub.tokens
    assert hub.messages[-1] == "First"
    assert away(anchors_opened, "me/one", revision="v2")[0] == BLOCKS
    address = away(anchors_pushed, skills["one"], "me/one", create_pr=True)
    assert address == f"{hub.endpoint}/datasets/me/one/discussions/1"
    assert "anchors.json" not in hub.files("me/one", kind="datasets")
    assert "anchors.json" in hub.files("me/one", "refs/pr/1", kind="datasets")
    words = ("push", str(skills["one"]), "me/two", "--commit-message", "Second", "--create-pr")
    assert away(command, *words)[0] == 0
    assert hub.messages[-1] == "Second"


def test_anchors_are_pushed_in_half_precision(
    hub: FakeHub, away: Away, anchors: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    away(anchors_pushed, anchors["one"], "me/one", dtype="bfloat16", base=str(folders["base-v1"]))
    sizes = {block: len(hub.files("me/one", kind="datasets")[f"blocks/{block}.safetensors"]) for block in BLOCKS}
    for block, size in sizes.items():
        assert size < (anchors["one"] / f"blocks/{block}.safetensors").stat().st_size
    card = hub.files("me/one", kind="datasets")["README.md"].decode()
    assert 'from_pretrained("me/one")' in card
    assert "What storing them as bfloat16 does to a merge" in card


def test_anchors_on_the_hub_show_their_names_without_fetching_more(
    hub: FakeHub, away: Away, anchors: dict[str, Path]
) -> None:
    away(anchors_pushed, anchors["one"], "me/one")
    text, html = away(anchors_shown, "me/one")
    assert all(block in text and block in html for block in BLOCKS)
    assert {name for name, size in hub.served.items() if size} == {
        "me/one/anchors.json",
        "me/one/index/anchors.parquet",
    }


def test_the_whole_of_a_hub_model_equals_its_file(hub: FakeHub, away: Away, folders: dict[str, Path]) -> None:
    stored = {name: hash_of(tensor) for name, tensor in load_file(folders["base"] / WEIGHTS).items()}
    assert away(tensors, "org/base", *stored) == stored


# -- rows of data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(hub: FakeHub, home: Path, tmp_path: Path) -> dict[str, Any]:
    """A classifier with a tokenizer, and a dataset org/rows of two configurations; what `rows_of` is called with."""
    shutil.rmtree(home / "datasets", ignore_errors=True)
    tokenizer = wordpiece(tmp_path / "words", ["fox", "dog"])
    for name in ("base", "one"):
        model = t.BertForSequenceClassification(t.BertConfig(**TEXT, max_position_embeddings=40))
        save(tmp_path / name, model, tokenizer)
    parts = {"train": ("first", 8), "test": ("first", 3), "validation": ("second", 2)}
    for split, (folder, count) in parts.items():
        (tmp_path / "rows" / folder).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": "fox " * (number + 1), "label": 0}) for number in range(count)]
        (tmp_path / "rows" / folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    configs = [
        {
            "config_name": name,
            "data_files": [
                {"split": split, "path": f"{name}/{split}.jsonl"}
                for split, (folder, _) in parts.items()
                if folder == name
            ],
        }
        for name in ("first", "second")
    ]
    (tmp_path / "rows" / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n", encoding="utf-8")
    hub.publish("org/rows", tmp_path / "rows", kind="datasets")
    return {"base": str(tmp_path / "base"), "sources": {"one": str(tmp_path / "one")}}


def test_rows_of_a_dataset_on_the_hub_are_recorded_with_its_commit(
    rows: dict[str, Any], hub: FakeHub, away: Away, offline: Away
) -> None:
    found = away(rows_of, **rows, data={"one": "org/rows:first"}, rows=5)["one"]
    assert found.pop("found") == found.pop("expected") == 5
    commit = commit_of(hub, "org/rows", kind="datasets")
    known = {"path": "org/rows", "name": "first", "revision": commit, "split": "train", "columns": ["text"]}
    assert found == {**known, "max_length": 40, "rows": 5, "fingerprint": found["fingerprint"]}
    hub.repositories["datasets", "org/rows"].commit({"README.md": b"moved on"}, "main")
    for call in (away, offline):
        again = call(rows_of, **rows, data={"one": found})["one"]
        assert {name: again[name] for name in found} == found
    cached = offline(rows_of, **rows, data={"one": "org/rows:first"})["one"]
    assert cached["revision"] == commit and cached["found"] == 8


def test_a_stream_of_a_dataset_on_the_hub_is_read_from_its_start(
    rows: dict[str, Any], hub: FakeHub, away: Away
) -> None:
    data = {"one": {"path": "org/rows", "name": "second", "stream": True}}
    assert away(rows_of, **rows, data=data, rows=1)["one"]["found"] == 1
    assert {name for name in hub.served if name.endswith("jsonl")} == {"org/rows/second/validation.jsonl"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("org/nothing", "no such repository on the Hub"),
        ("org/rows@nothing", "the Hub has no such revision"),
        ("org/rows:third", "'third' not found.*first.*second"),
        ({"path": "org/rows", "name": "first", "split": "tset"}, "no split 'tset': did you mean 'test'"),
    ],
)
def test_rows_that_the_hub_does_not_have_are_refused_by_name(
    data: Any, said: str, rows: dict[str, Any], away: Away
) -> None:
    with pytest.raises(InputError, match=said):
        away(rows_of, **rows, data={"one": data})


def test_rows_that_are_not_cached_are_refused_offline(rows: dict[str, Any], hub: FakeHub, offline: Away) -> None:
    with pytest.raises(InputError, match="no such file or folder, and the Hub cannot be asked"):
        offline(rows_of, **rows, data={"one": "org/rows"})


def test_scores_on_a_dataset_of_the_hub_are_pushed_in_both_forms_and_go_with_the_weights(
    rows: dict[str, Any], hub: FakeHub, away: Away, tmp_path: Path
) -> None:
    base, sources = rows["base"], rows["sources"]
    folder = merge(base, sources, tmp_path / "merged")
    data = {"one": {"path": "org/rows:first", "label": "label"}}
    found = away(scored, folder, data)
    commit = commit_of(hub, "org/rows", kind="datasets")
    about = found["one"][1]
    assert (about.name, about.config, about.split, about.revision) == ("org/rows", "first", "train", commit)
    away(upload, folder, "me/merged")
    (entry,) = parse_eval_result_entries(yaml.safe_load(hub.files("me/merged")[".eval_results/one.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == ("org/rows", "first", commit)
    (result,) = ModelCard(hub.files("me/merged")["README.md"].decode()).data.eval_results or []
    assert (result.dataset_type, result.dataset_revision) == ("org/rows", commit)
    assert result.metric_value == entry.value == found["one"][0]["accuracy"]
    assert away(scored, "me/merged", data) == found
    away(upload, merge(base, sources, folder, scaling=0.1), "me/merged")
    assert not {"scores.json", ".eval_results/one.yaml"} & set(hub.files("me/merged"))
