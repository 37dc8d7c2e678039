"""What every merge method's options have in common: typed, validated, printable, never changed in place."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hf_fda.errors import InputError, nearest
from hf_fda.merge_methods.conversion import coerce
from hf_fda.merge_methods.per_source import for_each, in_order, numbers

if typing.TYPE_CHECKING:
    import torch
    from torch import Tensor


def option(
    default: Any, help: str, *, minimum: float | None = None, maximum: float | None = None, per_source: bool = False
) -> Any:
    """A dataclass field that carries its own help text and bounds (both inclusive).

    With `per_source` it may have a value for each source (its type is `PerSource`): one number for all, a list in the
    order of the sources, or by source name.
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "per_source": per_source}
    return dataclasses.field(default=default, metadata=metadata)


Scope = Literal["entry", "tensor", "matrix"]
Trim = Literal["tensor", "global"]
LooksAt = Literal["never", "may", "must"]


def trim_option() -> Any:
    """The field that says of what the largest entries stay."""
    return option(
        "tensor", "what density is a fraction of: each tensor, or a source's whole task vector, as in the paper"
    )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Options of one merge method. A subclass is one method; its fields are its options.

    Raises:
        InputError: when an option has the wrong type or lies outside its bounds.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    scope: ClassVar[Scope] = "entry"
    """What is merged on its own: every entry (then computed in float64, which makes `theta_0 + (theta_1 - theta_0)`
    give back theta_1 bit for bit), every tensor whatever it is, or every matrix (and of all else the mean is taken)."""
    random: ClassVar[bool] = False
    """Whether `merge` takes a generator of random numbers."""
    trims: ClassVar[bool] = False
    """Whether `merge` trims every task tensor to its `density` largest entries, and then merges entry by entry."""
    rotates: ClassVar[bool] = False
    """Merging matrices in other orthonormal bases is the same as merging them and changing the bases then, and of the
    base only the shape counts. Thin task vectors are merged in the bases of what they span."""
    data: ClassVar[LooksAt] = "never"
    """Whether the method looks at rows of data of every task."""
    takes_anchors: ClassVar[bool] = False
    """Whether anchors can take the place of these rows."""
    min_sources: ClassVar[int] = 1
    """How many sources there must be at least."""
    max_sources: ClassVar[int | None] = None
    """How many sources there may be at most."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = coerce(field, hints[field.name], getattr(self, field.name), self.name)
            object.__setattr__(self, field.name, value)

    @classmethod
    def option_fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """The method's options by name, in order of definition."""
        return {field.name: field for field in dataclasses.fields(cls)}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> MethodConfig:
        """A config from loose options (keyword arguments, YAML, command line); unknown names are refused."""
        known = cls.option_fields()
        for name in options:
            if name not in known:
                raise InputError(f"method '{cls.name}' has no option '{name}': {nearest(name, known)}")
        return cls(**options)

    def options(self) -> dict[str, Any]:
        """The options as plain values, for a YAML file or a card."""
        return {name: plain(getattr(self, name)) for name in self.option_fields()}

    def coefficients(self, count: int) -> tuple[float, ...] | None:
        """The factors of the sources' task vectors, where the merged one is a linear combination of them; else None.

        Args:
            count: K, the number of sources.
        """
        return None

    @property
    def spans(self) -> bool:
        """Whether the merged task tensor is a combination of theta_0 and the task tensors whose factors follow from
        their inner products alone (`combination`)."""
        return False

    def combination(self, products: Tensor) -> Tensor:
        """The factors of theta_0 and of the K task tensors in the merged task tensor; of a method that `spans`.

        Args:
            products: (K + 1, K + 1) in float64, inner products of theta_0 and the task tensors, in this order.

        Returns:
            (K + 1,) in float64.
        """
        raise TypeError(f"method '{self.name}' does not follow from inner products")

    def of_each(self, name: str, count: int) -> tuple[float, ...]:
        """The values of an option in the order of the sources.

        Args:
            name: of an option that may have a value for each source.
            count: K, the number of sources.

        Raises:
            InputError: when the values are still given by name (`with_source_names` settles that), or are not K.
        """
        return for_each(f"method '{self.name}': {name}", getattr(self, name), count)

    @property
    def works_on(self) -> Scope:
        """The scope under these options."""
        return self.scope

    def leaves_equals(self) -> bool:
        """Whether a tensor in which no source differs from the base stays as it is in the base."""
        return True

    def check_count(self, count: int) -> None:
        """Refuse a number of sources that the method does not merge.

        Raises:
            InputError: with the numbers that it does.
        """
        if count < self.min_sources or (self.max_sources is not None and count > self.max_sources):
            bounds = f"at least {self.min_sources}"
            if self.max_sources is not None:
                least, most = self.min_sources, self.max_sources
                bounds = str(most) if least == most else f"{least} to {most}"
            raise InputError(
                f"method '{self.name}' merges {bounds} source{'' if bounds == '1' else 's'}, not {count}; "
                "leave some out, add some, or choose another method"
            )

    def keeps_entries(self) -> bool:
        """Whether every entry of a source counts. Then one source of weight 1 comes out bit for bit, at any precision
        that is needed for it; where entries are left out, float32 is precise enough."""
        return all(share == 1 for share in numbers(getattr(self, "density", 1.0)))

    def untrimmed(self) -> MethodConfig:
        """The method for task tensors of which only the entries that stay are left; of a config that trims."""
        return dataclasses.replace(self, density=1.0)  # type: ignore[call-arg]

    def at(self, entries: slice) -> MethodConfig:
        """The config for some of a tensor's flattened entries; of a config by entry that holds something for each.

        Args:
            entries: start and stop, no step.
        """
        return self

    def extra_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes that merging a weight takes beside its task tensors and what any whole merge takes.

        Args:
            shape: (d_out, d_in).
        """
        return 0

    def merge(self, base: Tensor, tasks: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """The merged task tensor of one tensor. Pure: no argument is changed, but for the generator's state.

        Args:
            base: theta_0, any shape; a linear weight is (d_out, d_in).
            tasks: K task tensors theta_i - theta_0 of that shape.
            generator: on the CPU; of a method that is random.

        Returns:
            the tensor to add to `base`.
        """
        raise TypeError(f"method '{self.name}' does not work tensor by tensor")


@dataclass(frozen=True, kw_only=True)
class WeightedConfig(MethodConfig):
    """Options of every method in which each source has a weight."""

    weights: tuple[float, ...] | dict[str, float] | None = option(
        None, "a factor for each source: a list in the order of the sources, or by source name", per_source=True
    )

    def weight_of_each(self, count: int) -> tuple[float, ...]:
        """The weights in the order of the sources; ones where there are none.

        Args:
            count: K, the number of sources.
        """
        return (1.0,) * count if self.weights is None else self.of_each("weights", count)

    def source_weights(self) -> tuple[float, ...] | None:
        """`weights` as a tuple in the order of the sources, or None.

        Raises:
            InputError: when they are still given by name (`with_source_names` settles that).
        """
        return None if self.weights is None else self.of_each("weights", len(self.weights))

    def shares(self, count: int) -> tuple[float, ...]:
        """The weights divided by their sum.

        Args:
            count: K, the number of sources.
        """
        weights = self.weight_of_each(count)
        return tuple(weight / sum(weights) for weight in weights)

    def refuse_zero_sum(self, way_out: str) -> None:
        """Refuse weights that cannot be divided by their sum.

        Raises:
            InputError: with the way out that is given.
        """
        if self.weights and sum(numbers(self.weights)) == 0:
            raise InputError(f"{self.name}: the weights sum to zero; {way_out}")


@dataclass(frozen=True, kw_only=True)
class TaskVectorConfig(WeightedConfig):
    """Options of every method that combines task vectors."""

    scaling: float = option(1.0, "lambda: factor of the merged task vector")


def with_source_names(config: MethodConfig, names: Sequence[str]) -> MethodConfig:
    """`config` with all that it has for each source in the order of the sources, checked against their names.

    Raises:
        InputError: when the method does not merge so many sources, a name is unknown, one is missing, or the number of
            an option's values is wrong.
    """
    config.check_count(len(names))
    fields = [field.name for field in dataclasses.fields(config) if field.metadata.get("per_source")]
    return dataclasses.replace(config, **{name: in_order(name, getattr(config, name), names) for name in fields})


def plain(value: Any) -> Any:
    """`value` in the types YAML and JSON know."""
    if isinstance(value, MethodConfig):
        return {"method": value.name, **value.options()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
