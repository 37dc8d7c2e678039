"""Runs a plan: block by block and tensor by tensor, in any number of processes, each result a finished file."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import cached_property
from pathlib import Path

from hf_fda import costs
from hf_fda.adapter_assembly import AdapterAssembly
from hf_fda.adapting import adapted_unit
from hf_fda.anchors import AnchorBuilder, UnitAnchors
from hf_fda.anchors.files import Construction, read_unit, unit_file
from hf_fda.assembly import BLOCKS, Assembly, CheckpointAssembly
from hf_fda.blocks import Unit
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.errors import InputError, RunError
from hf_fda.inputs import Source
from hf_fda.merge_methods import FDAConfig
from hf_fda.plans import Plan
from hf_fda.processes import Team, together
from hf_fda.progress import Progress
from hf_fda.refusals import check_disk
from hf_fda.sharing import check_same, check_shared
from hf_fda.stages import Piece, find_finished, work_off
from hf_fda.store import Store, key_of
from hf_fda.streaming.global_trim import GlobalTrim
from hf_fda.streaming.taskvectors import TaskVectors, warn_of_equals
from hf_fda.streaming.trimming import trims_globally
from hf_fda.version import versions

ROWS = "/rows"
"""The name, which no source can have, of the hash of what the vocabulary's rows are made of."""


def run(plan: Plan, quiet: bool = False, team: Team | None = None) -> Path:
    """Do what a plan says. Work that an earlier run of the same plan finished is not done again.

    Processes that were launched together share the work; each of them makes the same plan and calls this.

    Args:
        plan: from `hf_fda.plan`.
        quiet: show no progress.
        team: the processes that make the plan come true together; those launched together if None.

    Returns:
        the output folder.

    Raises:
        InputError: when the disk has no room for the result, or processes see different files; nothing was written.
        RunError: when the work fails on the way; the same call goes on from there.
    """
    if team is None:
        with together(plan.device) as team:
            return run(plan, quiet, team)
    team.agree(lambda: check_disk(plan) if team.main else None)
    parts = plan.shards if plan.adapter is None else plan.adapter.parts
    counts = 2 * len(plan.shards) if trims_globally(plan.config) else 0
    total = len(plan.constructions) + len(plan.units) + counts + len(parts)
    with Progress(total, quiet or not team.main) as progress:
        try:
            engine = Engine(plan, progress, team)
            check_same(engine.facts(), team)
            check_shared(plan.output, team)
            engine.merge()
        except InputError as error:
            if error.agreed:
                raise
            # An input that was whole when the plan was made: a download that broke off
            raise RunError(f"{error}; the same call goes on from here") from None
    return plan.output


