"""Advice: facts about task vectors against closed forms, rules against the tables they cite, trials, refusals."""

from __future__ import annotations

import copy
import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapters as tiny_adapters
import pytest
import torch
import transformers as t
from conftest import TEXT, fine_tune, make_model
from torch import Tensor
from vocabularies import save, wordpiece

import hf_fda
from hf_fda.advising.advice import Advice
from hf_fda.advising.costing import Cost
from hf_fda.advising.coverage import uncovered
from hf_fda.advising.directions import coincidence, leading
from hf_fda.advising.evidence import ADAPTERS, DECODERS, DIGITS, ENCODERS, LANGUAGE, SHARED, WITH_DATA
from hf_fda.advising.facts import Facts, SourceFacts, kind_of, merged_names
from hf_fda.advising.overlap import Overlap, Sums, measure
from hf_fda.advising.rules import RULES, rule_for
from hf_fda.advising.trying import totals
from hf_fda.analysis import from_gram
from hf_fda.checkpoint.reader import FileCheckpoint
from hf_fda.cli import main
from hf_fda.errors import InputError
from hf_fda.inputs import open_inputs
from hf_fda.lowrank import LowRank
from hf_fda.merge_methods import resolve_method

sys.path.append(str(Path(__file__).parents[1] / "examples/benchmarks"))
from tables import best_row, number, table_with

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
TEXTS = ["the quick brown fox", "the lazy dog", "fox", "a quick dog jumps over the lazy fox", "over the dog"] * 3
QUIET: dict[str, Any] = {"device": "cpu", "quiet": True}

# -- facts against closed forms -------------------------------------------------------------------------------------


def moved(base: Any, change: Callable[[Tensor, Tensor], Tensor], seed: int = 1) -> Any:
    """A copy of a model; each parameter moves by what `change` makes of random steps and of their numbers."""
    tuned, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own in tuned.parameters():
            step = 0.02 * torch.randn(own.shape, generator=generator)
            own.add_(change(step, torch.arange(own.numel()).view(own.shape)))
    return tuned


def overlap_of(*changes: Callable[[Tensor, Tensor], Tensor], family: str = "llama") -> Overlap:
    base = make_model(family)
    inputs = open_inputs(base, {f"s{number}": moved(base, change) for number, change in enumerate(changes)})
    return measure(inputs, merged_names(inputs))


def same(step: Tensor, _: Tensor) -> Tensor:
    return step


@pytest.mark.parametrize("family", ["llama", "bert", "vit", "gpt2", "mixtral"])
def test_identical_sources_have_cosine_one_and_no_conflict(family: str) -> None:
    found = overlap_of(same, same, family=family)
    assert found.cosines[0][1] == pytest.approx(1, abs=1e-12)
    assert found.conflicts[0][1] == 0
    assert found.ratio == pytest.approx(1)
    assert found.read == 1
    assert found.directions is not None and found.directions.shared[0][1] == pytest.approx(1, abs=1e-4)


def test_sources_that_move_other_entries_are_orthogonal() -> None:
    found = overlap_of(lambda step, at: step * (at % 2 == 0), lambda step, at: step * (at % 2 == 1))
    assert found.cosines[0][1] == 0
    assert found.conflicts[0][1] == 0


def test_opposite_sources_conflict_everywhere() -> None:
    found = overlap_of(same, lambda step, _: -3 * step)
    assert found.cosines[0][1] == pytest.approx(-1, abs=1e-6)
    assert found.conflicts[0][1] == 1
    assert found.ratio == pytest.approx(3, rel=1e-5)
    assert found.directions is not None and found.directions.shared[0][1] == pytest.approx(1, abs=1e-3)


def test_a_source_that_equals_the_base_is_told() -> None:
    found = overlap_of(same, lambda step, _: torch.zeros_like(step))
    assert found.norms[1] == 0 and found.cosines[0][1] == 0 and math.isinf(found.ratio)
    assert found.directions is None
    assert "leave it out" in uncovered(facts(overlap=found), ENCODERS)[0]


