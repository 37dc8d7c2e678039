"""Model cards and dataset cards, rendered from templates and from recorded facts only."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml

from hf_fda.evaluation.published import model_index
from hf_fda.merge_methods.fda import FDAConfig
from hf_fda.version import versions

if TYPE_CHECKING:
    from hf_fda.adapters.report import AdapterReport
    from hf_fda.anchors.manifest import AnchorsInfo
    from hf_fda.block_losses import BlockLosses
    from hf_fda.coefficients import Coefficients
    from hf_fda.evaluation.scores import Scores


STATED = ("tokenizer", "pad_to_multiple_of")
"""Arguments that a card lists where they were given."""

OF_DATA = ("rows", "max_length", "with_data")
"""Options that mean nothing to a merge that looked at no data."""

PIPELINES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForImageTextToText": "image-text-to-text",
    "Model": "feature-extraction",
}
"""The Hub's words for what classes of models do, by the ends of their names; of others the card says nothing."""

ROUNDING = 1e-5
"""Share of a norm below which what factors leave out is rounding."""


@dataclass(frozen=True)
class Found:
    """What lies beside merged weights and is told on their card.

    `report` says of a merged adapter what its factors leave out, `coefficients` what the merge learnt, `losses` how
    well its blocks were fitted, `scores` how good it is; None where there is none. `pictures` are files of
    pictures, `seen` those of an analysis with what they show.
    """

    report: AdapterReport | None = None
    coefficients: Coefficients | None = None
    losses: BlockLosses | None = None
    scores: Scores | None = None
    pictures: Collection[str] = ()
    seen: Mapping[str, str] = field(default_factory=dict)


@cache
def _environment() -> jinja2.Environment:
    installed = Path(__file__).parent / "model_cards"
    folder = installed if installed.is_dir() else Path(__file__).parent.parent / "model_cards"
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )


def model_card(arguments: Mapping[str, Any], facts: Mapping[str, Any], found: Found) -> str:
    """The card of a merged model or adapter.

    Args:
        arguments: the merge as `merge_config.yaml` records it.
        facts: model class, heads, licences, notes: what the plan knows.
        found: what lies beside the weights.
    """
    report, scores = found.report, found.scores
    licences: Mapping[str, Sequence[str]] = facts["licences"]
    each = {name if n == 0 else f"{name} ({n + 1})": own for name, all in licences.items() for n, own in enumerate(all)}
    licence, licence_line = output_licence(each)
    ids = [*facts["models"], arguments["base"], *arguments["sources"].values()]
    metadata: dict[str, Any] = {
        "base_model": list(dict.fromkeys(hub_name(id) for id in ids if hub_name(id))),
        "base_model_relation": "merge",
        "library_name": "transformers" if report is None else "peft",
        "tags": ["merge", "hf_fda", arguments["method"]],
    }
    if not metadata["base_model"]:
        del metadata["base_model"], metadata["base_model_relation"]
    datasets = [*facts["datasets"], *_anchors_datasets(arguments)]
    if datasets:
        metadata["datasets"] = list(dict.fromkeys(datasets))
    if licence:
        metadata["license"] = licence
    if facts["languages"]:
        metadata["language"] = list(facts["languages"])
    if pipeline := _pipeline(facts["model_class"]):
        metadata["pipeline_tag"] = pipeline
    title = f"{', '.join(arguments['sources'])}: merged by {arguments['method']}"
    if scores is not None and (index := model_index(scores, title)):
        metadata["model-index"] = index
    settings = {**arguments["options"], "dtype": arguments["dtype"], "seed": arguments["seed"]}
    settings |= {name: arguments[name] for name in STATED if name in arguments}
    # How many synthetic rows were drawn stands with the data: fewer than `rows` allows.
    void = OF_DATA if not facts["data"] else ("rows",) if facts.get("synthetic") else ()
    settings = {name: value for name, value in settings.items() if name not in void}
    if report is not None:
        settings |= _budget(arguments, report)
    return _render(
        "merged_model.md.jinja",
        metadata=metadata,
        made_with=facts["versions"],
        title=title,
        where="PATH_OR_HUB_ID",
        method=arguments["method"],
        base=facts["shown"]["base"],
        base_call=_call(arguments["base"]),
        sources={name: facts["shown"].get(name) or shown(id) for name, id in arguments["sources"].items()},
        settings={name: _words(value) for name, value in settings.items()},
        facts={**facts, "licences": {name: " and ".join(own) for name, own in licences.items()}},
        report=report,
        coefficients=found.coefficients,
        losses=found.losses,
        pictures=found.pictures,
        seen=found.seen,
        licence_line=licence_line,
        scores=scores,
        spent=_spent(facts.get("spent")),
    )


def _anchors_datasets(arguments: Mapping[str, Any]) -> list[str]:
    """The Hub names of the anchors that were merged."""
    given = [*arguments["sources"].values(), *arguments.get("anchors", {}).values()]
    return [id.removeprefix("datasets/").partition("@")[0] for id in given if id.startswith("datasets/")]


def _pipeline(model_class: str) -> str | None:
    """The Hub's word for what a class of models does.

    >>> _pipeline("LlamaForCausalLM")
    'text-generation'
    """
    return next((tag for end, tag in PIPELINES.items() if model_class.endswith(end)), None)


