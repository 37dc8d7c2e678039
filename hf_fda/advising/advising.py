"""Advice on how to merge: facts, then rules, then perhaps a trial."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fda.advising.advice import Advice
from hf_fda.advising.candidates import Candidate, Planner, candidates
from hf_fda.advising.coverage import uncovered
from hf_fda.advising.facts import gather
from hf_fda.advising.rules import Proposal, Shown, rule_for
from hf_fda.advising.trying import check_held, try_out
from hf_fda.checkpoint.writer import MAX_SHARD_BYTES
from hf_fda.data.request import WORDS, Reading, check_number
from hf_fda.errors import InputError
from hf_fda.inputs import open_inputs
from hf_fda.merge_methods import FDAConfig, MethodConfig, resolve_method
from hf_fda.merge_methods.config import plain
from hf_fda.plan_data import open_rows
from hf_fda.refusals import check_wants_data
from hf_fda.settings import Settings

if TYPE_CHECKING:
    import torch


def advise(
    base: Any,
    sources: Any,
    method: str | MethodConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    as_adapter: bool = False,
    data: Mapping[str, Any] | str | None = None,
    device: str | torch.device = "auto",
    dtype: str = "float32",
    seed: int = 0,
    *,
    try_data: Mapping[str, Any] | None = None,
    keep: int = 3,
    metrics: Any = None,
    try_rows: int | None = None,
    seconds: float | None = None,
    anchors: Mapping[str, Any] | None = None,
    heads: str = "keep",
    rank: int | None = None,
    energy: float | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: str | None = None,
    tokens: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    pad_to_multiple_of: int | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Advice:
    """Recommend how to merge: methods with their options, reasons and cost, best first.

    Task vectors are read part by part (of large models a sample, which is then said); the rules come from measured
    tables, which they cite. With `try_data` the first few are merged, scored and ranked by their scores.

    All other arguments are those of `hf_fda.merge`, but:

    Args:
        base: as there.
        sources: as there, two at least.
        method: one of the user's own, with its `options`, to be tried beside those that are recommended.
        output: the folder in which candidates are merged, each in one of its own; the same call goes on where it
            stopped, and tries nothing twice. None: a temporary one.
        as_adapter: as there.
        data: rows of every task, for the methods that look at data. "anchors" and "synthetic" are for the user's own
            method.
        device: as there.
        dtype: as there.
        seed: as there.
        try_data: held-out rows with labels of every task, as `hf_fda.evaluate` takes them. None: nothing is merged.
        keep: how many of those that are recommended are tried, at most; the user's own comes beside them.
        metrics: as `hf_fda.evaluate` takes them; candidates are ranked by each task's first.
        try_rows: at most so many of a task's held-out rows, a sample by `seed`; None: all.
        seconds: that a merge may take; methods that are expected to take longer come behind the others.
        quiet: show no progress.

    Raises:
        InputError: naming the argument, source, task or column that cannot be used, before any work.
        RunError: when a merge or a metric fails while candidates are tried; the same call goes on from there.

    Example:
        >>> advice = advise("base/", {"sst2": "sst2/", "trec": "trec/"})  # doctest: +SKIP
        >>> print(advice)  # doctest: +SKIP
        >>> merge("base/", {"sst2": "sst2/", "trec": "trec/"}, **advice.first.arguments)  # doctest: +SKIP
    """
    _check(method, options, data, try_data, keep, metrics, try_rows, seconds)
    with _folder(output) as folder:
        settings = Settings.checked(folder, device, dtype, seed, heads, max_shard_bytes, as_adapter, rank, energy)
        settings = replace(settings, force=force)
        inputs = open_inputs(
            base, sources, anchors, trust_remote_code, tokenizer, tokens, chat_template, pad_to_multiple_of
        )
        if len(inputs.sources) < 2:
            raise InputError(
                "advice is on merging several sources; one alone needs no method ('passthrough' writes it)"
            )
        reading = Reading(try_rows, seed=seed, trust_remote_code=trust_remote_code)
        held = None if try_data is None else check_held(inputs, try_data, metrics, reading)
        own = None if method is None else _own(method, options, data)
        looking = FDAConfig()
        opened = {} if isinstance(data, str) else open_rows(data, inputs, looking, reading)
        facts = gather(inputs, opened, looking.rows or 0, settings.device)
        rule = rule_for(facts)
        found, notes = candidates(
            Planner(inputs, settings, data, trust_remote_code), rule.proposals, own, facts, seconds
        )
        short = _short_list(found, keep)
        tried, alone = ([], None) if held is None else try_out(short, held, reading, quiet)
        done = {one.label for one in tried}
        ranked = [*tried, *(one.recommendation for one in found if one.recommendation.label not in done)]
        return Advice(
            facts,
            rule.name,
            tuple(ranked),
            tuple(uncovered(facts, rule.table)),
            tuple(notes),
            None if held is None else held.summary,
            alone,
        )


def _check(
    method: str | MethodConfig | None,
    options: Mapping[str, Any],
    data: Any,
    try_data: Any,
    keep: Any,
    metrics: Any,
    try_rows: Any,
    seconds: Any,
) -> None:
    """Refuse arguments that cannot be used, or do not go together."""
    check_number("keep", keep)
    if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
        raise InputError(f"seconds must be a number above 0, not {seconds!r}")
    if method is None and options:
        raise InputError(f"options ({', '.join(options)}) are of a method of yours; name it, or leave them out")
    if try_data is None and (metrics is not None or try_rows is not None):
        raise InputError("metrics and try_rows are of held-out rows; give these (try_data, --try), or leave them out")
    if isinstance(data, str) and data not in WORDS:
        check_wants_data(FDAConfig(), data)


def _short_list(found: Sequence[Candidate], keep: int) -> list[Candidate]:
    """The first few candidates, and the user's own."""
    return [one for one in found if not one.own][:keep] + [one for one in found if one.own]


def _own(method: str | MethodConfig, options: Mapping[str, Any], data: Any) -> Proposal:
    """A user's own method as a proposal; of a config object the options that differ from the defaults."""
    config = resolve_method(method, options)
    looks = data is not None and config.data != "never"
    check_wants_data(config, data if looks else None)
    shown: Shown | None = None if not looks else data if data in WORDS else "given"
    fields = config.option_fields()
    stated = {name: plain(value) for name, value in options.items()}
    if isinstance(method, MethodConfig):
        stated = {name: value for name, value in config.options().items() if value != fields[name].default}
    return Proposal(config.name, "your own", (), stated, shown)


@contextmanager
def _folder(output: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The folder that candidates are merged in; a temporary one goes when all is done."""
    if output is not None:
        yield Path(output).expanduser()
        return
    with tempfile.TemporaryDirectory(prefix="hf_fda-") as folder:
        yield Path(folder)