def test_sums_of_parts_are_those_of_the_whole() -> None:
    rows = torch.randn(4, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[2, :30] = 0
    sums = Sums(3)
    for part in rows.split(40, dim=1):
        sums.add(part[0], part[1:])
    expected = torch.nn.functional.cosine_similarity(rows[1:, None], rows[None, 1:], dim=-1)
    alike = from_gram(["a", "b", "c"], sums.products)
    torch.testing.assert_close(torch.tensor(alike.cosines, dtype=torch.float64), expected)
    assert alike.norms == pytest.approx(rows[1:].norm(dim=1).tolist())
    opposed = float((rows[1, 30:] * rows[2, 30:] < 0).double().mean())
    assert sums.conflicts()[0][1] == pytest.approx(opposed)


@pytest.mark.parametrize("degrees", [0, 30, 60, 90])
def test_shared_directions_are_squared_cosines_of_principal_angles(degrees: int) -> None:
    angle = math.radians(degrees)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))[0]
    turned = math.cos(angle) * basis[:, :1] + math.sin(angle) * basis[:, 1:2]
    one, other = (LowRank(left, basis[:, 5:6].T, (20, 20)) for left in (basis[:, :1], turned))
    for pair in ((one, other), (one.dense(), other.dense()), (one, other.dense())):
        first, second = (leading(own, 4) for own in pair)
        assert first is not None and second is not None
        assert coincidence(first, second) == pytest.approx((math.cos(angle) ** 2 + 1) / 2, abs=1e-5)


def test_leading_directions_of_a_dense_matrix_are_those_of_its_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 40, generator=generator) @ torch.diag(0.8 ** torch.arange(40.0))
    found = leading(matrix, 5)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert found is not None
    torch.testing.assert_close(found.outputs @ found.outputs.T, u[:, :5] @ u[:, :5].T, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.inputs @ found.inputs.T, vh[:5].T @ vh[:5], atol=1e-3, rtol=0)
    assert leading(torch.zeros(4, 4), 2) is None


def test_a_sample_is_evenly_spread_and_said(library: Any) -> None:
    base, sources = library("llama")
    inputs = open_inputs(base, [sources[0], sources[0].parent / "one/../two"])
    names = merged_names(inputs)
    whole, part = measure(inputs, names), measure(inputs, names, limit=10_000)
    assert whole.read == 1 and 0.1 < part.read < 0.9
    assert part.cosines[0][1] == pytest.approx(whole.cosines[0][1], abs=0.05)
    assert "% of the entries, evenly spread" in str(shown(facts(overlap=part)))


def test_no_source_is_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_model("llama", num_hidden_layers=12)
    base.save_pretrained(tmp_path / "base")
    for seed in (1, 2, 3):
        fine_tune(base, seed).save_pretrained(tmp_path / f"s{seed}")
    inputs = open_inputs(tmp_path / "base", [tmp_path / f"s{seed}" for seed in (1, 2, 3)])
    read, alive, most = FileCheckpoint.read, list[Any](), [0]

    def watched(self: FileCheckpoint, name: str, part: slice | None = None) -> Tensor:
        tensor = read(self, name, part)
        alive.append(weakref.ref(tensor))
        held = {own.data_ptr(): own.nbytes for own in (ref() for ref in alive) if own is not None}
        most[0] = max(most[0], sum(held.values()))
        return tensor

    monkeypatch.setattr(FileCheckpoint, "read", watched)
    measure(inputs, merged_names(inputs))
    largest = max(own.numel() * 4 for own in base.parameters())
    assert 0 < most[0] <= 5 * largest < sum(own.numel() * 4 for own in base.parameters()) / 2


def test_adapters_have_ranks_and_are_measured_as_their_dense_task_vectors(tmp_path: Path) -> None:
    base = tiny_adapters.make_base("llama")
    base.save_pretrained(tmp_path / "base")
    kinds = ("plain", "patterns", "rslora")
    folders = {
        kind: tiny_adapters.save(base, tiny_adapters.KINDS[kind]("llama"), tmp_path / kind, seed)
        for seed, kind in enumerate(kinds, 1)
    }
    advice = hf_fda.advise(tmp_path / "base", folders, **QUIET)
    assert [own.kind for own in advice.facts.sources] == ["adapter"] * 3
    assert [own.ranks for own in advice.facts.sources] == [(3,), (3, 5), (3,)]
    assert advice.rule == "adapters"
    dense = {}
    for kind, folder in folders.items():
        dense[kind] = hf_fda.merge(
            tmp_path / "base", [folder], "passthrough", tmp_path / f"{kind}-dense", **QUIET
        ).folder
    inputs = open_inputs(tmp_path / "base", dense)
    found, expected = advice.facts.overlap, measure(inputs, merged_names(inputs))
    assert found is not None and found.directions is not None
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)
    for row, other in zip(found.cosines, expected.cosines, strict=True):
        assert row == pytest.approx(other, abs=1e-4)


