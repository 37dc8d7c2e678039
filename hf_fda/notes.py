"""What a user may not expect of a merge, in words."""

from __future__ import annotations

from collections.abc import Mapping

from hf_fda.adapters import AdapterCheckpoint, adapter_of
from hf_fda.adapters.targets import AdapterPlan
from hf_fda.cards import shown
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.errors import few
from hf_fda.inputs import Inputs
from hf_fda.merge_methods import FDAConfig, MethodConfig
from hf_fda.merge_methods.regmean import RegMeanConfig
from hf_fda.merge_methods.unitwise import UnitwiseConfig
from hf_fda.plan_data import PlanData
from hf_fda.progress import logger
from hf_fda.recipes import Output
from hf_fda.states.footprint import StatesFootprint
from hf_fda.statistics.layers import layer_weights


def notes_of(
    inputs: Inputs,
    config: MethodConfig,
    result: Output,
    adapter: AdapterPlan | None,
    ranks: Mapping[str, int],
    data: PlanData,
) -> list[str]:
    """What a plan, a card and a log say beside the facts.

    Args:
        inputs: base and sources.
        config: the merge method, complete.
        result: how every tensor of the merged model is made.
        adapter: the adapter that is written, if one is.
        ranks: of the factors that adaptation steps on.
        data: what it looks at beside weights.
    """
    notes = [*inputs.vocabulary.notes, *_adapter_notes(inputs, adapter), *_tied(adapter)]
    if not inputs.base.layout.known:
        notes.append(
            f"transformers does not know {inputs.base.layout.model_class.__name__}: it is merged tensor by tensor, by "
            "the names in the files, and the output has the base's configuration and code"
        )
    for source in inputs.weighted:
        own = adapter_of(source.checkpoint)
        if own is not None:
            notes.extend(_another_base(source.name, own, inputs.base))
        if source.checkpoint.unexpected:
            unknown = few(source.checkpoint.unexpected)
            notes.append(f"source '{source.name}': left out, as its class has no place for it: {unknown}")
        absent = [name for name in source.absent if name in result.recipes and result.recipes[name].rule == "method"]
        if absent:
            notes.append(f"source '{source.name}' lacks {len(absent)} tensors; they count as the base's for it")
    if inputs.base.unexpected:
        notes.append(f"base: left out, as its class has no place for it: {few(inputs.base.unexpected)}")
    if result.layout is not inputs.base.layout:
        notes.append(f"the output is a {result.layout.model_class.__name__}, as the sources are")
    if isinstance(config, FDAConfig) and config.parametrization == "factors":
        notes.append(_stepped_on(ranks))
    if data.assumed:
        notes.append("whether the weights show what text they saw is looked at once they were downloaded")
    if data.note is not None:
        notes.append(data.note)
    if isinstance(config, UnitwiseConfig) and data.rows:
        states, synthetic = StatesFootprint.of(inputs, config, data.rows), all(own.drawn for own in data.rows.values())
        notes.append(_shown(config, states, synthetic))
    if isinstance(config, RegMeanConfig):
        notes.append(_solved(inputs, config, result))
    if isinstance(config, UnitwiseConfig) and config.rest == "base":
        notes.append("what lies before the blocks is the base's (rest=base)")
    return notes


def _shown(config: UnitwiseConfig, states: StatesFootprint, synthetic: bool) -> str:
    """What the merge does with rows, and what its estimates take them to be."""
    place = "beside" if isinstance(config, FDAConfig) and config.with_data != "states" else "in place of"
    what = f" {place} anchors" if isinstance(config, FDAConfig) else ""
    rows = "synthetic" if synthetic else "real"
    return (
        f"blocks are matched on the hidden states of {rows} rows{what}; memory and disk are those of "
        f"{states.positions} positions a row"
    )


def _solved(inputs: Inputs, config: RegMeanConfig, result: Output) -> str:
    """Which tensors RegMean solves for, and which it averages."""
    merged = [result.base_names[name] for name, own in result.recipes.items() if own.config is config]
    solved, roles = layer_weights(inputs.base, merged), inputs.base.layout.roles
    stacks = "; stacks of experts too, as no single expert's inputs show" if "stack" in roles.values() else ""
    return f"{len(solved)} weights of linear layers are solved for, the mean is taken of the rest{stacks}"


def _stepped_on(ranks: Mapping[str, int]) -> str:
    """What adaptation steps on where it was asked for factors."""
    if not ranks:
        return "no matrix of the blocks is of low rank here, so adaptation steps on coefficients throughout"
    low, high = min(ranks.values()), max(ranks.values())
    of_rank = f"of rank {high}" if low == high else f"of ranks {low} to {high}"
    return f"adaptation steps on thin factors {of_rank} in {len(ranks)} matrices, on coefficients in the rest"


def _tied(adapter: AdapterPlan | None) -> list[str]:
    """A warning of factors for what the model ties, which PEFT holds apart only until it merges them."""
    if adapter is None:
        return []
    said = []
    for places in adapter.layout.shared.values():
        changed = [target for target in adapter.targets if target.name in places]
        factored = [target for target in changed if target.factored]
        if len(places) == 1 or not factored or (len(factored) == 1 and len(changed) == len(places)):
            continue
        alike = len({target.base_name for target in changed}) < len(changed)
        which = (
            "the same factors for all of them"
            if alike
            else f"factors of its own for {few([repr(own.name) for own in factored])}"
        )
        way_out = (
            "hf_fda.merge(base, [adapter], 'passthrough') does it rightly" if alike else "no tied model is the same"
        )
        said.append(
            f"the model ties {few([repr(place) for place in places])}: the adapter has {which}, which is right as PEFT "
            "loads it, but PEFT's merge_and_unload() adds all factors to the one weight that is tied, and so makes "
            f"another model; {way_out}"
        )
    for line in said:
        logger.warning(line)
    return said


def _another_base(name: str, adapter: AdapterCheckpoint, base: Checkpoint) -> list[str]:
    """A warning where an adapter's configuration names another base; folders are told apart by their own names."""
    stated = adapter.files.config.base_model_name_or_path
    if not stated or not base.id or base.location is None:
        return []
    theirs, ours = (str(id).partition("@")[0].rstrip("/").rpartition("/")[2] for id in (stated, base.id))
    if theirs == ours:
        return []
    said = (
        f"source '{name}': its configuration says that it was trained on '{shown(stated)}', the base is "
        f"'{shown(base.id)}'"
    )
    logger.warning(said)
    return [said]


def _adapter_notes(inputs: Inputs, adapter: AdapterPlan | None) -> list[str]:
    """Which sources are the reason that an adapter without a budget is not thin."""
    if adapter is None or adapter.budget.rank is not None or adapter.budget.energy is not None:
        return []
    factored = [target.base_name for target in adapter.targets if target.factored]
    thick = [
        f"'{source.name}'"
        for source in inputs.weighted
        if any(source.may_move(name) and source.rank(name) is None for name in factored)
    ]
    if not thick:
        return []
    return [
        f"what {few(thick)} changes is not of low rank (as of DoRA and full fine-tunes), so the adapter's factors may "
        "get full rank; rank or energy keeps them thin"
    ]
