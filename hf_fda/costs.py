"""How much work the pieces of a merge are, from shapes alone.

What a piece costs decides which process does it, and at a measured speed (`hf_fda.prediction`) how long it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from hf_fda.merge_methods.fda import FDAConfig
from hf_fda.streaming.tensorwise import by_entry

if TYPE_CHECKING:
    from hf_fda.blocks import Unit
    from hf_fda.checkpoint.interface import Checkpoint
    from hf_fda.checkpoint.writer import Shard
    from hf_fda.inputs import Inputs
    from hf_fda.merge_methods import MethodConfig
    from hf_fda.merge_methods.distill import DistillConfig
    from hf_fda.merge_methods.unitwise import UnitwiseConfig
    from hf_fda.recipes import Output

# The numbers of passes and calls, and the efficiencies in `hf_fda.prediction`, were fitted to the process time of BERT
# blocks of width 32, 256 and 768 with 8 to 1,280 tokens on one x86 core: most predictions came within a quarter, those
# of very few steps on a wide block, which preparing them dominates, at half.

STEP_PRODUCTS = 9
"""Products of all tokens with a weight in one construction step: the forward passes of base and source, the base's
output and parameter gradients, and the second pass through all of these with respect to the anchors."""

STEP_PASSES = 30
"""Times a construction step reads or writes every parameter's gradient and task vector for their cosines."""

FACTOR_PRODUCTS = 3
"""Products of thin factors in an adaptation step: the gradient of each, and what both make."""

ADAM_PASSES = 16
"""Times an adaptation step reads or writes every parameter."""

MATRIX_PRODUCTS = {"tsv": (0, 20), "isotropic": (9, 1), "wudi": (530, 8), "iso_cts": (33, 12), "ace": (33, 4)}
"""A matrix method's time on a (d_out, d_in) weight, as products of that weight with a square one: once, and for each
source. Measured on CPU cores with 2 and 4 sources of 384 to 2,816 rows."""

OTHER_PRODUCTS = (0, 20)
"""The same for a matrix method that is not in the table: a decomposition for each source."""

MEAN_PASSES = 20
"""Time of a weighted sum of task tensors, reading and writing them included, as passes over each source's tensor in a
core's cache."""

PASSES = {
    "linear": 14,
    "slerp": 40,
    "nuslerp": 30,
    "multislerp": 30,
    "karcher": 30,
    "model_stock": 30,
    "ties": 95,
    "dare_linear": 40,
    "dare_ties": 40,
    "della": 700,
    "della_linear": 700,
    "magnitude_prune": 80,
    "breadcrumbs": 45,
    "breadcrumbs_ties": 55,
    "sce": 120,
    "nearswap": 30,
    "arcee_fusion": 490,
}
"""The same of other methods: they draw, sort, vote or read twice. Measured on two CPU cores with two sources, or the
one that a method merges into the base, of a Llama's shapes with 60 million entries (`plan_accuracy.py` among the
benchmarks)."""

OTHER_PASSES = 100
"""The same for a whole-tensor method that is not in the table."""

STEP_ACTIVATION_PASSES = 200
"""Times a construction step reads or writes the outputs of the linear layers."""

ADAPTATION_ACTIVATION_PASSES = 75
"""The same for a pass of adaptation over the anchors."""

STEP_CALLS = 90
"""Operations that a construction step starts for each parameter tensor, whatever their size."""

ADAPTATION_CALLS = 40
"""The same of an adaptation step."""

TYPICAL_POSITIONS = 64
"""Positions of a row of data, where only pieces of one kind are compared."""

FLOPS_PER_BYTE = 10
"""Arithmetic that takes as long as moving a byte through memory, to compare pieces of work with each other."""

FLOPS_PER_CALL = 100_000
"""Arithmetic that takes as long as starting an operation."""

FLOPS_PER_FILE_BYTE = 200
"""Arithmetic that takes as long as reading or writing a byte of a file."""