# -- rules ----------------------------------------------------------------------------------------------------------


def facts(
    kind: Any = "encoder", count: int = 3, source: Any = "full", rows: int | None = None, **changes: Any
) -> Facts:
    sources = tuple(SourceFacts(f"s{number}", source, rows=rows) for number in range(count))
    return Facts(kind, 1000, sources, changes.pop("overlap", None), "cpu", changes.pop("free_bytes", None))


def shown(own: Facts) -> str:
    rule = rule_for(own)
    recommended = hf_fda.advising.advice.Recommendation("tsv", {}, None, 1, ("why",), (), Cost(1.0, 1, 1))
    return str(Advice(own, rule.name, (recommended,), tuple(uncovered(own, rule.table))))


FIRING: dict[str, tuple[Facts, str, Any]] = {
    "sources without weights": (facts(source="anchors"), "fda", SHARED),
    "no blocks": (facts("unknown"), "tsv", ENCODERS),
    "adapters": (facts(source="adapter"), "fda", ADAPTERS),
    "images": (facts("vision"), "fda", DIGITS),
    "language models, with rows": (facts("decoder", rows=500), "divmerge", LANGUAGE),
    "two language models": (facts("decoder", 2), "fda", DECODERS),
    "language models": (facts("decoder", 4), "fda", DECODERS),
    "encoders, with rows": (facts(rows=999), "distill", WITH_DATA),
    "encoders, with many rows": (facts(rows=1000), "distill", WITH_DATA),
    "two encoders": (facts(count=2), "fda", ENCODERS),
    "encoders": (facts(count=5), "fda", ENCODERS),
}


@pytest.mark.parametrize("name", FIRING)
def test_every_rule_fires_where_it_should(name: str) -> None:
    own, first, table = FIRING[name]
    rule = rule_for(own)
    assert (rule.name, rule.proposals[0].method, rule.table) == (name, first, table)


def test_all_rules_are_tested_and_have_a_closed_form_and_options_that_exist() -> None:
    assert set(FIRING) == {rule.name for rule in RULES}
    for rule in RULES:
        assert any(one.closed for one in rule.proposals) or rule.table is SHARED
        assert len({one.label for one in rule.proposals}) == len(rule.proposals)
        for one in rule.proposals:
            assert resolve_method(one.method, one.options).data != "never" or one.data is None
            assert one.cells


CITED = {str(cell): cell for rule in RULES for one in rule.proposals for cell in one.cells}


@pytest.mark.parametrize("name", CITED)
def test_what_rules_cite_stands_in_the_tables(name: str) -> None:
    cell = CITED[name]
    assert table_with(cell)[cell.row][cell.column].split(" ±")[0] == cell.value


LEADING = ["adapters", "images", "encoders, with rows", "encoders, with many rows", "encoders", "language models"]


@pytest.mark.parametrize("name", LEADING)
def test_the_first_choice_is_within_a_point_of_the_best_row(name: str) -> None:
    cell = next(rule for rule in RULES if rule.name == name).proposals[0].cells[0]
    table = table_with(cell)
    best = number(table[best_row(table, cell.column)][cell.column])
    assert best - number(cell.value) <= (1 if best > 1 else 0.01) + 1e-9


def test_what_no_table_covers_is_said() -> None:
    said = {
        "no table covers an encoder-decoder": facts("encoder-decoder"),
        "no table covers an architecture": facts("unknown"),
        "no table covers a vision model with rows": facts("vision", rows=9),
        "no table covers adapters with rows": facts(source="adapter", rows=9),
        "is of 128 rows a task; here one has 50": facts(rows=50),
        "with data is of 5 sources; here are 3": facts(rows=128),
        "is of 2 to 5 sources; here are 9": facts(count=9),
        "is of 4 sources; here are 7": facts("vision", 7),
    }
    for text, own in said.items():
        assert any(text in line for line in uncovered(own, rule_for(own).table)), text
    mixed = replace(facts(), sources=(SourceFacts("a", "full"), SourceFacts("b", "adapter"), SourceFacts("c", "full")))
    assert "adapters beside full checkpoints" in uncovered(mixed, ENCODERS)[0]
    some = replace(facts(), sources=(SourceFacts("a", "full", rows=9), SourceFacts("b", "full")))
    assert rule_for(some).name == "two encoders" and "some sources have no rows" in uncovered(some, ENCODERS)[0]
    assert uncovered(facts(), ENCODERS) == []


