"""What a merge looks at beside weights: rows that a user gives, rows drawn from the weights, or anchors alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_fda.adapters import adapter_of
from hf_fda.blocks import family_of
from hf_fda.data.opening import OpenedData, open_data
from hf_fda.data.request import ANCHORS, SYNTHETIC, Reading
from hf_fda.errors import InputError, UnreachableError
from hf_fda.inputs import Inputs
from hf_fda.merge_methods import FDAConfig, MethodConfig
from hf_fda.merge_methods.looking import RowsConfig
from hf_fda.settings import Settings


@dataclass(frozen=True)
class PlanData:
    """The data of a plan.

    `rows` are of data, for every task that the method looks at; `anchors` says that a user wants anchors in their
    place. `note` is why no rows are drawn where a method would look at such by itself.
    """

    rows: Mapping[str, OpenedData] = field(default_factory=dict)
    anchors: bool = False
    note: str | None = None

    @property
    def assumed(self) -> bool:
        """Whether rows are to be drawn from weights that were not downloaded yet."""
        return any(opened.assumed for opened in self.rows.values())

    @property
    def recorded(self) -> dict[str, Any]:
        """What `merge_config.yaml` says of it."""
        if self.anchors:
            return {"data": ANCHORS}
        return {"data": {task: dict(opened.record) for task, opened in self.rows.items()}} if self.rows else {}


def open_plan_data(
    data: Any,
    inputs: Inputs,
    config: MethodConfig,
    settings: Settings,
    trust_remote_code: bool = False,
    fetch: bool = True,
) -> PlanData:
    """The data of a plan, checked.

    Without any, "fda" looks at rows drawn from the weights where these are full fine-tunes of a text encoder whose
    embeddings show what text they saw: on these it is more accurate, from every start, than on anchors alone. An
    adapter's embeddings show nothing, and of decoders and images it was not found to help.

    Args:
        data: as a user gives it: by task, or a word; None where there is none.
        inputs: base and sources.
        config: of the merge method.
        settings: where and how the merge is written; the choice of rows is by its seed.
        trust_remote_code: run code that comes with a tokenizer.
        fetch: whether weights may be downloaded; those that are not here are assumed to show text.

    Raises:
        InputError: naming the task whose data cannot be used, and the way out.
        UnreachableError: when the Hub does not give what tells whether rows can be drawn.
    """
    reading = Reading(seed=settings.seed, trust_remote_code=trust_remote_code, fetch=fetch)
    if isinstance(data, str) and data == ANCHORS:
        return PlanData(anchors=True)
    if data is not None:
        return PlanData(open_rows(data, inputs, config, reading))
    if not isinstance(config, FDAConfig) or settings.budget is not None or not _may_show_text(inputs):
        return PlanData()
    try:
        return PlanData(open_rows(SYNTHETIC, inputs, config, reading))
    except UnreachableError:
        raise
    except InputError as error:
        reason = _reason(error, inputs)
        return PlanData(note=f"anchors alone are matched, as no rows can be drawn from the weights: {reason}")


def _reason(error: InputError, inputs: Inputs) -> str:
    """What was wrong, for a card: without where models lie, and without the way out for who asked for rows."""
    reason, _, _ = str(error).partition(";")
    for id in sorted({inputs.base.id, *(source.id for source in inputs.sources)}, key=len, reverse=True):
        reason = reason.replace(f" ({id})", "").replace(id, Path(id).name)
    return reason


def open_rows(data: Any, inputs: Inputs, config: MethodConfig, reading: Reading) -> dict[str, OpenedData]:
    """The rows of data that a method looks at, checked, by task.

    Args:
        data: as a user gives it, by task, or the word for rows drawn from the weights; None where there is none.
        inputs: base and sources.
        config: of a method that looks at data.
        reading: how rows are read; how many, and how long they are, is for the config to say.

    Raises:
        InputError: naming the task whose data cannot be used, and the way out.
    """
    if data is None:
        return {}
    assert isinstance(config, RowsConfig)
    own = replace(reading, rows=config.rows, max_length=config.max_length, compared=config.compares)
    return open_data(data, inputs, own, of_all=config.data == "must")


def _may_show_text(inputs: Inputs) -> bool:
    """Whether all sources are full fine-tunes of an encoder of text."""
    layout = inputs.base.layout
    if not layout.known or layout.config.is_encoder_decoder or family_of(layout) != "encoder":
        return False
    return all(own.weights is not None and adapter_of(own.weights.checkpoint) is None for own in inputs.sources)
