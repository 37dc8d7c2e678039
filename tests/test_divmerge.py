"""Merging by divergence and by entropy, from rows of data to the merged folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import fine_tune, make_model
from processes import fork
from safetensors.torch import load_file
from test_resume import contents, times

import hf_fda
from hf_fda.cli import main
from hf_fda.coefficients import COEFFICIENTS, HEAT_MAP, Coefficients
from hf_fda.errors import InputError, RunError
from hf_fda.store import WORK

SETTINGS: dict[str, Any] = {"steps": 6, "every": 2, "batch_size": 4, "device": "cpu", "quiet": True}
BRIEF = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items() if name != "quiet"]


def rows_of(count: int = 12, seed: int = 0, tokens: int = 6) -> list[dict[str, list[int]]]:
    """Encoded texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, tokens + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(5, 99, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": own, "attention_mask": [1] * len(own)} for own in ids]


def rows_for(tasks: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    return {task: rows_of(seed=number, **settings) for number, task in enumerate(tasks)}


@pytest.fixture
def files(classifiers: Any, tmp_path: Path) -> tuple[Path, dict[str, Path], dict[str, str]]:
    """Three classifiers with their base and a file of rows for each."""
    base, sources = classifiers
    data = {}
    for task, rows in rows_for(sources).items():
        data[task] = str(tmp_path / f"{task}.jsonl")
        Path(data[task]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return base, sources, data


def learnt(folder: Path) -> Coefficients:
    return Coefficients.read(folder / COEFFICIENTS)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", ["divmerge", "adamerging"])
@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
def test_the_merge_is_the_combination_that_was_learnt(
    method: str, granularity: str, classifiers: Any, tmp_path: Path
) -> None:
    base, sources = classifiers
    output = tmp_path / "out"
    settings = {**SETTINGS, "initial": "task_arithmetic", "granularity": granularity, "held_out": 0}
    hf_fda.merge(base, sources, method, output, data=rows_for(sources), **settings)
    found, theta = learnt(output), weights(base)
    own = [weights(folder) for folder in sources.values()]
    assert found.sources == tuple(sources)
    assert len(found.groups) == {"task": 1, "block": 3, "tensor": len(found.group_of)}[granularity]
    assert any(value != 0.4 for row in found.values for value in row)
    for name, tensor in weights(output).items():
        tasks = [tensors[f"bert.{name}"] - theta[name] for tensors in own]
        if name in found.group_of:
            expected = theta[name] + sum(c * task for c, task in zip(found.of_tensor(name), tasks, strict=True))
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, theta[name])
    assert all(hf_fda.load(output, task).num_labels for task in sources)


def test_without_steps_it_is_task_arithmetic(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    settings = {**SETTINGS, "initial": "task_arithmetic", "steps": 0}
    hf_fda.merge(base, sources, "divmerge", tmp_path / "a", data=rows_for(sources), scaling=0.25, **settings)
    hf_fda.merge(base, sources, "task_arithmetic", tmp_path / "b", scaling=0.25, device="cpu", quiet=True)
    ours, theirs = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if "pooler" not in name)


@pytest.mark.parametrize("data", ["rows", "anchors"])
def test_from_tsv_its_weights_are_learnt(data: str, classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    given: Any = rows_for(sources) if data == "rows" else data
    settings = {**SETTINGS, "initial": "tsv", "granularity": "tensor", "held_out": 0}
    hf_fda.merge(base, sources, "divmerge", tmp_path / "start", data=given, **{**settings, "steps": 0})
    hf_fda.merge(base, sources, "tsv", tmp_path / "tsv", device="cpu", quiet=True)
    ours, theirs = weights(tmp_path / "start"), weights(tmp_path / "tsv")
    names = learnt(tmp_path / "start").group_of
    if data == "rows":
        assert all(torch.equal(ours[name], theirs[name]) for name in names)
    hf_fda.merge(base, sources, "divmerge", tmp_path / "out", data=given, **settings)
    found = learnt(tmp_path / "out")
    for name in ("encoder.layer.0.attention.self.query.weight", "encoder.layer.1.output.dense.bias"):
        assert set(found.of_tensor(name)) != {1.0}
        weighted = {"weights": list(found.of_tensor(name))}
        expected = weights(hf_fda.merge(base, sources, "tsv", tmp_path / name, quiet=True, **weighted).folder)[name]
        torch.testing.assert_close(weights(tmp_path / "out")[name], expected)


def test_a_coefficient_of_zero_is_merged_as_it_was_learnt(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    settings = {**SETTINGS, "scaling": 0.0, "steps": 0}
    hf_fda.merge(base, sources, "divmerge", tmp_path / "out", data=rows_for(sources), **settings)
    theta = weights(base)
    for name in learnt(tmp_path / "out").group_of:
        torch.testing.assert_close(weights(tmp_path / "out")[name], theta[name], rtol=0, atol=1e-20)


def test_the_source_itself_is_found_again(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    one = {"four": sources["four"]}
    settings = {
        **SETTINGS,
        "scaling": 0.4,
        "steps": 150,
        "learning_rate": 0.05,
        "every": 10,
        "granularity": "task",
        "held_out": 0.4,
    }
    hf_fda.merge(base, one, "divmerge", tmp_path / "out", data=rows_for(one, count=20), precision="float32", **settings)
    found = learnt(tmp_path / "out")
    assert found.values[0][0] == pytest.approx(1, abs=0.02)
    assert found.after[0] < 1e-3 * found.before[0]


def test_the_divergence_falls_and_the_card_says_so(files: Any, tmp_path: Path) -> None:
    base, sources, data = files
    output = tmp_path / "out"
    hf_fda.merge(base, sources, "divmerge", output, data=data, **{**SETTINGS, "steps": 60, "learning_rate": 0.03})
    found = learnt(output)
    relative = [after / before for after, before in zip(found.after, found.before, strict=True)]
    assert sum(relative) < len(relative)  # balanced
    assert found.best_step in [seen.step for seen in found.history]
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "two.jsonl" in card
    assert str(tmp_path) not in card.split("---", 2)[2]
    assert f"{found.after[0]:.4f}" in card
    assert HEAT_MAP in card
    assert (output / HEAT_MAP).read_bytes().startswith(b"\x89PNG")
    assert all(row[0] in str(found) for row in found.rows())


def test_a_causal_model_is_merged_with_its_embeddings(saved: Any, tmp_path: Path) -> None:
    base, folders = saved("qwen2", 2)
    sources = {"one": folders[0], "two": folders[1]}
    hf_fda.merge(
        base,
        sources,
        "divmerge",
        tmp_path / "out",
        data=rows_for(sources),
        **{**SETTINGS, "top_k": 20, "granularity": "block"},
    )
    found = learnt(tmp_path / "out")
    assert found.groups[0] == "before"
    model = hf_fda.load(tmp_path / "out")
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_encoder_decoders_write_what_their_rows_do_not_say(saved: Any, tmp_path: Path) -> None:
    base, folders = saved("t5", 2, decoder_start_token_id=0)
    sources = {"one": folders[0], "two": folders[1]}
    hf_fda.merge(base, sources, "divmerge", tmp_path / "out", data=rows_for(sources), **SETTINGS)
    assert "after" not in learnt(tmp_path / "out").groups[0]
    assert len(learnt(tmp_path / "out").groups) > 4


def test_it_is_written_down_and_made_again(files: Any, tmp_path: Path) -> None:
    base, sources, data = files
    hf_fda.merge(base, sources, "divmerge", tmp_path / "a", data=data, rows=8, **SETTINGS)
    recorded = yaml.safe_load((tmp_path / "a" / "merge_config.yaml").read_text(encoding="utf-8"))
    assert recorded["data"]["two"]["path"] == data["two"]
    assert main(["merge", str(tmp_path / "a" / "merge_config.yaml"), "--output", str(tmp_path / "b"), "--quiet"]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    Path(data["two"]).write_text(json.dumps(rows_of()[0]) + "\n" + json.dumps(rows_of()[1]) + "\n", encoding="utf-8")
    with pytest.raises(RunError, match="not the rows that its fingerprint"):
        hf_fda.merge_config(tmp_path / "a" / "merge_config.yaml", tmp_path / "c", quiet=True)


def test_the_command_line_makes_the_same(files: Any, tmp_path: Path, capsys: Any) -> None:
    base, sources, data = files
    hf_fda.merge(base, sources, "divmerge", tmp_path / "a", data=data, **SETTINGS)
    words = ["--base", str(base), "--method", "divmerge", *BRIEF]
    for task in sources:
        words += ["--source", f"{task}={sources[task]}", "--data", f"{task}={data[task]}"]
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert "data      two: " in said
    assert "12 rows" in said
    assert main(["merge", *words, "--output", str(tmp_path / "b")]) == 0
    assert str(learnt(tmp_path / "b")) in capsys.readouterr().out
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_configuration_of_mergekit_names_the_method(files: Any, tmp_path: Path) -> None:
    base, sources, data = files
    document = {
        "merge_method": "divmerge",
        "base_model": str(base),
        "models": [{"model": str(folder)} for folder in sources.values()],
        "parameters": {"steps": 4, "batch_size": 4, "every": 2},
        "hf_fda": {"data": data},
    }
    hf_fda.merge_config(document, tmp_path / "a", quiet=True, device="cpu")
    merged = hf_fda.merge_config(tmp_path / "a" / "merge_config.yaml", tmp_path / "b", quiet=True, device="cpu")
    assert merged.coefficients is not None
    assert merged.coefficients.sources == tuple(sources)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    del document["hf_fda"]
    with pytest.raises(InputError, match="looks at unlabelled rows"):
        hf_fda.merge_config(document, tmp_path / "c", quiet=True)
    merged = hf_fda.merge_config(document, tmp_path / "c", data=data, quiet=True, device="cpu")
    assert torch.equal(weights(tmp_path / "a")["pooler.dense.bias"], weights(tmp_path / "c")["pooler.dense.bias"])


@pytest.mark.parametrize(
    ("method", "options"), [("distill", {"epochs": 1}), ("regmean", {}), ("fisher", {}), ("adamerging", {"steps": 2})]
)
def test_configurations_of_mergekit_name_the_other_methods_that_look_at_data(
    method: str, options: dict[str, Any], files: Any, tmp_path: Path
) -> None:
    base, sources, data = files
    document = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(folder)} for folder in sources.values()],
        "parameters": options,
        "hf_fda": {"data": data},
    }
    hf_fda.merge_config(document, tmp_path / "a", quiet=True, device="cpu")
    hf_fda.merge(base, sources, method, tmp_path / "b", data=data, quiet=True, device="cpu", **options)
    ours, theirs = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
def test_anchors_take_the_place_of_rows(granularity: str, classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    settings = {"granularity": granularity, "device": "cpu", "quiet": True}
    output = tmp_path / "out"
    plan = hf_fda.plan(base, sources, "divmerge", output, data="anchors", granularity=granularity)
    assert "6 constructions, then coefficients" in str(plan)
    hf_fda.merge(base, sources, "divmerge", output, data="anchors", **settings)
    found = learnt(output)
    assert any(value != 0.4 for row in found.values for value in row)
    made = {task: str(output / "anchors" / task) for task in sources}
    hf_fda.merge(base, sources, "divmerge", tmp_path / "again", data="anchors", anchors=made, **settings)
    assert learnt(tmp_path / "again") == found
    recorded = yaml.safe_load((output / "merge_config.yaml").read_text(encoding="utf-8"))
    assert recorded["data"] == "anchors"


def test_one_source_is_found_again_on_its_anchors(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    one = {"four": sources["four"]}
    hf_fda.merge(base, one, "divmerge", tmp_path / "out", data="anchors", granularity="task", device="cpu", quiet=True)
    assert learnt(tmp_path / "out").values[0][0] == pytest.approx(1, abs=1e-3)


def _merge(base: Path, sources: dict[str, Path], output: Path, data: dict[str, str]) -> None:
    hf_fda.merge(base, sources, "divmerge", output, data=data, max_shard_bytes=20_000, **SETTINGS)


def test_two_processes_make_the_bytes_of_one(files: Any, tmp_path: Path) -> None:
    base, sources, data = files
    _merge(base, sources, tmp_path / "one", data)
    fork(_merge, base, sources, tmp_path / "both", data, processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "both")


def test_what_is_finished_is_not_done_again(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, sources, data = files
    output = tmp_path / "out"
    _merge(base, sources, output, data)
    before = times(output, COEFFICIENTS), contents(output)
    _merge(base, sources, output, data)
    next(output.glob("model-*.safetensors")).unlink()
    _merge(base, sources, output, data)
    assert (times(output, COEFFICIENTS), contents(output)) == before
    hf_fda.merge(base, sources, "task_arithmetic", output, device="cpu", quiet=True)
    assert not (output / COEFFICIENTS).exists()
    assert not (output / HEAT_MAP).exists()


def test_the_answers_that_were_recorded_are_there_after_a_failure(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sources, data = files
    _merge(base, sources, tmp_path / "undisturbed", data)
    import hf_fda.preparing.learned as module

    recorded: list[str] = []
    real = module.record

    def fail(*_: Any, **__: Any) -> None:
        raise RunError("the machine was switched off")

    def counted(model: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        recorded.append(rows.task)
        return real(model, rows, *args, **kwargs)

    monkeypatch.setattr(module, "record", counted)
    with monkeypatch.context() as off:
        off.setattr(module, "learn", fail)
        with pytest.raises(RunError, match="switched off"):
            _merge(base, sources, tmp_path / "out", data)
    assert not (tmp_path / "out" / "config.json").exists()
    _merge(base, sources, tmp_path / "out", data)
    assert sorted(recorded) == sorted(sources)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_learning_goes_on_where_it_was_broken_off(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, sources, data = files
    _merge(base, sources, tmp_path / "undisturbed", data)
    import hf_fda.divergence.state as module

    real, looks = module.LearningState.look, []

    def look(self: Any, *args: Any) -> float:
        if len(looks) == 2:
            looks.append("broken off")
            raise RunError("the machine was switched off")
        looks.append(self.step)
        return real(self, *args)

    monkeypatch.setattr(module.LearningState, "look", look)
    with pytest.raises(RunError, match="switched off"):
        _merge(base, sources, tmp_path / "out", data)
    _merge(base, sources, tmp_path / "out", data)
    steps = [step for step in looks if step != "broken off"]
    assert steps == sorted(set(steps)) and len(steps) > 2
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert not list((tmp_path / "out" / WORK).rglob("state.safetensors*"))


def test_adapters_become_one_adapter_exactly(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    sources = {}
    for number, task in enumerate(["one", "two"]):
        adapter = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        tuned = fine_tune(adapter, seed=number, size=0.1)
        tuned.save_pretrained(tmp_path / task)
        sources[task] = tmp_path / task
    data = rows_for(sources)
    settings = {**SETTINGS, "granularity": "tensor"}
    hf_fda.merge(tmp_path / "base", sources, "divmerge", tmp_path / "whole", data=data, **settings)
    hf_fda.merge(tmp_path / "base", sources, "divmerge", tmp_path / "thin", True, data, **settings)
    assert learnt(tmp_path / "whole").values == learnt(tmp_path / "thin").values
    merged = PeftModel.from_pretrained(make_model("llama"), tmp_path / "thin").eval()
    ids = torch.tensor([rows_of(tokens=6)[0]["input_ids"]])
    with torch.no_grad():
        expected = hf_fda.load(tmp_path / "whole")(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_heads_of_one_task_are_merged_too(saved: Any, tmp_path: Path) -> None:
    base, folders = saved("bert", 2)
    sources = {"one": folders[0], "two": folders[1]}
    settings = {**SETTINGS, "heads": "merge"}
    hf_fda.merge(base, sources, "divmerge", tmp_path / "out", data=rows_for(sources), **settings)
    own = [weights(folder)["classifier.weight"] for folder in folders]
    torch.testing.assert_close(weights(tmp_path / "out")["classifier.weight"], (own[0] + own[1]) / 2)


@pytest.mark.parametrize(
    ("method", "data", "options", "said"),
    [
        ("divmerge", None, {}, "looks at unlabelled rows"),
        ("ties", {}, {}, "merges from weights alone"),
        ("divmerge", {"tow": []}, {}, "two"),
        ("divmerge", {"two": rows_of()}, {}, "no data for 'three', 'four'"),
        ("adamerging", "anchors", {}, "must be a mapping"),
        ("divmerge", "ancors", {}, "or 'anchors'"),
        ("divmerge", "all", {"lower": 1.0, "upper": 0.0}, "above upper"),
        ("divmerge", "all", {"rows": 0}, "at least 1"),
        ("divmerge", "all", {"divergence": "js"}, "jensen-shannon"),
        ("divmerge", "all", {"held_out": 1.0}, "at most 0.9"),
        ("divmerge", "all", {"initial": "tsv", "task_vectors": "disk"}, "task_vectors 'float32'"),
    ],
)
def test_bad_input_is_refused(
    method: str, data: Any, options: dict[str, Any], said: str, classifiers: Any, tmp_path: Path
) -> None:
    base, sources = classifiers
    given = rows_for(sources) if data == "all" else data
    with pytest.raises(InputError, match=said):
        hf_fda.merge(base, sources, method, tmp_path / "out", data=given, **options)
    assert not (tmp_path / "out").exists()


def test_values_have_no_entropy(tmp_path: Path) -> None:
    base = make_model("bert", num_labels=1)
    base.save_pretrained(tmp_path / "base")
    fine_tune(base, seed=1).save_pretrained(tmp_path / "one")
    with pytest.raises(InputError, match="regression"):
        hf_fda.merge(
            tmp_path / "base", [tmp_path / "one"], "adamerging", tmp_path / "out", data={"one": rows_of()}, **SETTINGS
        )
    assert not (tmp_path / "out").exists()