def test_task_vectors_unlike_those_of_the_table_are_said() -> None:
    plain = overlap_of(same, lambda step, _: 4 * step)
    said = " ".join(uncovered(facts(count=2, overlap=plain), ENCODERS))
    assert "4.00 times the shortest" in said and "between 1.00 and 1.00" in said
    assert uncovered(facts(count=2, overlap=plain), LANGUAGE) == []


@pytest.mark.parametrize(
    ("family", "kind"), [("bert", "encoder"), ("vit", "vision"), ("llama", "decoder"), ("t5", "encoder-decoder")]
)
def test_kinds_of_models_are_told(family: str, kind: str) -> None:
    base = make_model(family)
    assert kind_of(open_inputs(base, [fine_tune(base, 1)]).base.layout) == kind


def test_an_architecture_that_is_not_known_is_merged_by_tensors(tmp_path: Path) -> None:
    import json

    base = make_model("llama")
    for name, model in (("base", base), ("a", fine_tune(base, 1)), ("b", fine_tune(base, 2))):
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config |= {"architectures": ["StrangeForCausalLM"], "model_type": "strange"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    advice = hf_fda.advise(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], **QUIET)
    assert advice.rule == "no blocks" and advice.first.method == "tsv"
    assert "no table covers an architecture whose blocks are not known" in str(advice)


def test_anchors_alone_leave_one_way(classifiers: Any, tmp_path: Path) -> None:
    base, sources = classifiers
    made = hf_fda.FunctionalDualAnchors.construct(base, sources["two"], num_anchors=4, steps=2, **QUIET)
    advice = hf_fda.advise(base, {"two": made, "three": sources["three"]}, **QUIET)
    assert [one.label for one in advice.recommendations] == ["fda"]
    assert advice.facts.overlap is None


# -- advice ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_or_takes_too_long_comes_behind(classifiers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, sources = classifiers
    costs = {"isotropic": Cost(1.0, 50, 1), "fda": Cost(9.0, 10, 1), "tsv": Cost(2.0, 5, 1)}
    monkeypatch.setattr("hf_fda.advising.candidates.cost_of", lambda plan: costs[plan.config.name])
    monkeypatch.setattr("hf_fda.advising.facts.free_bytes", lambda device: 20)
    advice = hf_fda.advise(base, sources, **QUIET)
    assert [one.method for one in advice.recommendations] == ["fda", "tsv", "isotropic"]
    assert "needs 50 bytes of memory" in advice.recommendations[-1].reasons[1]
    advice = hf_fda.advise(base, sources, seconds=3, **QUIET)
    assert [one.method for one in advice.recommendations] == ["tsv", "isotropic", "fda"]
    assert [one.place for one in advice.recommendations] == [1, 2, 3]
    costs |= {"fda": Cost(None, 10, 1), "tsv": Cost(None, 5, 1)}
    again = hf_fda.advise(base, sources, seconds=3, **QUIET)
    assert [one.method for one in again.recommendations] == ["tsv", "isotropic", "fda"]
    assert again.recommendations[-1].reasons[1] == "placed behind: how long it takes is not predicted"
    assert "more than the 3.0 s that are allowed" in advice.recommendations[-1].reasons[1]


def test_advice_states_the_cost_of_the_plan_and_merges_with_its_arguments(classifiers: Any, tmp_path: Path) -> None:
    (base, sources), before = classifiers, set(tmp_path.iterdir())
    advice = hf_fda.advise(base, sources, **QUIET)
    plan = hf_fda.plan(base, sources, **advice.first.arguments, device="cpu", output=tmp_path / "merged")
    assert advice.first.cost.peak_memory_bytes == plan.peak_memory_bytes
    assert advice.first.cost.disk_bytes == plan.disk_bytes
    assert advice.first.flags == "--method isotropic --scaling 3.0"
    text, page = str(advice), advice._repr_html_()
    for one in advice.recommendations:
        assert one.label in text and one.label in page and one.flags in text
    assert "README.md, Real encoders: isotropic 3.0, average 0.841" in text
    assert set(tmp_path.iterdir()) == before


