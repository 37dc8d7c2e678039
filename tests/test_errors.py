"""Bad input: each kind is refused by name, with the way out, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from conftest import TEXT, fine_tune, make_model
from safetensors.torch import load_file, save_file

import hf_fda
from hf_fda.cli import main

FAST: dict[str, Any] = {"num_anchors": 4, "steps": 3, "epochs": 2}
Files = dict[str, tuple[int, int]]


def state(root: Path) -> Files:
    """Every file and folder below `root` with its size and time of change."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*")}


class Place:
    """A base and sources in a folder, and merges of them that must be refused."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = root / "base"
        self.source = root / "source"
        self.output = root / "merged"

    def save(self, name: str, model: Any, **options: Any) -> Path:
        """Save a model to a folder."""
        model.save_pretrained(self.root / name, **options)
        return self.root / name

    def fine_tune(self, family: str = "bert", **changes: Any) -> None:
        """Save a family's base and one fine-tune of it; `changes` are to the fine-tune's configuration."""
        base = make_model(family)
        self.save("base", base)
        self.save("source", make_model(family, seed=1, **changes) if changes else fine_tune(base, seed=1))

    def refused(self, *words: str, sources: Any = None, merge_only: bool = False, **options: Any) -> str:
        """Both `plan` and `merge` refuse, with all of `words` in the message, and no file is touched."""
        arguments = {"base": self.base, "sources": [self.source] if sources is None else sources, "method": "linear"}
        arguments |= {"output": self.output, "device": "cpu", **options}
        before = state(self.root)
        calls: list[Callable[..., Any]] = [] if merge_only else [hf_fda.plan]
        for call in [*calls, hf_fda.merge]:
            with pytest.raises(hf_fda.InputError) as caught:
                call(**arguments)
            message = str(caught.value)
            for word in words:
                assert word in message
            assert "Traceback" not in message
            assert state(self.root) == before
        return message


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A folder to spoil."""
    return Place(tmp_path)


@pytest.fixture
def pair(place: Place) -> Place:
    """A BERT classifier and a fine-tune of it, both good."""
    place.fine_tune()
    return place


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a folder's weight file in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **changes: Any) -> None:
    """Change fields of a folder's config.json."""
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, **changes}))


# -- sources that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "fda"])
def test_a_source_of_another_architecture_is_refused(method: str, place: Place) -> None:
    place.save("base", make_model("bert"))
    place.save("source", make_model("llama"))
    place.refused("source 'source'", "another architecture", "LlamaForCausalLM", "BertFor", method=method)


@pytest.mark.parametrize(("family", "other"), [("bert", "roberta"), ("llama", "mistral")])
def test_another_architecture_with_tensors_of_the_same_names_is_refused(family: str, other: str, place: Place) -> None:
    place.save("base", make_model(family))
    place.save("source", make_model(other))
    place.refused("source 'source'", "architecture", family, other)


def test_an_architecture_that_differs_in_no_tensor_is_refused(place: Place) -> None:
    place.fine_tune(num_attention_heads=2)
    place.refused("source 'source'", "num_attention_heads", "2", "4")


def test_a_source_of_another_shape_is_refused_with_both_shapes(place: Place) -> None:
    place.fine_tune(intermediate_size=48)
    place.refused(
        "source 'source'", "intermediate.dense.weight", "(48, 32)", "(64, 32)", "fine-tuned from this very base"
    )


def test_a_source_of_another_width_is_refused(place: Place) -> None:
    place.fine_tune("llama", hidden_size=16)
    place.refused("source 'source'", "embed_tokens", "(99, 16)", "(99, 32)")


def test_a_source_with_fewer_layers_is_refused(place: Place) -> None:
    place.fine_tune(num_hidden_layers=1)
    place.refused("source 'source'", "lacks 16", "encoder.layer.1.", "no fine-tune")


def test_a_source_with_more_layers_is_refused(place: Place) -> None:
    place.fine_tune(num_hidden_layers=3)
    place.refused("source 'source'", "16 tensors", "encoder.layer.2.", "no fine-tune")


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "qwen2"])
def test_a_source_of_another_vocabulary_is_refused_with_the_way_out(family: str, place: Place) -> None:
    place.fine_tune(family, vocab_size=120)
    place.refused("source 'source'", "vocabulary of 120", "99", "resize_token_embeddings")


