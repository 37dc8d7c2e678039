"""What `analyze` shows of anchors and of merges: the numbers against plain computations, the report, bad input."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from adapters import save as adapter
from checks import files, merge, weights
from conftest import TEXT, fine_tune, make_model
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional
from vocabularies import bpe, save, wordpiece

import hf_fda
from hf_fda.analysis import spectrum
from hf_fda.analysis.charts import Axes, lines, short, table
from hf_fda.cli import main
from hf_fda.errors import InputError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
TEXTS = ["the quick brown fox", "the lazy dog", "fox", "a quick dog jumps over the lazy fox", "over the dog", "dog fox"]
QUIET: dict[str, Any] = {"device": "cpu", "quiet": True}
Library = Callable[[str], tuple[Path, list[Path]]]


def numbers(folder: Path, name: str) -> list[list[str]]:
    with open(folder / f"{name}.csv", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def rows(labels: list[int]) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]


class Family:
    """A bare encoder with a tokenizer, two classifiers, and an FDA merge with anchors of both."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = wordpiece(folder / "words", WORDS)
        torch.manual_seed(0)
        config = t.BertConfig(**TEXT, max_position_embeddings=40, pad_token_id=0)
        base = t.BertModel(config).eval()
        self.base, self.sources = save(folder / "base", base, self.tokenizer), {}
        for seed, (task, labels) in enumerate({"pets": 2, "three": 3}.items(), 1):
            model = t.BertForSequenceClassification(
                t.BertConfig(**TEXT, max_position_embeddings=40, pad_token_id=0, num_labels=labels)
            ).eval()
            model.bert.load_state_dict(fine_tune(base, seed).state_dict())
            with torch.no_grad():
                model.classifier.weight.normal_(0, 2)
            self.sources[task] = save(folder / task, model, self.tokenizer)
        self.merged = merge(self.base, self.sources, "fda", folder / "merged").folder

    @torch.no_grad()
    def loss(self, model: Any, labels: list[int]) -> float:
        """The cross entropy of a model on the texts, by plain transformers."""
        logits = model.eval()(**self.tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
        return float(functional.cross_entropy(logits, torch.tensor(labels)))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family"))


LABELS = {"pets": [0, 1, 1, 0, 1, 0], "three": [2, 1, 0, 2, 1, 1]}


@pytest.fixture(scope="module")
def labelled(family: Family, tmp_path_factory: pytest.TempPathFactory) -> hf_fda.Analysis:
    data = {task: {"path": rows(labels), "label": "label"} for task, labels in LABELS.items()}
    return hf_fda.analyze(family.merged, data, output=tmp_path_factory.mktemp("seen"), grid=3, batch_size=2, **QUIET)


# -- merges ---------------------------------------------------------------------------------------------------------


def test_a_merge_is_shown_whole(family: Family, labelled: hf_fda.Analysis) -> None:
    expected = {"moves", "interference", "spectra-pets", "gradient-interference", "bought", "landscape"}
    assert expected | {"alignment-pets", "gradients-three", "landscape-tasks"} <= set(labelled.charts)
    for name in labelled.charts:
        assert all((labelled.folder / f"{name}.{kind}").is_file() for kind in ("png", "svg", "csv"))
    assert "report.html" in str(labelled)


def test_the_report_needs_no_other_file(labelled: hf_fda.Analysis) -> None:
    page = labelled.report.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2 * len(labelled.charts)
    assert all(source.startswith("data:") for source in sources)
    assert 'name="viewport"' in page
    assert "<script" not in page


def test_pictures_are_opaque(labelled: hf_fda.Analysis) -> None:
    for name in labelled.charts:
        alpha = Image.open(labelled.folder / f"{name}.png").convert("RGBA").getchannel("A")
        assert alpha.getextrema() == (255, 255)


def test_moves_and_interference_are_those_of_the_tensors(family: Family, labelled: hf_fda.Analysis) -> None:
    base, merged = (weights(folder) for folder in (family.base, family.merged))
    own = [{name.removeprefix("bert."): value for name, value in weights(f).items()} for f in family.sources.values()]
    prefix = "encoder.layer.1."
    names = [name for name in base if name.startswith(prefix)]
    moved = sum(float((merged[name].double() - base[name].double()).square().sum()) for name in names)
    whole = sum(float(base[name].double().square().sum()) for name in names)
    found = [float(y) for _, _, y in numbers(labelled.folder, "moves")]
    assert found[2] == pytest.approx((moved / whole) ** 0.5, rel=1e-6)  # embeddings, two blocks
    inside = [name for name in base if not name.startswith("pooler.")]
    one, two = (torch.cat([(each[name] - base[name]).double().flatten() for name in inside]) for each in own)
    cosines = {(row, column): float(value) for row, column, value in numbers(labelled.folder, "interference")}
    assert cosines["pets", "three"] == pytest.approx(float(functional.cosine_similarity(one, two, 0)), rel=1e-5)


def test_what_a_block_bought_is_the_loss_without_its_move(family: Family, labelled: hf_fda.Analysis) -> None:
    found = {(row, column): float(value) for row, column, value in numbers(labelled.folder, "bought")}
    base = weights(family.base)
    for task, labels in LABELS.items():
        model: Any = hf_fda.load(family.merged, task)
        before = family.loss(model, labels)
        own = dict(model.bert.encoder.layer[0].named_parameters())
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(base[f"encoder.layer.0.{name}"])
        assert found["encoder.layer.0", task] == pytest.approx(family.loss(model, labels) - before, abs=1e-5)


def test_models_lie_on_the_landscape_with_their_losses(family: Family, tmp_path: Path) -> None:
    labels = LABELS["pets"]
    data = {"pets": {"path": rows(labels), "label": "label"}}
    seen = hf_fda.analyze(family.merged, data, output=tmp_path / "a", grid=14, **QUIET)  # a margin of 3 steps of 13
    found = numbers(seen.folder, "landscape")
    grid = {(float(x), float(y)): float(loss) for what, x, y, _, loss in found if what == "grid"}
    points = {what: (float(x), float(y)) for what, x, y, _, _ in found if what != "grid"}
    assert points["base"] == (0, 0)
    merged = family.loss(hf_fda.load(family.merged, "pets"), labels)
    x, y = points["merged"]
    near = min(grid, key=lambda place: (place[0] - x) ** 2 + (place[1] - y) ** 2)
    assert grid[near] == pytest.approx(merged, abs=0.1)
    base, after = weights(family.base), weights(family.merged)
    norm = sum(float((after[n] - base[n]).double().square().sum()) for n in base if not n.startswith("pooler."))
    assert x**2 + y**2 == pytest.approx(norm, rel=1e-5)


def test_without_labels_answers_are_compared_with_the_fine_tunes(family: Family, tmp_path: Path) -> None:
    data = {"pets": {"path": rows(LABELS["pets"]), "columns": "text"}}
    seen = hf_fda.analyze(family.merged, data, output=tmp_path / "a", grid=2, **QUIET)
    losses = [float(loss) for what, *_, loss in numbers(seen.folder, "landscape") if what == "grid"]
    assert all(0 <= loss <= 0.694 for loss in losses)
    assert "divergence from the fine-tune" in seen.report.read_text(encoding="utf-8")


def test_a_path_goes_through_other_merges(family: Family, tmp_path: Path) -> None:
    data = {"pets": {"path": rows(LABELS["pets"]), "label": "label"}}
    other = merge(family.base, family.sources, "ties", tmp_path / "other").folder
    seen = hf_fda.analyze(family.merged, data, through=[other], output=tmp_path / "a", grid=2, **QUIET)
    path = [row for row in numbers(seen.folder, "landscape") if row[0].startswith("path")]
    assert len(path) == 3
    assert float(path[1][3]) > 0
    assert float(path[2][3]) == pytest.approx(0, abs=1e-3)


def test_task_arithmetic_itself_has_a_plane_too(family: Family, tmp_path: Path) -> None:
    merged = merge(family.base, family.sources, "task_arithmetic", tmp_path / "ta", scaling=0.5).folder
    data = {"pets": {"path": rows(LABELS["pets"]), "label": "label"}}
    seen = hf_fda.analyze(merged, data, grid=2, **QUIET)
    assert seen.folder == merged / "analysis"
    assert "fine-tune pets" in {row[0] for row in numbers(seen.folder, "landscape")}
    again = hf_fda.analyze(merged, **QUIET)
    assert "landscape" not in again.charts


def test_a_language_model_without_heads(library: Library, tmp_path: Path) -> None:
    base, sources = library("llama")
    merged = merge(base, {"one": sources[0], "two": sources[1]}, "linear", tmp_path / "merged").folder
    seen = hf_fda.analyze(merged, **QUIET)
    assert [row[1] for row in numbers(seen.folder, "moves")] == ["0.0", "1.0", "2.0", "3.0"]
    assert "interference" in seen.charts


def test_language_models_and_adapters_on_rows(tmp_path: Path) -> None:
    tokenizer = bpe()
    base = save(tmp_path / "base", make_model("llama", vocab_size=len(tokenizer)), tokenizer)
    sources: dict[str, Any] = {
        "one": save(tmp_path / "one", fine_tune(make_model("llama", vocab_size=len(tokenizer)), 1), tokenizer)
    }
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapters = {
        name: adapter(make_model("llama", vocab_size=len(tokenizer)), config, tmp_path / f"{name}-adapter", seed)
        for seed, name in enumerate(("one", "two"))
    }
    data = {"one": ["the quick brown fox", "pack my box", "lazy dog"]}
    for name, given, options in (("whole", sources, {}), ("adapter", adapters, {"as_adapter": True})):
        merged = hf_fda.merge(
            base, given, "task_arithmetic", tmp_path / f"{name}-merged", scaling=0.6, **options, **QUIET
        )
        seen = hf_fda.analyze(merged.folder, data, base=base, grid=2, **QUIET)
        assert {"moves", "bought"} <= set(seen.charts)


def test_sources_that_are_gone_are_left_out(tmp_path: Path) -> None:
    base = make_model("bert")
    base.save_pretrained(tmp_path / "base")
    fine_tune(base, 1).save_pretrained(tmp_path / "one")
    merged = merge(tmp_path / "base", {"one": tmp_path / "one"}, "linear", tmp_path / "merged").folder
    (tmp_path / "one").rename(tmp_path / "gone")
    seen = hf_fda.analyze(merged, **QUIET)
    assert seen.charts == ("moves",)
    with pytest.raises(InputError, match="its fine-tune is not at hand"):
        hf_fda.analyze(merged, {"one": {"path": rows(LABELS["pets"]), "columns": "text"}}, **QUIET)


# -- anchors --------------------------------------------------------------------------------------------------------


def test_the_card_of_a_merge_shows_what_was_seen_of_it(library: Library, tmp_path: Path) -> None:
    base, sources = library("llama")
    given: dict[str, Any] = {"method": "linear", "device": "cpu", "quiet": True}
    merged = hf_fda.merge(base, sources, output=tmp_path / "merged", **given)
    found = hf_fda.analyze(merged.folder, device="cpu", quiet=True)
    card = (merged.folder / "README.md").read_text(encoding="utf-8")
    assert "(analysis/moves.png)" in card and "(analysis/interference.png)" in card and "landscape" not in card
    hf_fda.merge(base, sources, output=tmp_path / "merged", **given)  # nothing to do
    assert (merged.folder / "README.md").read_text(encoding="utf-8") == card
    hf_fda.merge(base, sources, output=tmp_path / "merged", **{**given, "method": "ties"})
    assert not found.folder.exists()
    assert "analysis" not in (merged.folder / "README.md").read_text(encoding="utf-8")


def test_a_card_that_was_changed_by_hand_is_left(
    library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, sources = library("llama")
    merged = hf_fda.merge(base, sources, output=tmp_path / "merged", method="linear", device="cpu", quiet=True)
    (merged.folder / "README.md").write_text("mine", encoding="utf-8")
    hf_fda.analyze(merged.folder, device="cpu", quiet=True)
    assert (merged.folder / "README.md").read_text(encoding="utf-8") == "mine"
    assert "changed by hand" in caplog.text


def test_anchors_of_several_sources(library: Library, tmp_path: Path) -> None:
    base, sources = library("bert")
    folders = []
    for source in sources:
        folders.append(tmp_path / source.name)
        hf_fda.FunctionalDualAnchors.construct(
            base, source, output=folders[-1], num_anchors=4, steps=2, snapshots=[0, 2], **QUIET
        )
    seen = hf_fda.analyze(folders, base=base, output=tmp_path / "seen", **QUIET)
    assert {"spectra-one", "spectra-two", "rank-over-steps-one", "gradient-interference", "anchor-overlap"} <= set(
        seen.charts
    )
    block = load_file(folders[0] / "blocks/bert.encoder.layer.1.safetensors")["anchors"]
    found = spectrum(block)
    ranks = {(line, x): float(y) for line, x, y in numbers(seen.folder, "effective-rank")}
    assert ranks["one", "1.0"] == pytest.approx(found.effective_rank)
    shares = [float(y) for line, _, y in numbers(seen.folder, "spectra-one") if line == "bert.encoder.layer.1"]
    assert shares == pytest.approx([share for share in found.shares if share > 1e-6])
    alone = hf_fda.analyze(folders[0], **QUIET)
    assert alone.folder == folders[0] / "analysis"
    assert not any("interference" in name for name in alone.charts)


def test_anchors_that_are_not_finite_are_named(library: Library, tmp_path: Path) -> None:
    base, (source, _) = library("bert")
    made = hf_fda.FunctionalDualAnchors.construct(base, source, num_anchors=2, steps=1, **QUIET)
    made[made.blocks[1]].anchors[0] = float("nan")
    made.save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match=r"anchors of 'one', block 'bert.encoder.layer.1': .* not all finite"):
        hf_fda.analyze(tmp_path / "a", **QUIET)


def test_the_same_input_gives_the_same_pictures(library: Library, tmp_path: Path) -> None:
    base, (source, _) = library("bert")
    hf_fda.FunctionalDualAnchors.construct(base, source, output=tmp_path / "a", num_anchors=4, steps=1, **QUIET)
    first, again = (files(hf_fda.analyze(tmp_path / "a", output=tmp_path / name, **QUIET).folder) for name in "xy")
    first.pop("report.html"), again.pop("report.html")  # it says how long it took
    assert first == again


# -- the command, and bad input -------------------------------------------------------------------------------------


def test_command_line(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,answer\nthe dog,1\nthe fox,0\n", encoding="utf-8")
    words = ["--data", f"pets={path}", "--label", "pets=answer", "--grid", "2", "--device", "cpu"]
    assert main(["analyze", str(family.merged), *words, "--output", str(tmp_path / "seen")]) == 0
    said = capsys.readouterr()
    assert f"Report in {tmp_path / 'seen/report.html'}" in said.out


def test_what_it_takes_is_told_before(family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = {"pets": {"path": rows(LABELS["pets"]), "label": "label"}}
    with caplog.at_level("INFO", "hf_fda"):
        hf_fda.analyze(family.merged, data, output=tmp_path / "a", grid=2, **QUIET)
    told = [record.getMessage() for record in caplog.records]
    assert any("of memory beside the libraries' own" in line and "of disk meanwhile" in line for line in told)
    assert any("looks at them" in line for line in told)


def test_a_missing_package_gives_its_line(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fda.drawing.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "hf-fda\[plots\]"'):
        hf_fda.analyze(family.merged, **QUIET)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": 0}, "rows must be a whole number"),
        ({"grid": 1, "data": {"pets": {"path": rows(LABELS["pets"]), "label": "label"}}}, "2 at least"),
        ({"data": {"dogs": rows(LABELS["pets"])}}, "no task 'dogs'"),
        ({"data": {"pets": {"path": rows(LABELS["pets"]), "label": "labl"}}}, "no column 'labl'"),
        ({"data": {"three": {"path": rows([0, 1, 2, 0, 1, 9]), "label": "label"}}}, "has the label 9"),
        ({"data": [1, 2]}, "data must be a mapping"),
        ({"through": ["x"]}, "which needs data"),
        ({"base": "/nowhere"}, "base cannot be opened"),
    ],
)
def test_bad_input_is_refused(family: Family, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        hf_fda.analyze(family.merged, output=tmp_path / "a", **{**QUIET, **change})
    assert not (tmp_path / "a").exists()


def test_folders_that_are_refused(family: Family, library: Library, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one merge at a time"):
        hf_fda.analyze([family.merged, family.base], output=tmp_path / "a", **QUIET)
    with pytest.raises(InputError, match="nothing to look at"):
        hf_fda.analyze([], **QUIET)
    with pytest.raises(InputError, match="does not say which base"):
        hf_fda.analyze(family.base, **QUIET)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(InputError, match="holds something else"):
        hf_fda.analyze(family.merged, output=tmp_path / "mine", **QUIET)
    base, (source, _) = library("bert")
    hf_fda.FunctionalDualAnchors.construct(base, source, output=tmp_path / "x", num_anchors=2, steps=1, **QUIET)
    with pytest.raises(InputError, match="data and through are for merges"):
        hf_fda.analyze(tmp_path / "x", {"x": rows(LABELS["pets"])}, **QUIET)
    with pytest.raises(InputError, match="is not what the anchors were constructed from"):
        hf_fda.analyze(tmp_path / "x", base=source, **QUIET)


# -- charts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 6, 80])
def test_charts_of_many_lines(tmp_path: Path, count: int) -> None:
    series = {f"block {number}": ([1.0, 2.0], [1.0 + number, 2.0]) for number in range(count)}
    for order in ("", "block"):
        chart = lines("x", "Title", "", Axes("a", "b", log_y=True), series, {"random": ([1.0, 2.0], [1.0, 1.0])}, order)
        assert chart.write(tmp_path).png.is_file()


def test_tables_of_odd_numbers(tmp_path: Path) -> None:
    rows = {"a": [float("nan"), float("inf")], "b": [-1e-9, 0.0]}
    assert table("x", "Title", "", ("down", "across", "unit"), ["c", "d"], rows).write(tmp_path).svg.is_file()
    assert [short(value) for value in (0.0, 123.4, 0.05)] == ["0", "123", "0.050"]