def test_what_cannot_be_done_is_left_out_and_said(classifiers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fda.planning import check_merge

    def picky(inputs: Any, config: Any, *others: Any) -> Any:
        if config.name != "fda":
            raise InputError(f"no {config.name} of these")
        return check_merge(inputs, config, *others)

    base, sources = classifiers
    monkeypatch.setattr("hf_fda.advising.candidates.check_merge", picky)
    advice = hf_fda.advise(base, sources, **QUIET)
    assert [one.label for one in advice.recommendations] == ["fda on anchors alone"]
    assert advice.notes[1:] == ("not possible here: no isotropic of these", "not possible here: no tsv of these")
    assert "has tokenizer files" in advice.notes[0]  # for synthetic rows
    with pytest.raises(InputError, match="no ties of these"):
        hf_fda.advise(base, sources, "ties", **QUIET)


class Family:
    """A bare encoder and three classifiers of two labels, with a tokenizer."""

    def __init__(self, folder: Path) -> None:
        tokenizer = wordpiece(folder / "words", WORDS)
        base = t.BertModel(t.BertConfig(**TEXT, max_position_embeddings=40)).eval()
        self.base, self.sources = save(folder / "base", base, tokenizer), {}
        for seed, task in enumerate(("one", "two", "three"), 1):
            torch.manual_seed(seed)
            model = t.BertForSequenceClassification(t.BertConfig(**TEXT, max_position_embeddings=40, num_labels=4))
            model.bert.load_state_dict(fine_tune(base, seed, 0.2).state_dict())
            with torch.no_grad():
                model.classifier.weight.normal_(0, 2)
            self.sources[task] = save(folder / task, model.eval(), tokenizer)
        self.tokenizer = tokenizer

    @torch.no_grad()
    def rows_that_suit(self, merged: hf_fda.Merged) -> dict[str, list[dict[str, Any]]]:
        """Rows whose labels are those that a merged model gives."""
        inputs = self.tokenizer(TEXTS, padding=True, return_tensors="pt")
        found = {}
        for task in self.sources:
            said = merged.load(task).eval()(**inputs).logits.argmax(-1).tolist()
            found[task] = [{"text": text, "label": label} for text, label in zip(TEXTS, said, strict=True)]
        return found


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path)


def test_a_method_of_the_users_that_is_recommended_is_no_second_one(family: Family) -> None:
    advice = hf_fda.advise(family.base, family.sources, "fda", **QUIET)
    assert [one.label for one in advice.recommendations if one.method == "fda"] == [
        "fda with synthetic data",
        "fda on anchors alone",
    ]


OWN: dict[str, Any] = {"method": "task_arithmetic", "scaling": -2.0}


@pytest.mark.parametrize("suited", [{"method": "isotropic", "scaling": 3.0}, OWN])
def test_what_does_best_on_held_out_rows_comes_first(family: Family, tmp_path: Path, suited: dict[str, Any]) -> None:
    right = hf_fda.merge(family.base, family.sources, output=tmp_path / "right", **QUIET, **suited)
    held = family.rows_that_suit(right)
    advice = hf_fda.advise(family.base, family.sources, try_data=held, keep=2, **QUIET, **OWN)
    first, second, third, *others = advice.recommendations
    labels = {"fda with synthetic data", "isotropic scaling=3.0", "task_arithmetic scaling=-2.0"}
    assert {first.label, second.label, third.label} == labels and third.tried is not None
    assert first.method == suited["method"]
    assert first.tried is not None and second.tried is not None
    assert first.tried.score == 1 and set(first.tried.scores.values()) == {1}
    assert second.tried.score < 1
    assert not first.tried.folder.exists()
    assert all(one.tried is None for one in others) and len(others) == 2
    assert advice.individual is not None and set(advice.individual) == set(family.sources)
    assert "Tried on held-out rows (accuracy; score: mean over tasks)" in str(advice)
    assert "fine-tunes alone" in str(advice) and "fine-tunes alone" in advice._repr_html_()


