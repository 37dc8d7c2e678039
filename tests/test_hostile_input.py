"""Files from strangers: names that lead elsewhere, links, bombs, sizes that are lies. Refused, with nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import FAST
from safetensors.torch import load_file, save_file

import hf_fda
from hf_fda.checkpoint.untrusted import leads_inside

Anchors = hf_fda.FunctionalDualAnchors
Library = Callable[[str], tuple[Path, list[Path]]]

DEEP = "[" * 200_000 + "]" * 200_000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
RUNS = "!!python/object/apply:os.system ['touch {}']"


@pytest.fixture(scope="module")
def made(library: Library, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, a fine-tune, and its anchors with all that goes beside them."""
    base, (source, _) = library("bert")
    folder = tmp_path_factory.mktemp("hostile") / "anchors"
    beside = {"include_rest": True, "include_head": True}
    Anchors.construct(base, source, "cpu", output=folder, quiet=True, **beside, **FAST)
    return base, source, folder


class Place:
    """A folder with anchors to spoil, and what else lies there."""

    def __init__(self, made: tuple[Path, Path, Path], root: Path) -> None:
        self.base, self.source, original = made
        self.root, self.anchors = root, root / "anchors"
        shutil.copytree(original, self.anchors, ignore=shutil.ignore_patterns(".cache"))
        self.block = self.anchors / "blocks/bert.encoder.layer.0.safetensors"

    def refused(self, *words: str, sources: Any = None, base: Any = None, **options: Any) -> None:
        """A merge is refused with all of `words` in the message, and no file is touched."""
        before = contents(self.root)
        sources = {"one": self.anchors} if sources is None else sources
        with pytest.raises(hf_fda.InputError) as caught:
            hf_fda.merge(base or self.base, sources, output=self.root / "out", device="cpu", quiet=True, **options)
        assert all(word in str(caught.value) for word in words)
        assert contents(self.root) == before

    def change_manifest(self, **facts: Any) -> None:
        path = self.anchors / "anchors.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


@pytest.fixture
def place(made: tuple[Path, Path, Path], tmp_path: Path) -> Place:
    return Place(made, tmp_path)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def write_header(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# -- names and links -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../../escaped", "/etc/passwd", "a/../../b", "..", "", "a\0b", "a\\..\\b", "C:evil"]
)
def test_blocks_whose_files_would_lie_elsewhere_are_refused(name: str, place: Place) -> None:
    place.change_manifest(units=[name])
    with pytest.raises(hf_fda.InputError, match=r"anchors\.json.*refused"):
        Anchors.from_pretrained(place.anchors)
    place.refused("anchors.json", "refused")
    assert not leads_inside(f"blocks/{name}" if name in ("", "..") or "\\" in name else name)


@pytest.mark.parametrize("file", ["anchors.json", "blocks/bert.encoder.layer.0.safetensors", "rest.safetensors"])
def test_links_out_of_an_anchors_folder_are_refused(file: str, place: Place) -> None:
    outside = place.root / "outside"
    shutil.move(place.anchors / file, outside)
    (place.anchors / file).symlink_to(outside)
    place.refused(Path(file).name, "link")


def test_links_of_the_hubs_own_cache_are_followed(place: Place) -> None:
    snapshot, blobs = place.root / "cache/snapshots/abc", place.root / "cache/blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in place.anchors.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(place.anchors)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    anchors = Anchors.from_pretrained(snapshot)
    assert anchors[anchors.blocks[0]].anchors.shape == (4, 5, 32)
    assert anchors.beside.rest is not None


# -- headers and tensors ---------------------------------------------------------------------------------------------


