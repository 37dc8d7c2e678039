"""Options of the merge by functional dual anchors. The work itself is in `hf_fda.anchors` and the engine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hf_fda.merge_methods.config import LooksAt, MethodConfig, Scope, option, with_source_names
from hf_fda.merge_methods.looking import passes_over
from hf_fda.merge_methods.registry import method_class, register_config
from hf_fda.merge_methods.unitwise import UnitwiseConfig

Family = Literal["vision", "encoder", "decoder"]
Distance = Literal["cosine", "mse", "mae"]
AdaptationDistance = Literal["shift", "cosine", "mse", "mae"]
Optimizer = Literal["adamw", "muon"]
Precision = Literal["highest", "high", "medium"]
Schedule = Literal["constant", "linear"]
WithData = Literal["states", "mixed", "propagated"]
Parametrization = Literal["coefficients", "parameters", "factors"]

CONSTRUCTION_FIELDS = (
    "initialization",
    "num_anchors",
    "num_tokens",
    "steps",
    "optimizer",
    "learning_rate",
    "precision",
    "distance",
    "position_embeddings",
    "patience",
    "unit",
)
"""The options that determine the anchors; the others only act on the merge."""

COEFFICIENT_EPOCHS, FAR_EPOCHS = 20, 60
"""Passes of adaptation on coefficients, over few anchors; and from the base, which is further away, or in decoders."""

FACTOR_EPOCHS = 40
"""The same on thin factors, which a start of full rank has been cut to."""

FEW_ANCHORS, MANY_ANCHORS = 64, 1024
"""Anchors of a unit; and of wide decoders at most, so that a block of 70 billion parameters fits a GPU of 80 GB."""

STEPS: dict[Optimizer, int] = {"muon": 25, "adamw": 1200}
"""Construction steps, at most."""

PROPAGATED_EPOCHS, PROPAGATED_BATCH = 10, 32
"""Passes over few rows, and examples a step, where blocks are adapted one after the other: as in `distill`."""

COEFFICIENT_STEP = 3e-2
"""Its step size, as a fraction of the sum of the task vectors' magnitudes, falling to zero."""