def test_rows_are_looked_at_by_what_takes_them(family: Family) -> None:
    data = dict.fromkeys(family.sources, TEXTS)
    held = {task: [{"text": text, "label": 0} for text in TEXTS] for task in family.sources}
    advice = hf_fda.advise(family.base, family.sources, data=data, try_data=held, keep=1, **QUIET)
    first, second, third, fourth = sorted(advice.recommendations, key=lambda one: one.place)
    assert (first.label, second.label) == ("distill with data", "fda with data")
    assert (third.label, fourth.label) == ("divmerge granularity=tensor with data", "tsv")
    assert first.tried is not None and third.cost.seconds is None and first.cost.seconds is not None
    assert [own.rows for own in advice.facts.sources] == [15, 15, 15]
    assert "the table is of 128 rows a task; here one has 15" in advice.uncovered


def test_a_method_of_ones_own_may_be_a_config(family: Family) -> None:
    own = hf_fda.FDAConfig(initial="tsv", epochs=1)
    advice = hf_fda.advise(family.base, family.sources, own, **QUIET)
    assert advice.recommendations[-1].options["epochs"] == 1
    assert advice.recommendations[-1].reasons == ("your own",)
    same = hf_fda.advise(family.base, family.sources, "tsv", **QUIET)
    assert [one.label for one in same.recommendations] == [
        *("fda with synthetic data", "isotropic scaling=3.0", "fda on anchors alone", "tsv")
    ]