@pytest.mark.parametrize(
    ("gone", "word"),
    [
        ("bert.encoder.layer.1.output.dense.weight", "encoder.layer.1.output.dense.weight"),
        ("bert.embeddings.word_embeddings.weight", "word_embeddings.weight"),
    ],
)
def test_a_source_that_lacks_tensors_is_refused_by_their_names(gone: str, word: str, pair: Place) -> None:
    rewrite(pair.source, lambda tensors: tensors.pop(gone))
    pair.refused("source 'source'", "lacks 1", word)


@pytest.mark.parametrize(
    ("gone", "word"),
    [
        ("bert.encoder.layer.1.output.dense.weight", "encoder.layer.1.output.dense.weight"),
        ("bert.embeddings.word_embeddings.weight", "word_embeddings.weight"),
    ],
)
def test_a_base_that_lacks_tensors_is_refused_by_their_names(gone: str, word: str, pair: Place) -> None:
    rewrite(pair.base, lambda tensors: tensors.pop(gone))
    pair.refused("base", "lacks 1", word)


def test_a_source_without_any_block_is_refused(pair: Place) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".encoder." in name]:
            del tensors[name]

    rewrite(pair.source, shorten)
    pair.refused("source 'source'", "lacks 32", "encoder.layer.0.")


def test_a_source_with_nothing_in_common_is_refused(pair: Place) -> None:
    save_file({"something.else": torch.zeros(2)}, pair.source / "model.safetensors", metadata={"format": "pt"})
    pair.refused("source 'source'", str(pair.source))


def test_a_mixture_of_heads_that_has_no_place_is_refused(place: Place) -> None:
    base = make_model("llama")
    place.save("base", base.model)
    place.save("one", base)
    tuned = fine_tune(base, seed=1)
    place.save("two", tuned.model)
    place.refused("'one'", "lm_head.weight", "'two'", sources=[place.root / "one", place.root / "two"])