@dataclass(frozen=True, kw_only=True)
class FDAConfig(UnitwiseConfig):
    """Options of `fda`. What is None is chosen for the kind of model (`for_family`)."""

    name: ClassVar[str] = "fda"
    summary: ClassVar[str] = "match every source's blocks on anchors built from its weights alone"
    paper: ClassVar[str] = "Functional dual anchors, arXiv 2510.21223"
    scope: ClassVar[Scope] = "tensor"
    data: ClassVar[LooksAt] = "may"
    takes_anchors: ClassVar[bool] = True

    initial: str | MethodConfig | None = option(
        None,
        "where adaptation starts: base, or a parameter-space method, whose own options may follow; "
        "none: isotropic with scaling 3, task_arithmetic with 0.3 where all sources are adapters, or base where one is "
        "anchors only",
    )
    rest: str | MethodConfig | None = option(
        None,
        "what lies outside the blocks: base, or a parameter-space method; "
        "none: task_arithmetic, or base where a source is anchors only, with nothing beside them",
    )
    initialization: Literal["weights", "gaussian"] = option("weights", "what anchors start from")
    num_anchors: int | None = option(
        None, "anchors per block and source; none: 64, in decoders half the width, from 64 to 1,024", minimum=1
    )
    num_tokens: int | None = option(None, "tokens per anchor; by kind of model", minimum=1)
    steps: int | None = option(None, "construction steps; none: 25 of muon, of adamw 1200 as published", minimum=0)
    optimizer: Optimizer = option(
        "muon", "of construction: momentum made orthogonal, its step size falling to zero; or adamw, as published"
    )
    learning_rate: float = option(1e-2, "step size of construction", minimum=0)
    precision: Precision = option(
        "medium",
        "of float32 products while anchors and blocks move: medium is bfloat16 where there is such, high TF32, "
        "highest all",
    )
    distance: Distance = option("cosine", "distance of a block's outputs in construction")
    position_embeddings: bool | None = option(
        None, "add the source's position embeddings to the anchors; by kind of model"
    )
    patience: int | None = option(
        40, "adamw stops constructing when the loss has not fallen by 1 % in so many steps; none: never", minimum=1
    )
    epochs: int | None = option(
        None,
        "passes of adaptation over all anchors, or rows; by parametrization and kind of model, and fewer over more "
        "than 64 anchors or rows a task",
        minimum=0,
    )
    adaptation_learning_rate: float | None = option(None, "Adam step size of adaptation; by parametrization", minimum=0)
    adaptation_schedule: Schedule = option(
        "linear", "the step size of adaptation stays, or falls to zero over all its steps"
    )
    adaptation_distance: AdaptationDistance | None = option(
        None,
        "distance of a block's outputs in adaptation; shift: squared, in the metric of the source's own shift (of the "
        "last block, where propagated, by nine tenths of what it changes of the source's answers); by kind of model",
    )
    interpolation: float | None = option(
        None,
        "how far the merge goes from its start (0) to the adapted parameters (1), on the straight line between them "
        "(between the factors, where these are stepped on); "
        "none: half way from tsv and isotropic in text models unless on factors or propagated, else all the way",
        minimum=0,
        maximum=1,
    )
    metric_power: float = option(
        0.5, "how much more the main directions of a source's shift count; 0: all alike", minimum=0
    )
    parametrization: Parametrization | None = option(
        None,
        "what adaptation steps on: elementwise coefficients of the sources' task vectors, parameters, or thin factors "
        "of what is added to the base's matrices (of the adapter's rank, or the sum of the sources'; coefficients "
        "of the rest, and where full rank is allowed); "
        "none: coefficients, factors where an adapter is written, parameters where a source is anchors only",
    )
    with_data: WithData | None = option(
        None,
        "what adaptation matches for a source with rows of data: states, the real hidden states of its blocks in place "
        "of anchors, which are not constructed then; mixed: both; or propagated: both, but a block is given the hidden "
        "states that the merged blocks before it make of the rows, one block after the other; none: propagated on "
        "synthetic rows, else states",
    )
    batch_size: int | None = option(
        None, "anchors and rows per adaptation step; none: 128, or 32 where propagated", minimum=1
    )

    @property
    def propagates(self) -> bool:
        """As `UnitwiseConfig.propagates`; without rows there is nothing to propagate."""
        return self.with_data == "propagated"

    def for_family(self, family: Family, hidden_size: int, rows: int = 0, synthetic: bool = False) -> FDAConfig:
        """The config with every open option filled in for this kind of model.

        Args:
            family: "vision", "encoder" (text) or "decoder".
            hidden_size: d of the blocks; from 1024 on a text model counts as large.
            rows: of data, of the task that has most; adaptation passes less often over many.
            synthetic: whether any of these are drawn from weights.
        """
        if self.with_data is None:
            own = dataclasses.replace(self, with_data="propagated" if synthetic else "states")
            return own.for_family(family, hidden_size, rows)
        large = hidden_size >= 1024 and family != "vision"
        decoder = family == "decoder"
        chosen: dict[str, Any] = {
            "unit": ("block",),
            # The gradient of a matrix has no higher rank than there are tokens.
            "num_anchors": min(max(FEW_ANCHORS, hidden_size // 2), MANY_ANCHORS) if decoder else FEW_ANCHORS,
            "steps": STEPS[self.optimizer],
            "num_tokens": None if family == "vision" else 5,
            "position_embeddings": family == "encoder",
            # A head of a task's own reads what that task wrote; one output layer for all reads everything alike.
            "adaptation_distance": "mse" if decoder else "shift",
        }
        if self.parametrization == "parameters":
            chosen["epochs"] = 100 if family == "vision" else 25 if large else 125
            chosen["adaptation_learning_rate"] = 1e-5 if family == "vision" else 5e-5
            looked_at = rows  # any number of anchors is passed over as often as was published
        else:
            passes = FACTOR_EPOCHS if self.parametrization == "factors" else COEFFICIENT_EPOCHS
            chosen["epochs"] = FAR_EPOCHS if decoder or self.initial == "base" else passes
            chosen["adaptation_learning_rate"] = COEFFICIENT_STEP
            alone = rows > 0 and self.with_data == "states"
            looked_at = rows if alone else max(rows, self.num_anchors or chosen["num_anchors"])
        propagates = self.propagates and rows > 0
        if propagates:
            chosen |= {"epochs": PROPAGATED_EPOCHS, "adaptation_learning_rate": COEFFICIENT_STEP}
        chosen["epochs"] = passes_over(looked_at, chosen["epochs"])
        # A start in singular directions holds what anchors do not show: stay half way (WiSE-FT, arXiv 2109.01903).
        # Cut to the rank of factors it holds that no longer.
        spectral = isinstance(self.initial, MethodConfig) and self.initial.rotates and self.parametrization != "factors"
        # What the merged blocks make of rows shows it.
        chosen["interpolation"] = 0.5 if spectral and family != "vision" and not propagates else 1.0
        chosen["batch_size"] = PROPAGATED_BATCH if propagates else 128
        open_options = {name: value for name, value in chosen.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **open_options)

    def with_sources(
        self,
        names: list[str],
        all_have_weights: bool,
        all_thin: bool = False,
        as_adapter: bool = False,
        all_have_rest: bool = False,
    ) -> FDAConfig:
        """The config with `initial`, `rest` and `parametrization` chosen where they are open, and their weights in the
        order of sources.

        Args:
            names: of the sources.
            all_have_weights: whether none is anchors only; a method has nothing to merge of such a source.
            all_thin: whether all are adapters; a flat spectrum overdoes their few directions, and no rank holds it.
            as_adapter: whether an adapter is written.
            all_have_rest: whether of those that are anchors only what lies outside the blocks is there, too.
        """
        roles: dict[str, Any] = {}
        start = ("task_arithmetic", {"scaling": 0.3}) if all_thin else ("isotropic", {"scaling": 3.0})
        mergeable = {"initial": all_have_weights, "rest": all_have_weights or all_have_rest}
        for role, method, options in (("initial", *start), ("rest", "task_arithmetic", {})):
            value = getattr(self, role)
            if value is None:
                value = method_class(method).from_options(options) if mergeable[role] else "base"
            roles[role] = with_source_names(value, names) if isinstance(value, MethodConfig) else value
        stepped = "parameters" if not all_have_weights else "factors" if as_adapter else "coefficients"
        roles["parametrization"] = self.parametrization or stepped
        return dataclasses.replace(self, **roles)

    def descent(self) -> dict[str, Any]:
        """How anchors are moved: what `construct_unit` takes by keyword."""
        return {
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "kind": self.distance,
            "patience": self.patience,
            "optimizer": self.optimizer,
            "precision": self.precision,
        }

    def construction(self) -> dict[str, Any]:
        """The options that determine the anchors."""
        return {name: value for name, value in self.options().items() if name in CONSTRUCTION_FIELDS}


register_config(FDAConfig)