def _spent(spent: Mapping[str, Any] | None) -> str:
    """What a run took, in a sentence; nothing where it is not known."""
    if not spent:
        return ""
    several = spent["processes"] > 1
    where = f"{spent['processes']} processes" if several else spent["hardware"]
    text = f"It took {spent['seconds']:,.1f} seconds on {where}"
    text += f" ({spent['hardware']} each)" if several else ""
    peaks = {"": spent["peak_bytes"], " on the device": spent["device_peak_bytes"]}
    held = " and ".join(f"{peak / 1e6:,.0f} MB{place}" for place, peak in peaks.items() if peak)
    who = "the first process" if several else "the process"
    text += f"; {who} held at most {held}, libraries included." if held else "."
    return text + (" It went on from what an earlier run had finished." if spent["resumed"] else "")


def anchors_card(
    info: AnchorsInfo,
    rows: Sequence[Mapping[str, Any]],
    where: str = "PATH_OR_DATASET_ID",
    picture: str | None = None,
) -> str:
    """The card of an anchors dataset.

    Args:
        info: what `anchors.json` records.
        rows: the index, a row a block.
        where: what opens them.
        picture: the file of the picture of losses and spectra, if there is one.
    """
    models = {"base": info.base, "source": info.source}
    names = {role: _place(own) for role, own in models.items()}
    licences = {role: list(own.get("licences") or ["unknown"]) for role, own in models.items()}
    each = {f"{role} ({n})" if n else role: own for role, all in licences.items() for n, own in enumerate(all)}
    licence, licence_line = output_licence(each)
    defaults = FDAConfig().options()
    metadata: dict[str, Any] = {
        "pretty_name": f"Functional dual anchors of {names['source']}",
        "tags": ["hf_fda", "functional-dual-anchors", "model-merging"],
        "configs": [{"config_name": "default", "data_files": "index/anchors.parquet"}],
    }
    if licence:
        metadata["license"] = licence
    return _render(
        "anchors_dataset.md.jinja",
        metadata=metadata,
        made_with=versions(),
        info=asdict(info),
        where=where,
        names=names,
        commits={role: own.get("commit") or "not on the Hub" for role, own in models.items()},
        licences={role: " and ".join(own) for role, own in licences.items()},
        licence_line=licence_line,
        base_call=f"{info.base['id']}@{info.base['commit']}" if info.base.get("commit") else "PATH_TO_BASE",
        settings={name: _words(value) for name, value in info.config.items() if value != defaults.get(name)},
        kept={name: _words(value) for name, value in info.config.items() if value == defaults.get(name)},
        rows=rows,
        rounding=[{"block": block, **own} for block, own in info.rounding.items()],
        picture=picture,
        left_out=sorted({name for row in rows for name in row["left_out"]}),
    )


def _place(origin: Mapping[str, Any]) -> str:
    """A model as `anchors.json` records it, for readers elsewhere."""
    return str(origin["id"]) if origin.get("commit") else f"{Path(origin['id']).name} (a local model)"


def output_licence(licences: Mapping[str, str]) -> tuple[str | None, str]:
    """The licence of a merge of models, where their own cards state one and the same; never guessed.

    >>> output_licence({"base": "mit", "sst2": "mit"})[0]
    'mit'
    """
    known = set(licences.values())
    if known == {"unknown"}:
        return None, "Licence: unknown; none of the models' cards states one."
    if "unknown" in known:
        silent = ", ".join(name for name, value in licences.items() if value == "unknown")
        return (
            None,
            f"Licence: unknown; the cards of {silent} state none. The others: {_listed(known - {'unknown'})}.",
        )
    if len(known) > 1:
        return (
            None,
            f"Licence: the models' licences differ ({_listed(known)}); all of them apply to what is made from them.",
        )
    (only,) = known
    return only, f"Licence: {only}, as stated by every model's own card."


def hub_name(id: str) -> str | None:
    """The Hub name in a recorded id, "org/name@commit" or "org/name/folder@commit" with the whole commit hash; None for
    a folder on a disk."""
    match = re.fullmatch(r"(?!datasets/)([\w.-]+(?:/[\w.-]+)?)(?:/[\w.-]+)*@[0-9a-f]{40}", id)
    return match[1] if match else None


def shown(id: str) -> str:
    """A model's id for readers elsewhere: of a folder on a disk its own name alone.

    >>> shown("/home/me/models/sst2")
    'sst2 (a folder, not on the Hub)'
    """
    here = Path(id).is_absolute() or id.startswith((".", "~")) or os.path.isdir(id)
    return f"{Path(id).name} (a folder, not on the Hub)" if here else id


def _call(id: str) -> str:
    """The arguments by which a library opens a recorded model; of one that is not on the Hub, what has to be said."""
    name = hub_name(id)
    return f'"{name}", revision="{id.partition("@")[2]}"' if name else '"PATH_TO_BASE"'


def _budget(arguments: Mapping[str, Any], report: AdapterReport) -> dict[str, Any]:
    """What limits a merged adapter's factors."""
    given = {name: arguments[name] for name in ("rank", "energy") if arguments.get(name) is not None}
    return given or {"rank": "exact" if report.error < ROUNDING else "that of the sources together"}


def _render(template: str, metadata: Mapping[str, Any], made_with: Mapping[str, str], **values: Any) -> str:
    text = _environment().get_template(template)
    line = (
        f"Made with hf_fda {made_with['hf_fda']}, torch {made_with['torch']}, transformers {made_with['transformers']}."
    )
    dumped = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True).strip()
    return text.render(metadata=dumped, versions_line=line, **values)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{name} {_words(item)}" for name, item in value.items() if item is not None)
        return inner.removeprefix("method ")
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