class Engine:
    """One process's part in a run of a plan.

    Args:
        plan: what to do.
        progress: whom to tell.
        team: the processes that do it.
    """

    def __init__(self, plan: Plan, progress: Progress, team: Team) -> None:
        self.plan, self.progress, self.team = plan, progress, team
        self.base = plan.inputs.base
        self.store = Store(plan.output)
        self.vectors = TaskVectors(plan.inputs, plan.device, plan.seed)
        self.trim = GlobalTrim(plan, self.vectors, self.fingerprints)
        kind: type[Assembly] = CheckpointAssembly if plan.adapter is None else AdapterAssembly
        self.assembly = kind(plan, self.vectors, self.fingerprints, lambda unit: self._unit_keys[unit.name])

    def merge(self) -> None:
        """Construct, adapt, assemble, publish: each stage begins when all processes have ended the one before."""
        parts = self.assembly.parts
        writing = [self.assembly.piece(part) for part in parts]
        written = find_finished(writing, self.store, self.team)
        self._construct()
        unwritten = [part for part, done in zip(parts, written, strict=True) if not done]
        self._adapt({unit for part in unwritten for unit in self.assembly.units_in(part)})
        if unwritten and self.trim.shards:
            self._count(self.trim.coarse_pieces())
            self._count(self.trim.fine_pieces())
            self.vectors.cuts = self.trim.cuts()
        self._work_off(writing, written)
        if self.team.main:
            self.assembly.publish(self.store)
        moved = self.team.gather(self.vectors.moved)
        if self.team.main:
            warn_of_equals(moved)

    def _count(self, pieces: Sequence[Piece]) -> None:
        self._work_off(pieces, find_finished(pieces, self.store, self.team))

    def facts(self) -> dict[str, str]:
        """What all processes must see alike, as hashes by what it is."""
        plan = self.plan
        weights = {_what(name): found for name, found in self.fingerprints.items()}
        targets = () if plan.adapter is None else plan.adapter.targets
        work = [unit.name for unit in plan.units], [shard.file for shard in plan.shards], [t.name for t in targets]
        return {
            "the arguments": key_of(plan.arguments),
            **weights,
            "the work to do": key_of(work),
            "versions": key_of(versions()),
        }

    def _work_off(self, pieces: Sequence[Piece], finished: Sequence[bool]) -> None:
        work_off(pieces, finished, self.store, self.team, self.progress)

    # -- anchors ---------------------------------------------------------------------------------------------------

    @cached_property
    def builder(self) -> AnchorBuilder:
        """Makes anchors; exists only for method "fda"."""
        assert isinstance(self.plan.config, FDAConfig)
        return AnchorBuilder(self.base, self.plan.units, self.plan.config, self.plan.device, self.plan.seed)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A hash of base and sources, by name; it changes when their weights do, or their vocabularies' rows."""
        named = {source.name: source.checkpoint.fingerprint() for source in self.plan.inputs.weighted}
        found = {"": self.base.fingerprint(), **named}
        rows = self.plan.inputs.vocabulary.fingerprint
        return found | {ROWS: rows} if rows else found

    def _construction(self, source: Source) -> Construction:
        """What makes one source's anchors in the output folder."""
        assert source.weights is not None
        prints = (self.fingerprints[""], self.fingerprints[source.name])
        return Construction(self.store, f"anchors/{source.name}/", self.builder, source.weights, prints)

    def _construct(self) -> None:
        """The anchors of every source that has none, unit by unit; and what lies around them."""
        config, inputs = self.plan.config, self.plan.inputs
        pieces = []
        for source, unit in self.plan.constructions:
            assert isinstance(config, FDAConfig)
            cost = costs.construction(inputs.base, config, unit).weight
            pieces.append(self._construction(source).piece(unit, cost, self.progress))
        self._work_off(pieces, find_finished(pieces, self.store, self.team))
        for source in inputs.sources if self.team.main and self.plan.units else ():
            if source.anchors is None:
                self._construction(source).frame(self.plan.units_of(source))

    @cached_property
    def _given(self) -> dict[tuple[str, str], str]:
        """Hashes of the anchors that were given, by source and unit; each is read by one process only."""
        given = [
            (source.anchors, source.name, unit.name)
            for unit in self.plan.units
            for source in self.plan.sources_of(unit)
            if source.anchors is not None
        ]
        hashes = self.team.map(lambda item: item[0].digest(item[2]), given)
        return {(source, unit): found for (_, source, unit), found in zip(given, hashes, strict=True)}

    def _anchors_key(self, source: Source, unit: Unit) -> str:
        if source.anchors is not None:
            return key_of("given", self._given[source.name, unit.name])
        return self._construction(source).key(unit)

    def _anchors_of(self, source: Source, unit: Unit) -> UnitAnchors:
        """The anchors of one unit for one source."""
        if source.anchors is not None:
            found = source.anchors[unit.name]
        else:
            found = read_unit(self.plan.output / "anchors" / source.name / unit_file(unit.name))
        self.vectors.note_move(source.name, lambda: found.moves)
        return found

    # -- adaptation ------------------------------------------------------------------------------------------------

    def _adapt(self, wanted: Container[str]) -> None:
        """Adapt every unit to the anchors of all sources.

        Args:
            wanted: units that weight files still have to be written of; the others are finished.
        """
        pieces = [self._adaptation(unit) for unit in self.plan.units]
        needed = [piece for piece, unit in zip(pieces, self.plan.units, strict=True) if unit.name in wanted]
        found = iter(find_finished(needed, self.store, self.team))
        self._work_off(pieces, [unit.name not in wanted or next(found) for unit in self.plan.units])

    def _adaptation(self, unit: Unit) -> Piece:
        """The work of adapting one unit."""
        assert isinstance(self.plan.config, FDAConfig)

        def make() -> Callable[[Path], str]:
            found = [self._anchors_of(source, unit) for source in self.plan.sources_of(unit)]
            adapted = adapted_unit(self.plan, self.builder, self.vectors, unit, found, self.progress)
            return lambda path: save_tensors(path, adapted)

        sources = len(self.plan.sources_of(unit))
        cost = costs.adaptation(self.base, self.plan.config, unit, sources, self.plan.ranks).weight
        return Piece(f"adapt {unit.name}", f"{BLOCKS}/{unit.name}.safetensors", self._unit_keys[unit.name], cost, make)

    @cached_property
    def _unit_keys(self) -> dict[str, str]:
        """By unit, a hash of everything that determines how it comes out."""
        return {unit.name: self._unit_key(unit) for unit in self.plan.units}

    def _unit_key(self, unit: Unit) -> str:
        config = self.plan.config
        anchors = [self._anchors_key(source, unit) for source in self.plan.sources_of(unit)]
        ranks = {name: self.plan.ranks[name] for name in unit.tensors if name in self.plan.ranks}
        facts = config.options(), ranks, anchors, self.fingerprints, self.plan.seed, versions()
        return key_of("unit", unit.name, *facts)


def _what(name: str) -> str:
    """What a fingerprint is of, in words."""
    if name == ROWS:
        return "the vocabularies"
    return f"the weights of source '{name}'" if name else "the base's weights"