def test_what_was_tried_is_not_done_again(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = family.rows_that_suit(hf_fda.merge(family.base, family.sources, "linear", tmp_path / "other", **QUIET))
    settings: dict[str, Any] = {"output": tmp_path / "tried", "keep": 1, **QUIET}
    first = hf_fda.advise(family.base, family.sources, try_data=held, **settings).first
    assert first.tried is not None and first.tried.folder.is_dir()
    weights = first.tried.folder / "model.safetensors"
    written = weights.stat().st_mtime_ns

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("was scored already")

    monkeypatch.setattr("hf_fda.advising.trying.evaluate", never)
    again = hf_fda.advise(family.base, family.sources, try_data=held, **settings).first
    assert again.tried == first.tried and weights.stat().st_mtime_ns == written
    monkeypatch.undo()
    changed = {**held, "one": held["one"][:7]}
    other = hf_fda.advise(family.base, family.sources, try_data=changed, **settings).first
    assert other.tried is not None and weights.stat().st_mtime_ns == written


def test_scores_of_unlike_metrics_are_compared_by_what_they_beat() -> None:
    scores = [{"a": 0.9, "b": -3.0}, {"a": 0.8, "b": -2.0}, {"a": 0.7, "b": math.nan}]
    assert totals(scores, alike=False) == [0.75, 0.75, 0.0]
    assert totals(scores[:2], alike=True) == pytest.approx([-1.05, -0.6])
    assert totals(scores[:1], alike=False) == [0]


def test_a_lower_perplexity_comes_first(tmp_path: Path) -> None:
    from vocabularies import bpe, llama

    tokenizer = bpe(pad_token=None)
    base = llama(len(tokenizer), tokenizer)
    folder = save(tmp_path / "base", base, tokenizer)
    sources = {name: save(tmp_path / name, fine_tune(base, seed), tokenizer) for seed, name in enumerate("ab", 1)}
    held = dict.fromkeys(sources, TEXTS[:5])
    own: dict[str, Any] = {"method": "task_arithmetic", "scaling": 60.0}
    advice = hf_fda.advise(folder, sources, try_data=held, keep=1, seconds=1e-9, **QUIET, **own)
    tried = [one.tried for one in advice.recommendations if one.tried is not None]
    assert tried[0].scores["a"] < tried[1].scores["a"] and tried[0].score > tried[1].score
    assert "minus its logarithm" in str(advice)


# -- bad input ------------------------------------------------------------------------------------------------------

ROWS = [{"text": "the fox", "label": 0}]
ALL = dict.fromkeys(("one", "two", "three"), ROWS)

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown task": ({"try_data": {**ALL, "tow": ROWS}}, "there is no source 'tow': did you mean 'two'"),
    "task without rows": ({"try_data": {"one": ROWS}}, "try_data has no rows of 'two', 'three'"),
    "no rows": ({"try_data": {**ALL, "one": []}}, "'one'"),
    "no label": ({"try_data": {**ALL, "one": [{"text": "fox"}]}}, "label"),
    "unknown column": ({"try_data": {**ALL, "one": {"path": ROWS, "columns": ["txt"]}}}, "txt"),
    "no such file": ({"try_data": {**ALL, "one": "nowhere.jsonl"}}, "no file or folder 'nowhere.jsonl'"),
    "not a mapping": ({"try_data": ROWS}, "try_data must be a mapping"),
    "unknown metric": ({"try_data": ALL, "metrics": "acuracy"}, "did you mean 'accuracy'"),
    "metric of nothing": ({"try_data": ALL, "metrics": {"tow": "f1"}}, "metrics: there is no source 'tow'"),
    "metric without rows": ({"metrics": "f1"}, "metrics and try_rows are of held-out rows"),
    "keep": ({"keep": 0}, "keep must be a whole number"),
    "seconds": ({"seconds": -1}, "seconds must be a number above 0"),
    "unknown method": ({"method": "tis"}, "did you mean 'ties'"),
    "unknown option": ({"method": "ties", "desity": 0.1}, "did you mean 'density'"),
    "option of no method": ({"density": 0.1}, "density"),
    "data": ({"data": {"tow": ["the fox"]}}, "there is no source 'tow'"),
    "data in words": ({"data": "rows.jsonl"}, "must be a mapping from task name to rows"),
    "own method without data": ({"method": "regmean"}, "looks at unlabelled rows"),
    "dtype": ({"dtype": "float23"}, "did you mean 'float32'"),
    "rank": ({"rank": 4}, "needs as_adapter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_any_work(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    for place in ("advising.gather", "trying.run", "trying.score"):
        monkeypatch.setattr(f"hf_fda.advising.{place}", never)
    arguments, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        hf_fda.advise(family.base, family.sources, output=tmp_path / "out", **QUIET, **arguments)
    assert not (tmp_path / "out").exists()


def test_one_source_needs_no_advice(family: Family) -> None:
    with pytest.raises(InputError, match="advice is on merging several sources"):
        hf_fda.advise(family.base, {"one": family.sources["one"]}, **QUIET)


def test_a_folder_of_something_else_is_refused(family: Family, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(InputError, match="holds something else"):
        hf_fda.advise(family.base, family.sources, output=tmp_path / "full", **QUIET)


# -- the command line -----------------------------------------------------------------------------------------------


def test_the_command_prints_what_python_returns(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_fda.advising.candidates.cost_of", lambda plan: Cost(2.0, 1000, 100))
    monkeypatch.setattr("hf_fda.advising.facts.free_bytes", lambda device: 10**9)
    held = {}
    for task in family.sources:
        held[task] = tmp_path / f"{task}.csv"
        held[task].write_text("words,mark\n" + "".join(f"{text},{n % 4}\n" for n, text in enumerate(TEXTS)))
    words = ["advise", "--base", str(family.base), "--output", str(tmp_path / "tried"), "--keep", "1", "--quiet"]
    words += ["--device", "cpu", "--method", "task_arithmetic", "--scaling", "-2.0", "--try-rows", "9"]
    for task, folder in family.sources.items():
        words += ["--source", f"{task}={folder}", "--try", f"{task}={held[task]}"]
        words += ["--try-columns", f"{task}=words", "--label", f"{task}=mark"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    rows = {task: {"path": str(path), "columns": ["words"], "label": "mark"} for task, path in held.items()}
    expected = hf_fda.advise(
        family.base,
        family.sources,
        "task_arithmetic",
        tmp_path / "tried",
        try_data=rows,
        try_rows=9,
        keep=1,
        scaling=-2.0,
        **QUIET,
    )
    assert printed == f"{expected}\n"
    assert "isotropic scaling=3.0" in printed and "peak MB" in printed


def test_the_command_refuses_bad_arguments(family: Family, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    start = ["advise", "--base", str(family.base)]
    for folder in family.sources.values():
        start += ["--source", str(folder)]
    assert main([*start, "--label", "one=mark"]) == 2
    assert "'one' has no rows" in capsys.readouterr().err
    assert main([*start, "--try", "one"]) == 2
    assert "write it as --try TASK=" in capsys.readouterr().err
    (tmp_path / "ties.yml").write_text("merge_method: ties\nbase_model: a\nmodels:\n  - model: b\n")
    assert main(["advise", str(tmp_path / "ties.yml")]) == 2
    assert "advice takes --base and --source" in capsys.readouterr().err
