"""Merging one tensor of a model by a parameter-space method, in parts that need little memory wherever it goes.

A mean of models is summed from their entries. What depends on single entries is merged block by block. What follows
from inner products is read twice. Of what is trimmed first the parts are held as they were read until it is known which
entries stay. All else is merged whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import fsum, isfinite, prod
from typing import TypeVar

import torch
from torch import Tensor

from hf_fda.errors import RunError
from hf_fda.merge_methods import MethodConfig
from hf_fda.merge_methods.spanning import products_of
from hf_fda.selection import Cut, keep
from hf_fda.streaming.means import HALF_TYPES, Factors, mean_of_models
from hf_fda.streaming.taskvectors import StoredPart, TaskVectors
from hf_fda.streaming.tensorwise import BLOCK, PART, apply_method, parts_in, parts_of
from hf_fda.streaming.trimming import alone, check_counts, count_coarse, cuts_of_parts, dealt, kept_of, trims
from hf_fda.streaming.workers import Workers, threads

S = TypeVar("S")
T = TypeVar("T")

MARGIN = 2**10
"""How much larger than its result a float32 sum may grow on the way for rounding to a half type to hide its errors."""

LARGE = 2**24
"""Entries from which on a tensor that is merged whole has all threads for itself; smaller ones have one each."""


class TensorMerger:
    """Merges the base's tensors one by one; several threads may ask at once.

    Args:
        vectors: reads base and sources.
        workers: the threads that compute.
    """

    def __init__(self, vectors: TaskVectors, workers: Workers) -> None:
        self.vectors, self.workers = vectors, workers
        self.sources = vectors.inputs.moving
        self.device = vectors.device
        self._exact = torch.float32 if self.device.type == "mps" else torch.float64

    def by_parts(self, name: str, config: MethodConfig, dtype: torch.dtype) -> Callable[[slice], Tensor]:
        """What merges any part of one of the base's tensors, of one that may be merged so (`Footprint.by_parts`).

        Args:
            name: the base's name of it.
            config: the method.
            dtype: of the result.

        Returns:
            from a part of the flattened entries to theta_0 plus the merged task tensor there, on the CPU. It raises as
            `merged` does.
        """
        factors = mean_of_models(self.vectors, name, config, dtype)
        if factors is None and config.spans:
            # Begun here, where tensors come in order, so that it never waits behind the parts that wait for it
            found = self.workers.begin(self._factors, name, config, slice(0, prod(self.vectors.base.shape(name))))
            return lambda part: self.workers.compute(self._add_up, name, found.result(), dtype, part)
        if factors is not None:
            return lambda part: self.workers.compute(self._combine, name, factors, dtype, part)
        cuts = self.vectors.cuts if trims(config) else ()
        return lambda part: self.workers.compute(self._merge_part, name, config, dtype, part, cuts)

    def merged(self, name: str, config: MethodConfig, dtype: torch.dtype) -> Tensor:
        """One of the base's tensors merged by a parameter-space method.

        Args:
            name: the base's name of it.
            config: the method.
            dtype: of the result.

        Returns:
            theta_0 plus the merged task tensor, on the CPU.

        Raises:
            RunError: naming the tensor, and the source if it is one, when inputs or result are not finite.
        """
        base = self.vectors.base
        if not base.dtype(name).is_floating_point or not prod(base.shape(name)):
            return base.read(name)
        shape, role = base.shape(name), base.layout.roles[name]
        factors = mean_of_models(self.vectors, name, config, dtype)
        if factors is None and not (trims(config) or config.spans or alone(config, role)):
            return self._whole(name, config).to(dtype)
        out = torch.empty(prod(shape), dtype=dtype)
        count = len(out) // shape[0] if role == "stack" else len(out)  # each weight of a stack is merged alone
        if factors is not None:
            self._fill(out, name, slice(0, len(out)), partial(self._combine, name, factors, dtype))
        elif config.spans:
            for region in parts_of(len(out), count):
                found = self._factors(name, config, region)
                self._fill(out, name, region, partial(self._add_up, name, found, dtype))
        elif trims(config) and not self.vectors.cuts:
            for region in parts_of(len(out), count):
                self._trim_and_merge(name, config, region, out)
        else:
            cuts = self.vectors.cuts if trims(config) else ()
            merge = partial(self._merge_part, name, config, dtype, cuts=cuts)
            self._fill(out, name, slice(0, len(out)), merge)
        return out.view(shape)

    def _fill(self, out: Tensor, name: str, region: slice, merge: Callable[[slice], Tensor]) -> None:
        """Put the merged parts of a region into the whole merged tensor, which is flat."""

        def put(part: slice) -> None:
            out[part] = merge(part)

        self._over(name, parts_in(region), put)

    def _over(self, name: str, parts: Sequence[S], function: Callable[[S], T]) -> list[T]:
        """`function` of every part, side by side; one after the other where that reads the whole tensor."""
        return list(self.workers.each(function, parts) if self.vectors.in_parts(name) else map(function, parts))

    # -- means of models -------------------------------------------------------------------------------------------

    def _combine(self, name: str, factors: Factors, dtype: torch.dtype, part: slice) -> Tensor:
        """Part of the sum of the models, each times its factor."""
        out = torch.empty(part.stop - part.start, dtype=dtype)
        models = [self.sources[number].read(name, part) for number, _ in factors]
        for (number, _), model in zip(factors, models, strict=True):
            self.vectors.note_move(self.sources[number].name, partial(self._differs, name, part, model))
        growth = (len(factors) + 1) * fsum(abs(factor) for _, factor in factors)
        narrow = all(model.dtype in HALF_TYPES for model in (*models, out)) and growth <= MARGIN
        work = torch.float32 if narrow else self._exact
        for block in parts_of(len(out), BLOCK):
            total = models[0][block].to(self.device, work, copy=True).mul_(factors[0][1])
            for model, (_, factor) in zip(models[1:], factors[1:], strict=True):
                total.add_(model[block].to(self.device, work), alpha=factor)  # twice as fast as adding mixed types
            out[block] = total
        check_finite(name, out)
        return out

    def _differs(self, name: str, part: slice, own: Tensor) -> bool:
        return bool((own != self.vectors.base.read(name, part)).any())

    # -- entry by entry --------------------------------------------------------------------------------------------

    def _merge_part(
        self,
        name: str,
        config: MethodConfig,
        dtype: torch.dtype,
        part: slice,
        cuts: Sequence[Cut] = (),
        stored: StoredPart | None = None,
    ) -> Tensor:
        """Part of a tensor merged entry by entry.

        Args:
            name: the base's name of it.
            config: the method.
            dtype: of the result.
            part: of its flattened entries.
            cuts: which entries of each source stay; none: the config trims nothing.
            stored: the part as it was read, if it was.
        """
        out = torch.empty(part.stop - part.start, dtype=dtype)
        stored = stored or self.vectors.stored(name, part)
        config = config.untrimmed() if cuts else config
        generator = self.vectors.generator(name, part.start // PART) if config.random else None
        work = self._type_by_entry(config, stored.base.dtype, dtype) if not cuts else torch.float32
        for block in stored.blocks():
            base, tasks = stored.read(block, self.device, work)
            for source, task in zip(self.sources, tasks, strict=True):
                self.vectors.note_move(source.name, task.any)
            if cuts:
                own, cuts = dealt(cuts, tasks)
                tasks = [keep(task, cut) for task, cut in zip(tasks, own, strict=True)]
            own_config = config.at(slice(part.start + block.start, part.start + block.stop))
            out[block] = base.add_(own_config.merge(base, tasks, generator))
        check_finite(name, out)
        return out

    def _type_by_entry(self, config: MethodConfig, stored: torch.dtype, written: torch.dtype) -> torch.dtype:
        """The type to compute in: float64 where a single source has to come out bit for bit, or more would be lost.
        Of several half-precision models float32 holds the task vectors as they are; a vote that is a draw is then
        decided by the same rounding as in other programs."""
        if torch.float64 in (stored, written):
            return self._exact
        several = len(self.sources) > 1 and stored in HALF_TYPES
        return self._exact if config.keeps_entries() and not several else torch.float32

    # -- at factors that follow from inner products ----------------------------------------------------------------

    def _factors(self, name: str, config: MethodConfig, region: slice) -> list[float]:
        """The factors of theta_0 and the task tensors in a region of a merged tensor, by a first look at all of it: to
        read it again is cheaper than to hold it."""
        products = torch.stack(self._over(name, parts_in(region), partial(self._products, name))).sum(0)
        for source, length in zip(self.sources, products.diagonal()[1:].tolist(), strict=True):
            if not isfinite(length):
                raise RunError(f"source '{source.name}': tensor '{name}' is not finite; check its weights")
            self.vectors.note_move(source.name, partial(bool, length))
        found: list[float] = config.combination(products).tolist()
        return found

    def _products(self, name: str, part: slice) -> Tensor:
        """(K + 1, K + 1) inner products of theta_0 and the task tensors in part of a tensor."""
        stored = self.vectors.stored(name, part)
        products = torch.zeros(len(self.sources) + 1, len(self.sources) + 1, dtype=torch.float64)
        for block in stored.blocks():
            products += products_of(stored.rows(block, self.device, self._type_for(stored, torch.bfloat16)))
        return products

    def _add_up(self, name: str, factors: Sequence[float], dtype: torch.dtype, part: slice) -> Tensor:
        """``theta_0 + c_0 theta_0 + sum_i c_i tau_i`` of part of a tensor."""
        out = torch.empty(part.stop - part.start, dtype=dtype)
        stored = self.vectors.stored(name, part)
        for block in stored.blocks():
            base, tasks = stored.read(block, self.device, self._type_for(stored, dtype))
            base.mul_(1 + factors[0])
            for task, factor in zip(tasks, factors[1:], strict=True):
                base.add_(task, alpha=factor)
            out[block] = base
        check_finite(name, out)
        return out

    def _type_for(self, stored: StoredPart, written: torch.dtype) -> torch.dtype:
        """A wider type than those of what is read and written."""
        return torch.float32 if stored.base.dtype in HALF_TYPES and written in HALF_TYPES else self._exact

    # -- trimmed, then entry by entry ------------------------------------------------------------------------------

    def _trim_and_merge(self, name: str, config: MethodConfig, region: slice, out: Tensor) -> None:
        """Merge a region of a tensor of which each source keeps its largest entries."""
        parts = parts_in(region)
        read = self._over(name, parts, lambda part: self._read_and_count(name, part))
        held, counts = [stored for stored, _ in read], torch.stack([counted for _, counted in read]).sum(0)
        check_counts(counts, [source.name for source in self.sources], f"tensor '{name}'")
        kept = kept_of(config, [len(out[region])] * len(self.sources))
        cuts = cuts_of_parts(held, counts, kept, self.device, lambda do, items: list(self.workers.each(do, items)))

        def put(number: int) -> None:
            part = parts[number]
            out[part] = self._merge_part(name, config, out.dtype, part, cuts[number], held[number])

        list(self.workers.each(put, range(len(parts))))

    def _read_and_count(self, name: str, part: slice) -> tuple[StoredPart, Tensor]:
        stored = self.vectors.stored(name, part)
        return stored, count_coarse(stored, self.device)

    # -- whole -----------------------------------------------------------------------------------------------------

    def _whole(self, name: str, config: MethodConfig) -> Tensor:
        """Merge a whole tensor in float32; small ones beside each other."""
        base, tasks = self.vectors.read(name, torch.float32)
        for source, task in zip(self.sources, tasks, strict=True):
            if not is_finite(task):
                raise RunError(f"source '{source.name}': tensor '{name}' is not finite; check its weights")

        def merge() -> Tensor:
            role = self.vectors.base.layout.roles[name]
            with threads(self.workers.count if base.numel() >= LARGE else 1):
                return (base + apply_method(config, base, tasks, role, self.vectors.generator(name))).cpu()

        merged = self.workers.compute(merge)
        check_finite(name, merged)
        return merged


def is_finite(tensor: Tensor) -> bool:
    """Whether all entries are; looked at one by one only where their sum is not."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check_finite(name: str, merged: Tensor) -> None:
    """Refuse a merged tensor that is not finite.

    Raises:
        RunError: naming the tensor.
    """
    if not is_finite(merged):
        raise RunError(f"tensor '{name}': the merged values are not finite; check the inputs for infinities or NaN")