@dataclass(frozen=True)
class Work:
    """An amount of work: `flops` of products, bytes `moved` through memory, bytes of `files` read or written, and
    `calls` of operations."""

    flops: float = 0.0
    moved: float = 0.0
    files: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops, self.moved + other.moved, self.files + other.files, self.calls + other.calls
        )

    @property
    def weight(self) -> float:
        """The work as one number that depends on shapes only, so that all processes share it out alike."""
        stored = FLOPS_PER_FILE_BYTE * self.files
        return self.flops + FLOPS_PER_BYTE * self.moved + stored + FLOPS_PER_CALL * self.calls


@dataclass(frozen=True)
class Shown:
    """Real hidden states that a unit is matched on: so many rows, and vectors in them, of all sources together."""

    rows: int = 0
    vectors: int = 0


def construction(base: Checkpoint, config: FDAConfig, unit: Unit, together: int = 1) -> Work:
    """All steps of constructing one unit's anchors for one source (it may stop earlier, by `patience`), where so many
    units run together."""
    tokens, steps = (config.num_anchors or 0) * tokens_of(base, config), config.steps or 0
    parameters = 4 * sum(prod(base.layout.shapes[name]) for name in unit.tensors)
    activations = 4 * tokens * outputs(base, unit.tensors)
    return Work(
        flops=steps * STEP_PRODUCTS * 2 * tokens * active_entries(base, unit.tensors),
        moved=steps * (STEP_PASSES * parameters + STEP_ACTIVATION_PASSES * activations),
        files=2 * parameters + 2 * 4 * tokens * width(base),
        calls=steps * STEP_CALLS * len(unit.tensors) / together,
    )


def recording(base: Checkpoint, units: Sequence[Unit]) -> Work:
    """Recording the hidden states of units on one row, by far most of which is running the blocks."""
    names = [name for unit in units for name in unit.tensors]
    return Work(flops=2 * TYPICAL_POSITIONS * active_entries(base, names))


def adaptation(
    base: Checkpoint,
    config: FDAConfig,
    unit: Unit,
    sources: int,
    ranks: Mapping[str, int] | None = None,
    shown: Shown | None = None,
) -> Work:
    """All passes of adapting one unit to the anchors, or the real hidden states, of all sources, from where it starts.

    Args:
        base: whose unit it is.
        config: complete.
        unit: which.
        sources: number of sources.
        ranks: by tensor, of the thin factors that are stepped on.
        shown: the real hidden states that are matched.
    """
    initial = config.initial if not isinstance(config.initial, (str, type(None))) else None
    shown = shown or Shown()
    anchors = (config.num_anchors or 0) * sources if not shown.rows or config.with_data != "states" else 0
    examples, epochs = anchors + shown.rows, config.epochs or 0
    tokens = anchors * tokens_of(base, config) + shown.vectors
    steps = epochs * ceil(examples / (config.batch_size or 128))
    parameters = 4 * sum(prod(base.layout.shapes[name]) for name in unit.tensors)
    activations = 4 * tokens * outputs(base, unit.tensors)
    factored = sum(
        prod(base.layout.shapes[name]) * rank for name, rank in (ranks or {}).items() if name in unit.tensors
    )
    read = 2 + (sources if config.parametrization != "parameters" or initial is not None else 0)
    work = Work(
        flops=epochs * 3 * 2 * tokens * active_entries(base, unit.tensors) + steps * FACTOR_PRODUCTS * 2 * factored,
        moved=steps * ADAM_PASSES * parameters + epochs * ADAPTATION_ACTIVATION_PASSES * activations,
        files=read * parameters + 2 * 4 * tokens * width(base),
        calls=steps * ADAPTATION_CALLS * len(unit.tensors),
    )
    if initial is None:
        return work
    return sum((merging(base, initial, name, sources) for name in unit.tensors), work)