@pytest.mark.parametrize("method", ["linear", "fda"])
def test_a_source_equal_to_the_base_is_warned_of(method: str, pair: Place, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(pair.base, pair.root / "copy")
    sources = [pair.source, pair.root / "copy"]
    options = FAST if method == "fda" else {}
    notes = hf_fda.plan(pair.base, sources, method, pair.output, device="cpu", **options).notes
    with caplog.at_level("INFO", logger="hf_fda"):
        hf_fda.merge(pair.base, sources, method, pair.output, device="cpu", **options)
    said = "\n".join([*notes, *(record.getMessage() for record in caplog.records)])
    assert re.search(r"'copy'[^\n]*(equal|same|identical)", said)
    assert not re.search(r"'source'[^\n]*(equal|same|identical)", said)


# -- sources as arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [[], {}])
def test_no_sources_are_refused(nothing: Any, pair: Place) -> None:
    pair.refused("no sources", "at least one", sources=nothing)


@pytest.mark.parametrize("wrong", ["source", 5, None])
def test_sources_that_are_no_list_are_refused(wrong: Any, pair: Place) -> None:
    with pytest.raises(hf_fda.InputError, match=r"sources must be a list.*mapping"):
        hf_fda.merge(pair.base, wrong, "linear", pair.output)
    assert not pair.output.exists()


def test_two_sources_of_one_name_are_refused_with_the_way_out(pair: Place) -> None:
    shutil.copytree(pair.source, pair.root / "other/source")
    both = [pair.source, pair.root / "other/source"]
    pair.refused("two sources are named 'source'", "sources={", "--source first=", sources=both)


@pytest.mark.parametrize("name", ["a/b", "..", "", "-x", "a b", ".hidden"])
def test_a_source_name_that_cannot_be_a_folder_is_refused(name: str, pair: Place) -> None:
    pair.refused(f"source name '{name}'", "letters", sources={name: pair.source})


@pytest.mark.parametrize("wrong", [5, None, torch.nn.Linear(2, 2)])
def test_a_source_that_is_no_model_is_refused(wrong: Any, pair: Place) -> None:
    pair.refused("source 'x'", "folder, a Hub id or a transformers model", type(wrong).__name__, sources={"x": wrong})


def test_a_model_without_real_weights_is_refused(pair: Place) -> None:
    with torch.device("meta"):
        model = t.BertForSequenceClassification(t.BertConfig(**TEXT, max_position_embeddings=40))
    pair.refused("source 'x'", "no real weights", sources={"x": model})


def test_a_folder_that_does_not_exist_is_refused(pair: Place) -> None:
    pair.refused("source 'nowhere'", str(pair.root / "nowhere"), "no such folder", sources=[pair.root / "nowhere"])
    pair.refused("base", "no such folder", base=pair.root / "nowhere")


def test_a_hub_id_that_cannot_be_asked_for_is_refused(pair: Place) -> None:
    pair.refused("base", "nobody/nothing-of-the-kind", "no such folder", base="nobody/nothing-of-the-kind")


def test_a_file_instead_of_its_folder_is_refused(pair: Place) -> None:
    pair.refused("source", "is a file", "folder it lies in", sources=[pair.source / "model.safetensors"])


# -- damaged checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["base", "source"])
@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(role: str, left: int, pair: Place) -> None:
    path = pair.root / role / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    pair.refused(role, str(path), "truncated", "again")


def test_a_truncated_shard_is_refused_by_name(place: Place) -> None:
    base = make_model("llama")
    place.save("base", base)
    place.save("source", fine_tune(base, 1), max_shard_size="20KB")
    shard = sorted(place.source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    place.refused("source 'source'", shard.name, "truncated")


def with_header(path: Path, header: bytes) -> None:
    """Replace a safetensors file's header, keeping its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return dict(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))


@pytest.mark.parametrize("header", [b"{not json", b"[]", b"5", b"null", b'{"a": 5}', b'{"a": {}}', b"\xff\xfe{}"])
def test_a_corrupt_header_is_refused(header: bytes, pair: Place) -> None:
    path = pair.source / "model.safetensors"
    with_header(path, header)
    pair.refused("source 'source'", str(path), "again")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [3, 3]),
        ("shape", "wide"),
        ("shape", [-99, 32]),
        ("shape", ["a"]),
        ("data_offsets", [0, 4]),
        ("data_offsets", ["a", "b"]),
        ("data_offsets", [1]),
        ("data_offsets", None),
        ("dtype", None),
        ("dtype", ["F32"]),
        ("dtype", "F4"),
    ],
)
def test_a_corrupt_entry_of_the_header_is_refused_by_the_name_of_its_tensor(
    field: str, value: Any, pair: Place
) -> None:
    path, name = pair.source / "model.safetensors", "bert.embeddings.word_embeddings.weight"
    header = header_of(path)
    header[name][field] = value
    with_header(path, json.dumps(header).encode())
    pair.refused("source 'source'", str(path), name)


def test_tensors_that_share_bytes_are_refused(pair: Place) -> None:
    path = pair.source / "model.safetensors"
    header = header_of(path)
    key, query = (f"bert.encoder.layer.0.attention.self.{name}.weight" for name in ("key", "query"))
    header[query]["data_offsets"] = header[key]["data_offsets"]
    with_header(path, json.dumps(header).encode())
    pair.refused("source 'source'", str(path))


def test_a_file_that_is_something_else_is_refused(pair: Place) -> None:
    (pair.source / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(1000))
    pair.refused("source 'source'", "model.safetensors")


@pytest.fixture
def sharded(place: Place) -> Place:
    """A base, and a source in shards."""
    base = make_model("llama")
    place.save("base", base)
    place.save("source", fine_tune(base, 1), max_shard_size="20KB")
    return place


def set_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "outside", ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "sub/x.safetensors", ".."]
)
def test_an_index_that_names_a_file_outside_the_folder_is_refused(outside: str, sharded: Place) -> None:
    shutil.copyfile(sharded.base / "model.safetensors", sharded.root / "x.safetensors")
    set_index(sharded.source, lambda index: index["weight_map"].update({"model.norm.weight": outside}))
    sharded.refused("source 'source'", "model.safetensors.index.json", f"'{outside}'", "outside")


def test_an_index_that_names_a_missing_file_is_refused(sharded: Place) -> None:
    gone = sorted(sharded.source.glob("*.safetensors"))[0]
    gone.unlink()
    sharded.refused("source 'source'", "model.safetensors.index.json", gone.name, "missing")


@pytest.mark.parametrize(
    "index", ["{", "[]", "5", "{}", '{"weight_map": []}', '{"weight_map": {"a": null}}', '{"weight_map": {"a": 5}}']
)
def test_a_corrupt_index_is_refused(index: str, sharded: Place) -> None:
    (sharded.source / "model.safetensors.index.json").write_text(index)
    sharded.refused("source 'source'", "model.safetensors.index.json")


def test_a_shard_that_lacks_what_the_index_promises_is_refused(sharded: Place) -> None:
    shard = next(
        path for path in sharded.source.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(path)
    )
    tensors = {name: value for name, value in load_file(shard).items() if name != "model.embed_tokens.weight"}
    save_file(tensors or {"other": torch.zeros(1)}, shard, metadata={"format": "pt"})
    sharded.refused("source 'source'", "model.embed_tokens.weight")


@pytest.mark.parametrize("role", ["base", "source"])
def test_a_checkpoint_of_pickles_is_refused_with_the_way_to_convert_it(role: str, pair: Place) -> None:
    folder = pair.root / role
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch unpickled'\ntR.")
    pair.refused(role, "pickled", "never opened", "save_pretrained")


def test_a_pickle_beside_safetensors_is_not_opened(pair: Place) -> None:
    (pair.source / "pytorch_model.bin").write_bytes(b"not even a pickle")
    merged = hf_fda.merge(pair.base, [pair.source], "linear", pair.output, quiet=True)
    assert (merged.folder / "config.json").is_file()
    assert not (merged.folder / "pytorch_model.bin").exists()


def test_an_adapter_as_the_base_is_refused(pair: Place) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model("bert"), LoraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(pair.root / "adapter")
    pair.refused("base", "PEFT adapter", "an adapter is a source", base=pair.root / "adapter")


def test_a_folder_without_weights_is_refused(pair: Place) -> None:
    (pair.source / "model.safetensors").unlink()
    pair.refused("source 'source'", "no model.safetensors")


@pytest.mark.parametrize("role", ["base", "source"])
def test_a_folder_without_config_is_refused(role: str, pair: Place) -> None:
    (pair.root / role / "config.json").unlink()
    pair.refused(role, str(pair.root / role), "no config.json")


@pytest.mark.parametrize(
    "text", ["{", "", "[]", "5", '{"model_type": "nothing-known"}', "{}", '{"hidden_size": "wide"}']
)
def test_a_corrupt_config_is_refused(text: str, pair: Place) -> None:
    (pair.source / "config.json").write_text(text)
    pair.refused("source 'source'", str(pair.source), "config.json")


def test_a_class_that_transformers_does_not_know_is_refused(pair: Place) -> None:
    set_config(pair.source, architectures=["BertForTelepathy"])
    pair.refused("source 'source'", "BertForTelepathy", "update transformers")


def test_code_that_comes_with_a_checkpoint_is_not_run_unless_trusted(pair: Place) -> None:
    (pair.source / "own.py").write_text("raise RuntimeError('ran')")
    set_config(pair.source, architectures=["OwnBert"], auto_map={"AutoModel": "own.OwnBert"})
    pair.refused("source 'source'", "OwnBert", "trust_remote_code=True")


def test_a_quantised_checkpoint_is_refused(pair: Place) -> None:
    set_config(pair.source, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    pair.refused("source 'source'", "quantised", "quantised from")


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv", "fda"])
def test_a_source_that_is_not_finite_stops_the_merge_and_leaves_nothing_finished(method: str, pair: Place) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    rewrite(pair.source, lambda tensors: tensors[name].view(-1)[5].fill_(float("nan")))
    options = FAST if method == "fda" else {}
    with pytest.raises(hf_fda.RunError, match=r"encoder\.layer\.1"):
        hf_fda.merge(pair.base, [pair.source], method, pair.output, device="cpu", quiet=True, **options)
    assert not (pair.output / "config.json").exists()
    assert not list(pair.output.glob("*.safetensors"))


# -- the output ------------------------------------------------------------------------------------------------------


def test_an_output_that_holds_something_else_is_refused(pair: Place) -> None:
    pair.output.mkdir()
    (pair.output / "diary.txt").write_text("mine")
    pair.refused(f"output '{pair.output}'", "something else", "new or empty")


def test_an_output_that_is_a_file_is_refused(pair: Place) -> None:
    pair.output.write_text("mine")
    pair.refused(f"output '{pair.output}'", "is a file", "folder")


@pytest.mark.parametrize("role", ["base", "source"])
def test_a_checkpoint_as_the_output_is_refused(role: str, pair: Place) -> None:
    pair.refused("output", str(pair.root / role), output=pair.root / role)


@pytest.mark.parametrize("role", ["base", "source"])
def test_an_earlier_merge_is_not_merged_into_itself(role: str, pair: Place) -> None:
    earlier = hf_fda.merge(pair.base, [pair.source], "linear", pair.root / "earlier", quiet=True).folder
    base, sources = (earlier, [pair.source]) if role == "base" else (pair.base, [earlier])
    pair.refused("output", str(earlier), base=base, sources=sources, output=earlier)


def test_an_empty_folder_is_a_good_output(pair: Place) -> None:
    pair.output.mkdir()
    hf_fda.merge(pair.base, [pair.source], "linear", pair.output, quiet=True)
    assert (pair.output / "config.json").is_file()


@pytest.mark.parametrize("method", ["linear", "fda"])
def test_a_full_disk_is_refused_with_both_sizes(method: str, pair: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(pair.root))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 9_000, 1_000))
    options = FAST if method == "fda" else {}
    pair.refused(
        f"output '{pair.output}'", "no space", "1.0 kB free", "make room", merge_only=True, method=method, **options
    )


def test_an_output_that_cannot_be_made_stops_the_merge_with_its_name(pair: Place) -> None:
    (pair.root / "file").write_text("")
    with pytest.raises(hf_fda.HFFDAError, match=re.escape(str(pair.root / "file/merged"))):
        hf_fda.merge(pair.base, [pair.source], "linear", pair.root / "file/merged", quiet=True)


# -- methods and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("task_aritmetic", {}, ["no method 'task_aritmetic'", "did you mean 'task_arithmetic'"]),
        ("", {}, ["no method ''", "Known: "]),
        (5, {}, ["registered name or a config object", "int"]),
        ("task_arithmetic", {"scalling": 1}, ["no option 'scalling'", "did you mean 'scaling'"]),
        ("task_arithmetic", {"scaling": "much"}, ["'scaling'", "a number", "'much'"]),
        ("task_arithmetic", {"scaling": float("nan")}, ["'scaling'", "a number"]),
        ("task_arithmetic", {"weights": [1, 2]}, ["weights", "2 given for 1 sources", "source"]),
        ("task_arithmetic", {"weights": {"sauce": 1}}, ["no source 'sauce'", "did you mean 'source'"]),
        ("linear", {"weights": [0]}, ["linear", "weights sum to zero", "normalize=False"]),
        ("tsv", {"rank_fraction": 2}, ["'rank_fraction'", "at most 1"]),
        ("wudi", {"solver": "magic"}, ["'solver'", "'iterative' or 'closed_form'", "'magic'"]),
        ("fda", {"step": 3}, ["no option 'step'", "did you mean 'steps'"]),
        ("fda", {"scaling": 3}, ["no option 'scaling'", "initial=METHOD"]),
        ("fda", {"initial": "tvs"}, ["no method 'tvs'", "did you mean 'tsv'"]),
        ("fda", {"initial": "fda"}, ["initial", "parameter-space method"]),
        ("fda", {"initial": "tsv", "scalling": 3}, ["'tsv'", "option 'scalling'", "did you mean 'scaling'"]),
        ("fda", {"initial": {"method": "tsv", "scalling": 3}}, ["'tsv'", "no option 'scalling'"]),
        ("fda", {"rest": "liner"}, ["no method 'liner'", "did you mean 'linear'"]),
        ("fda", {"initialization": "weight"}, ["'initialization'", "'weights' or 'gaussian'"]),
        ("fda", {"distance": "l2"}, ["'distance'", "'cosine'", "'l2'"]),
        ("fda", {"num_anchors": 0}, ["'num_anchors'", "at least 1", "0"]),
        ("fda", {"num_anchors": 2.5}, ["'num_anchors'", "a whole number"]),
        ("fda", {"unit": "atention"}, ["unit", "no submodule 'atention'", "did you mean 'attention'"]),
        ("fda", {"unit": ["block", "attention"]}, ["unit", "overlap"]),
        ("fda", {"unit": []}, ["unit"]),
    ],
)
def test_a_wrong_method_or_option_is_refused_and_the_nearest_suggested(
    method: Any, options: dict[str, Any], words: list[str], pair: Place
) -> None:
    pair.refused(*words, method=method, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float23"}, ["dtype 'float23'", "did you mean 'float"]),
        ({"dtype": torch.float32}, ["dtype"]),
        ({"heads": "marge"}, ["heads 'marge'", "did you mean 'merge'"]),
        ({"device": "gpu"}, ["device 'gpu'", "'auto' or 'cpu'"]),
        ({"device": "cuda:77"}, ["device 'cuda:77'", "'auto' or 'cpu'"]),
        ({"data": {"a": []}}, ["data"]),
        ({"seed": "abc"}, ["seed", "abc"]),
        ({"max_shard_bytes": "big"}, ["max_shard_bytes", "big"]),
        ({"max_shard_bytes": 0}, ["max_shard_bytes"]),
        ({"method": "fda", "anchors": {"sauce": "x"}}, ["anchors", "no source 'sauce'", "did you mean 'source'"]),
        ({"method": "fda", "anchors": {"source": "x"}}, ["anchors of 'source'", "x"]),
    ],
)
def test_a_wrong_setting_is_refused(options: dict[str, Any], words: list[str], pair: Place) -> None:
    pair.refused(*words, **options)


def test_options_beside_a_config_object_are_refused(pair: Place) -> None:
    pair.refused("scaling", "FDAConfig", method=hf_fda.FDAConfig(), scaling=1)


def test_a_model_without_blocks_is_sent_to_parameter_space_methods(place: Place) -> None:
    torch.manual_seed(0)
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    base = t.ResNetModel(config).eval()
    place.save("base", base)
    place.save("source", fine_tune(base, 1))
    place.refused("ResNetModel", "no repeated blocks", "parameter-space", method="fda")
    merged = hf_fda.merge(place.base, [place.source], "task_arithmetic", place.output, quiet=True)
    assert type(merged.load()) is t.ResNetModel


# -- anchors ---------------------------------------------------------------------------------------------------------


def test_a_folder_without_anchors_is_refused(pair: Place) -> None:
    with pytest.raises(hf_fda.InputError, match=r"no anchors\.json"):
        hf_fda.FunctionalDualAnchors.from_pretrained(pair.source)


def test_constructing_anchors_refuses_bad_input_and_writes_nothing(pair: Place) -> None:
    construct = hf_fda.FunctionalDualAnchors.construct
    place = Place(pair.root / "other")
    place.fine_tune(intermediate_size=48)
    for words, base, source, options in [
        ("did you mean 'steps'", pair.base, pair.source, {"step": 3}),
        ("no such folder", pair.base, pair.root / "nowhere", {}),
        (r"\(48, 32\)", pair.base, place.source, {}),
        ("no submodule 'mlp'", pair.base, pair.source, {"unit": "mlp"}),
        ("device 'gpu'", pair.base, pair.source, {"device": "gpu"}),
    ]:
        before = state(pair.root)
        with pytest.raises(hf_fda.InputError, match=words):
            construct(base, source, output=pair.root / "anchors", quiet=True, **options)
        assert state(pair.root) == before


def test_anchors_of_another_width_are_refused(pair: Place) -> None:
    narrow = Place(pair.root / "narrow")
    narrow.save("base", make_model("bert", hidden_size=16))
    narrow.save("source", fine_tune(make_model("bert", hidden_size=16), 1))
    hf_fda.FunctionalDualAnchors.construct(
        narrow.base, narrow.source, device="cpu", output=pair.root / "anchors", quiet=True, **FAST
    )
    pair.refused("'anchors'", "16", "32", sources=[pair.root / "anchors"], method="fda")


def test_damaged_anchors_are_refused_by_name(pair: Place) -> None:
    hf_fda.FunctionalDualAnchors.construct(
        pair.base, pair.source, device="cpu", output=pair.root / "anchors", quiet=True, **FAST
    )
    manifest = pair.root / "anchors/anchors.json"
    text = manifest.read_text()
    for spoiled in ("{", "[]", "{}", text.replace('"format": 1', '"format": 99')):
        manifest.write_text(spoiled)
        pair.refused("anchors.json", sources=[pair.root / "anchors"], method="fda")
    manifest.write_text(text)
    block = next((pair.root / "anchors/blocks").iterdir())
    block.write_bytes(block.read_bytes()[:-4])
    pair.refused(block.name, "truncated", sources=[pair.root / "anchors"], method="fda")
    block.unlink()
    pair.refused(block.name, sources=[pair.root / "anchors"], method="fda")


# -- the command -----------------------------------------------------------------------------------------------------


def command(place: Place, *words: str, source: str | None = None) -> int:
    """The exit status of `hf-fda merge` with good base and source."""
    given = ["--source", source or str(place.source)]
    return main(["merge", "--base", str(place.base), *given, "--output", str(place.output), "--quiet", *words])


def test_a_command_that_is_done_exits_with_0(pair: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(pair, "--method", "task_arithmetic", "--scaling", "0.5") == 0
    assert (pair.output / "config.json").is_file()
    assert capsys.readouterr() == ("", "")


def test_planning_exits_with_0_and_writes_nothing(pair: Place, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(pair.root)
    words = ["plan", "--base", str(pair.base), "--source", str(pair.source), "--output", str(pair.output)]
    assert main([*words, "--method", "tsv"]) == 0
    assert "Merge of 1 sources by tsv" in capsys.readouterr().out
    assert state(pair.root) == before


def test_methods_are_listed_with_exit_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("fda", "task_arithmetic", "linear", "tsv", "wudi", "isotropic", "arXiv"))
    assert main(["methods", "wudi"]) == 0
    assert "closed_form" in capsys.readouterr().out
    assert main(["methods", "wudy"]) == 2
    assert "did you mean 'wudi'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "tvs"], "did you mean 'tsv'"),
        (["--method", "tsv", "--scalling", "1"], "did you mean 'scaling'"),
        (["--method", "tsv", "--scaling", "much"], "'scaling' must be a number"),
        (["--method", "tsv", "--dtype", "float23"], "dtype 'float23'"),
        (["--method", "tsv", "--device", "gpu"], "device 'gpu'"),
        (["--method", "tsv", "--base", "/nowhere/at/all"], "no such folder"),
        (["--method", "tsv", "--source", "second=/nowhere"], "either all sources have a name or none"),
        (["--method", "fda", "--anchors", "folder"], "--anchors folder: write it as TASK="),
    ],
)
def test_bad_input_exits_with_2_and_one_line(
    words: list[str], said: str, pair: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(pair.root)
    assert command(pair, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hf-fda: ")
    assert err.count("\n") == 1
    assert said in err
    assert state(pair.root) == before


def test_two_sources_of_one_name_exit_with_2(pair: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(pair, "--source", f"a={pair.source}", source=f"a={pair.source}") == 2
    assert "two sources are named 'a'" in capsys.readouterr().err
    shutil.copytree(pair.source, pair.root / "other/source")
    assert command(pair, "--source", str(pair.root / "other/source")) == 2
    assert "two sources are named 'source'" in capsys.readouterr().err
    assert not pair.output.exists()


@pytest.mark.parametrize("spoil", ["truncate", "occupy", "pickle"])
def test_bad_folders_exit_with_2(spoil: str, pair: Place, capsys: pytest.CaptureFixture[str]) -> None:
    weights = pair.source / "model.safetensors"
    if spoil == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif spoil == "pickle":
        weights.rename(pair.source / "pytorch_model.bin")
    else:
        pair.output.mkdir()
        (pair.output / "diary.txt").write_text("mine")
    before = state(pair.root)
    assert command(pair, "--method", "linear") == 2
    assert capsys.readouterr().err.startswith("hf-fda: ")
    assert state(pair.root) == before


def test_a_failure_on_the_way_exits_with_1(pair: Place, capsys: pytest.CaptureFixture[str]) -> None:
    name = "bert.encoder.layer.0.output.dense.weight"
    rewrite(pair.source, lambda tensors: tensors[name].fill_(float("inf")))
    assert command(pair, "--method", "linear") == 1
    err = capsys.readouterr().err
    assert name in err
    assert "not finite" in err


@pytest.mark.parametrize("words", [[], ["merge"], ["merge", "--base", "x"], ["mrege"], ["push"], ["anchors"]])
def test_missing_arguments_exit_with_2(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: hf-fda" in capsys.readouterr().err


def test_a_merge_without_base_or_sources_exits_with_2(pair: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--output", str(pair.output)]) == 2
    assert "no base" in capsys.readouterr().err
    assert main(["merge", "--base", str(pair.base), "--output", str(pair.output)]) == 2
    assert "no sources" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: [", "not valid YAML"),
        ("- base", "must be a mapping"),
        ("", "must be a mapping"),
        ("bas: x", "did you mean 'base'"),
        ("base: BASE\nsources: 5", "sources must be a list"),
        ("base: BASE\nsources: []", "no sources"),
        ("base: 5\nsources: [SOURCE]", "base: must be a folder"),
        ("base: BASE\nsources: [SOURCE]\nmethod: linear\nseed: abc", "seed"),
        ("base: BASE\nsources: [SOURCE]\nmethod: linear\ndtype: [1]", "dtype"),
        ("base: BASE\nsources: [SOURCE]\nmethod: linear\nmax_shard_bytes: big", "max_shard_bytes"),
        ("base: BASE\nsources: [SOURCE]\nmethod: linear\noptions: 5", "options"),
        ("base: BASE\nsources: [SOURCE]\nmethod: linear\noptions: {5: 1}", "5"),
        ("base: BASE\nsources: [SOURCE]\nmethod: fda\nanchors: 5", "anchors"),
        ("base: BASE\nsources: [SOURCE]\nmethod: linear\noptions: {base: x}", "base"),
        ("base: BASE\nsources: {a: 5}\nmethod: linear", "source 'a'"),
        ("base: BASE\nsources: {a: null}\nmethod: linear", "source 'a'"),
    ],
)
def test_a_bad_configuration_file_exits_with_2(
    text: str, said: str, pair: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pair.root / "merge.yaml"
    config.write_text(text.replace("BASE", str(pair.base)).replace("SOURCE", str(pair.source)))
    before = state(pair.root)
    assert main(["merge", str(config), "--output", str(pair.output), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("hf-fda: ")
    assert said in err
    assert state(pair.root) == before


def test_a_configuration_without_options_is_good(pair: Place) -> None:
    config = pair.root / "merge.yaml"
    config.write_text(f"base: {pair.base}\nsources: [{pair.source}]\nmethod: linear\noptions:\n")
    assert main(["merge", str(config), "--output", str(pair.output), "--quiet"]) == 0


def test_a_missing_configuration_file_exits_with_2(pair: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(pair.root / "none.yaml"), "--output", str(pair.output)]) == 2
    assert "no such configuration file" in capsys.readouterr().err


# -- what an import costs --------------------------------------------------------------------------------------------

HEAVY = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "peft",
    "pyarrow",
)


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter on its own."""
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("words", [["--help"], ["merge", "--help"], ["anchors", "--help"], ["--version"]])
def test_importing_and_helping_load_no_heavy_library(words: list[str]) -> None:
    code = (
        "import sys, hf_fda, hf_fda.cli\n"
        f"try: hf_fda.cli.main({words!r})\n"
        "except SystemExit as done: assert not done.code\n"
        f"print('loaded', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "loaded []"


def test_the_module_can_be_run_as_the_command() -> None:
    ran = python("-X", "importtime", "-m", "hf_fda.cli", "--help")
    assert "usage: hf-fda" in ran.stdout
    assert "argparse" in ran.stderr
    assert not re.search(rf"\| +({'|'.join(HEAVY)})$", ran.stderr, flags=re.MULTILINE)


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'marge'"):
        _ = hf_fda.marge
    assert set(hf_fda.__all__) <= set(dir(hf_fda))
    assert all(getattr(hf_fda, name) is not None for name in hf_fda.__all__)