SHAPED = {"dtype": "F32", "shape": [4, 5, 32], "data_offsets": [0, 2560]}
HEADERS: dict[str, Any] = {
    "nested too deep": DEEP.encode(),
    "no mapping": [1, 2],
    "no text": b"\xff\xfe",
    "more than the file holds": {"anchors": SHAPED},
    "a shape of more entries": {"anchors": {**SHAPED, "shape": [10**9, 10**9], "data_offsets": [0, 64]}},
    "an infinite shape": b'{"anchors": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 64]}}',
    "a negative shape": {"anchors": {**SHAPED, "shape": [-4, 5, 32]}},
    "overlapping tensors": {"anchors": SHAPED, "targets": SHAPED},
    "offsets backwards": {"anchors": {**SHAPED, "data_offsets": [64, 0]}},
    "an unknown type": {"anchors": {**SHAPED, "dtype": "F4"}},
    "an entry that is none": {"anchors": None},
    "numbers of many digits": b'{"anchors": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("what", HEADERS)
@pytest.mark.parametrize("where", ["anchors", "rest", "source"])
def test_headers_that_lie_are_refused(where: str, what: str, place: Place) -> None:
    data = b"\0" * 64
    if where == "source":
        folder = place.root / "source"
        shutil.copytree(place.source, folder)
        write_header(folder / "model.safetensors", HEADERS[what], data)
        place.refused("model.safetensors", sources={"one": folder}, method="linear")
        return
    file = place.block if where == "anchors" else place.anchors / "rest.safetensors"
    write_header(file, HEADERS[what], data)
    place.refused(file.name)


def test_a_header_longer_than_its_file_or_than_any_may_be_is_not_read(place: Place) -> None:
    for length in (2**63, 2**40, 10**9):
        place.block.write_bytes(struct.pack("<Q", length) + b"{}" * 100)
        place.refused(place.block.name, "truncated")
    with open(place.block, "wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)
    with pytest.raises(hf_fda.InputError, match="not a safetensors file"):
        Anchors.from_pretrained(place.anchors)["bert.encoder.layer.0"]
    place.block.unlink()


@pytest.mark.parametrize(
    "words",
    [
        {"loss": "much"},
        {"steps": "1e9"},
        {"cosines": DEEP},
        {"cosines": "[1]"},
        {"left_out": "3"},
        {"rounding": '{"x": 1}'},
    ],
)
def test_words_in_a_header_that_make_no_sense_are_refused(words: dict[str, str], place: Place) -> None:
    tensors = load_file(place.block)
    save_file(tensors, place.block, metadata={"cosines": "{}", **words})
    place.refused(place.block.name, "damaged")


def test_tensors_that_do_not_belong_together_are_refused(place: Place) -> None:
    for anchors, targets in (((4, 5, 32), (3, 5, 32)), ((4, 32), (4, 32)), ((), ())):
        save_file({"anchors": torch.zeros(anchors), "targets": torch.zeros(targets)}, place.block)
        place.refused(place.block.name, "do not belong together")


def test_a_rest_that_would_change_blocks_or_shapes_is_refused(place: Place) -> None:
    for name, shape, why in (
        ("bert.encoder.layer.0.output.dense.weight", (32, 64), "outside its blocks"),
        ("no.such.tensor", (1,), "outside its blocks"),
        ("bert.embeddings.word_embeddings.weight", (9, 32), "rest='base'"),
    ):
        save_file({name: torch.zeros(shape)}, place.anchors / "rest.safetensors")
        place.refused("other tensors")
        place.change_manifest(rest=[name])
        place.refused(name, why)


def test_a_head_that_is_none_is_refused(place: Place) -> None:
    (place.anchors / "task_head/config.json").write_text("[]")
    place.refused("task_head/config.json")
    (place.anchors / "task_head/config.json").write_text(DEEP)
    place.refused("task_head/config.json", "JSON")
    (place.anchors / "task_head/config.json").unlink()
    place.refused("task_head/config.json", "missing")


@pytest.mark.parametrize(
    "file", ["rest.safetensors", "task_head/model.safetensors", "blocks/bert.encoder.layer.1.safetensors"]
)
def test_files_that_are_missing_are_named(file: str, place: Place) -> None:
    (place.anchors / file).unlink()
    place.refused(Path(file).name, "missing")
    anchors = Anchors.from_pretrained(place.anchors)
    with pytest.raises(hf_fda.InputError, match="missing"):
        assert anchors.beside and anchors["bert.encoder.layer.1"]


def test_an_index_that_is_none_is_refused(place: Place) -> None:
    (place.anchors / "index/anchors.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(hf_fda.InputError, match=r"anchors\.parquet"):
        assert Anchors.from_pretrained(place.anchors).index


# -- JSON and YAML ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [DEEP, '{"units": ' + DEEP + "}", "9" * 10_000, '{"a": 1', "\0", "[NaN]", '"x"'])
def test_json_bombs_are_refused(text: str, place: Place) -> None:
    (place.anchors / "anchors.json").write_text(text)
    place.refused("anchors.json")
    for name in ("config.json", "model.safetensors.index.json"):
        folder = place.root / "source"
        shutil.copytree(place.source, folder)
        (folder / name).write_text(text)
        place.refused(sources={"one": folder}, method="linear")
        shutil.rmtree(folder)


def test_a_json_file_of_many_bytes_is_not_read(place: Place) -> None:
    os.truncate(place.anchors / "anchors.json", 200_000_000)
    with pytest.raises(hf_fda.InputError, match="larger than 100 MB"):
        Anchors.from_pretrained(place.anchors)


@pytest.mark.parametrize(
    "facts",
    [{"units": "abc"}, {"units": [1]}, {"base": 3}, {"base": {"id": 1}}, {"dtype": "int8"}, {"rest": {}}],
)
def test_manifests_of_other_kinds_of_values_are_refused(facts: dict[str, Any], place: Place) -> None:
    place.change_manifest(**facts)
    place.refused("anchors.json" if "dtype" not in facts else "dtype")


@pytest.mark.parametrize("option", [{"unit": 5}, {"unit": ["../x"]}, {"num_tokens": "x"}, {"num_tokens": 10**9}])
def test_manifests_with_options_that_cannot_be_are_refused(option: dict[str, Any], place: Place) -> None:
    place.change_manifest(config={**Anchors.from_pretrained(place.anchors).info.config, **option})
    place.refused(next(iter(option)))


def test_a_merge_over_its_own_anchors_is_refused(place: Place) -> None:
    work = place.anchors / ".cache/huggingface/hf_fda"
    work.mkdir(parents=True)
    with pytest.raises(hf_fda.InputError, match="the anchors of 'one' themselves"):
        hf_fda.merge(place.base, {"one": place.anchors}, output=place.anchors, device="cpu", quiet=True)


@pytest.mark.parametrize("mergekit", [False, True])
@pytest.mark.parametrize(
    ("value", "why"),
    [(RUNS, "tag"), (BOMB, "aliases"), ("&x [*x]", "alias"), (DEEP, "deep"), ("2020-99-99", "."), ("!!binary x", ".")],
)
def test_yaml_that_makes_more_than_plain_values_is_refused(value: str, why: str, mergekit: bool, place: Place) -> None:
    mark = place.root / "mark"
    body = f"\n  {value.format(mark)}" if value is not BOMB else "\n  " + BOMB.replace("\n", "\n  ")
    head = f"merge_method: linear\nbase_model: {place.base}\nmodels: [{{model: {place.source}}}]\nparameters:"
    own = f"base: {place.base}\nsources: [{place.source}]\nmethod: linear\noptions:"
    config = place.root / "merge.yaml"
    config.write_text(f"{head if mergekit else own}{body}\n", encoding="utf-8")
    with pytest.raises(hf_fda.InputError, match=why):
        hf_fda.merge_config(config, place.root / "out", device="cpu", quiet=True)
    assert not mark.exists()
    assert not (place.root / "out").exists()


def test_a_card_that_is_a_bomb_states_no_licence(place: Place) -> None:
    source = place.root / "source"
    shutil.copytree(place.source, source)
    for text in (BOMB, DEEP, RUNS.format(place.root / "mark"), "&x [*x]"):
        (source / "README.md").write_text(f"---\nlicense:\n  {text}\n---\n", encoding="utf-8")
        merged = hf_fda.merge(place.base, [source], "linear", place.root / "out", device="cpu", quiet=True)
        assert "unknown" in (merged.folder / "README.md").read_text(encoding="utf-8")
    assert not (place.root / "mark").exists()