def propagation(base: Checkpoint, unit: Unit, shown: Shown, before: int) -> Work:
    """Passes over the unit before one, in front of which hidden states are held, for those that it takes in the merged
    model, and over itself and the source's own unit.

    Args:
        base: whose units they are.
        unit: which.
        shown: the real hidden states of all sources.
        before: how many units lie before it.
    """
    return Work(flops=(min(before, 1) + 2) * 2 * shown.vectors * active_entries(base, unit.tensors))


def distillation(base: Checkpoint, config: DistillConfig, unit: Unit, sources: int, shown: Shown) -> Work:
    """All passes of distilling one unit on the hidden states of the merged model, once these are there.

    Args:
        base: whose unit it is.
        config: complete.
        unit: which.
        sources: number of sources.
        shown: the real hidden states of all of them.
    """
    alike = FDAConfig(
        initial=config.initial,
        parametrization="coefficients",
        epochs=config.epochs,
        batch_size=config.batch_size,
        with_data="states",
    )
    return adaptation(base, alike, unit, sources, shown=shown)


def merging(base: Checkpoint, config: MethodConfig, name: str, sources: int) -> Work:
    """Merging one tensor of the base by a parameter-space method, read and written apart."""
    shape, role = base.layout.shapes[name], base.layout.roles[name]
    entries = prod(shape)
    other = OTHER_PASSES if config.works_on == "tensor" else MEAN_PASSES
    work = Work(moved=8 * entries * PASSES.get(config.name, other) * sources)
    if config.works_on != "matrix" or by_entry(config, role) or len(shape) < 2:
        return work
    once, each = MATRIX_PRODUCTS.get(config.name, OTHER_PRODUCTS)
    return work + Work((once + each * sources) * 2 * entries * min(shape[-2:]))


def writing(inputs: Inputs, result: Output, shard: Shard) -> Work:
    """Making one weight file of the merged model."""
    base, sources = inputs.base, len(inputs.moving)
    work = Work(files=shard.nbytes * 2)
    for name in (name for group in shard.groups for name in group):
        recipe, own = result.recipes[name], result.base_names.get(name)
        if recipe.config is not None:
            work += Work(files=4 * prod(result.layout.shapes[name]) * sources)
            work += merging(base, recipe.config, own, sources) if own is not None else Work()
    return work


def active_entries(base: Checkpoint, names: Iterable[str]) -> float:
    """Weight entries that each token is multiplied with; of experts only those that are asked."""
    text: Any = base.config.get_text_config()
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    share = min((getattr(text, "num_experts_per_tok", None) or experts) / experts, 1)
    shapes, roles = base.layout.shapes, base.layout.roles
    return sum(
        prod(shapes[name]) * (share if roles[name] == "stack" else 1)
        for name in names
        if roles[name] in ("linear", "conv1d", "stack")
    )


def outputs(base: Checkpoint, names: Iterable[str]) -> int:
    """Entries of all linear outputs for one token."""
    shapes, roles = base.layout.shapes, base.layout.roles
    rows = {"linear": 0, "conv1d": 1, "stack": 1}
    return sum(shapes[name][rows[roles[name]]] for name in names if roles[name] in rows)


def tokens_of(base: Checkpoint, config: FDAConfig) -> int:
    """Tokens of one anchor: those of an image, or the published five of a text, where the config leaves it open."""
    if config.num_tokens is not None:
        return config.num_tokens
    vision = getattr(base.config, "vision_config", base.config)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    return (size // patch) ** 2 + 1 if isinstance(size, int) and isinstance(patch, int) else 5


def anchor_positions(base: Checkpoint, config: UnitwiseConfig, sources: int) -> int:
    """Positions of all anchors of one unit."""
    return sources * (config.num_anchors or 0) * tokens_of(base, config) if isinstance(config, FDAConfig) else 0


def width(base: Checkpoint) -> int:
    """d of the blocks."""
    return int(base.config.get_text_config().hidden_size)
