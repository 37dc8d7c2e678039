"""The command `hf-fda`: each subcommand is one public function."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from hf_fda.arguments import (
    advice_arguments,
    asked_metrics,
    document_arguments,
    merge_arguments,
    method_options,
    read_text,
    scored_data,
)
from hf_fda.command_line import LOOSE_COMMANDS, parser, take_options
from hf_fda.errors import HFFDAError, InputError, PeerError, agreed
from hf_fda.launch import is_main, several

SHARED_COMMANDS = (*(name for name in LOOSE_COMMANDS if name != "advise"), "extract")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status is 0 when done, 2 for bad arguments or input, 1 for a failure on the way.

    Of several processes launched together only the main one speaks, unless another one fails on its own.
    """
    if not is_main():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    words, loose = take_options(list(sys.argv[1:] if argv is None else argv))
    try:
        arguments = _parse(words)
    except SystemExit:
        _part()
        raise
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    level = logging.DEBUG if getattr(arguments, "verbose", False) else logging.INFO
    logging.getLogger("hf_fda").setLevel(level if is_main() else logging.ERROR)
    try:
        if several() and words[0] not in SHARED_COMMANDS:
            raise agreed(InputError(f"{words[0]} is the work of one process; start it without torchrun"))
        COMMANDS[arguments.command](arguments, loose)
        _part()
    except HFFDAError as error:
        if is_main() or not (error.agreed or isinstance(error, PeerError)):
            print(f"hf-fda: {error}", file=sys.stderr, flush=True)
        if error.agreed:
            _part()
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:  # whoever read what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if is_main():
            print("hf-fda: interrupted; the same command goes on from here", file=sys.stderr)
        return 1
    return 0


def _part() -> None:
    """Let all processes end at once, so that the launcher kills none for the end of another."""
    if several():
        from hf_fda.processes import leave, together

        with together("cpu"):  # who has not met the others yet does
            leave()


def _parse(words: list[str]) -> argparse.Namespace:
    """The parsed command line; what is wrong with it is said by the main process only."""
    if is_main():
        return parser().parse_args(words)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return parser().parse_args(words)


@contextmanager
def _loading() -> Iterator[None]:
    """While the libraries are imported: what they make stays for good, so that the collector need never look at it."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def _merge(arguments: argparse.Namespace, loose: list[tuple[str, str]]) -> None:
    with _loading():
        from hf_fda.configured import merge_config
        from hf_fda.merging import merge

    if is_document(arguments.config):
        merged = merge_config(arguments.config, quiet=arguments.quiet, **document_arguments(arguments, loose))
    else:
        merged = merge(**_agreed_arguments(arguments, loose), quiet=arguments.quiet)
    if not arguments.quiet and is_main():
        print(f"Merged into {merged.folder}")
        for found in (merged.coefficients, merged.report):
            if found is not None:
                print(found)
        if merged.tasks:
            print(f'  hf_fda.load("{merged.folder}", task="{merged.tasks[0]}")  # {", ".join(merged.tasks)}')


def _plan(arguments: argparse.Namespace, loose: list[tuple[str, str]]) -> None:
    with _loading():
        from hf_fda.configured import plan_config
        from hf_fda.planning import plan

    if is_document(arguments.config):
        plans = plan_config(arguments.config, processes=arguments.processes, **document_arguments(arguments, loose))
    else:
        plans = (plan(**_agreed_arguments(arguments, loose), processes=arguments.processes),)
    if is_main():
        print(*plans, sep="\n\n")


def _advise(arguments: argparse.Namespace, loose: list[tuple[str, str]]) -> None:
    with _loading():
        from hf_fda.advising.advising import advise

    if is_document(arguments.config):
        raise InputError(f"{arguments.config}: says which method to merge with; advice takes --base and --source")
    print(advise(**advice_arguments(arguments, loose), quiet=arguments.quiet))


def is_document(config: str | None) -> bool:
    """Whether a configuration file is there and mergekit's."""
    from hf_fda.mergekit import is_mergekit

    return config is not None and is_mergekit(read_text(Path(config)))


def _agreed_arguments(arguments: argparse.Namespace, loose: list[tuple[str, str]]) -> dict[str, Any]:
    """As `_merge_arguments`; what one process refuses, all refuse."""
    if not several():
        return merge_arguments(arguments, loose)
    from hf_fda.processes import together

    with together(arguments.device or "auto") as team:
        return team.agree(lambda: merge_arguments(arguments, loose))


def _methods(arguments: argparse.Namespace, _: list[tuple[str, str]]) -> None:
    from hf_fda.merge_methods import method_class, methods

    known = methods()
    if arguments.name:
        print(known[method_class(arguments.name).name])
        return
    width = max(map(len, known))
    for name, info in known.items():
        print(f"{name:<{width}}  {info.summary} ({info.paper})")
    print("\nhf-fda methods NAME lists a method's options.")


def _anchors(arguments: argparse.Namespace, loose: list[tuple[str, str]]) -> None:
    with _loading():
        from hf_fda.anchors import FunctionalDualAnchors

    FunctionalDualAnchors.construct(
        arguments.base,
        arguments.source,
        device=arguments.device or "auto",
        seed=arguments.seed or 0,
        trust_remote_code=arguments.trust_remote_code,
        output=arguments.output,
        dtype=arguments.dtype or "float32",
        include_rest=arguments.with_rest,
        include_head=arguments.with_head,
        snapshots=arguments.snapshot or (),
        quiet=arguments.quiet,
        **method_options(loose),
    )
    if not arguments.quiet and is_main():
        print(f"Anchors in {arguments.output}")


def _extract(arguments: argparse.Namespace, _: list[tuple[str, str]]) -> None:
    with _loading():
        from hf_fda.merging import extract

    if arguments.rank is None and arguments.energy is None:
        raise InputError("say how large the adapter may be: --rank R or --energy E (1 keeps all)")
    adapter = extract(
        arguments.base,
        arguments.source,
        arguments.output,
        arguments.rank,
        arguments.energy,
        device=arguments.device or "auto",
        dtype=arguments.dtype or "float32",
        tokenizer=arguments.tokenizer,
        trust_remote_code=arguments.trust_remote_code,
        quiet=arguments.quiet,
    )
    if not arguments.quiet and is_main():
        print(f"Adapter in {adapter.folder}\n{adapter.report}")


def _evaluate(arguments: argparse.Namespace, _: list[tuple[str, str]]) -> None:
    with _loading():
        from hf_fda.evaluation.evaluating import evaluate

    given = scored_data(arguments.task, arguments.columns or (), arguments.label or ())
    settings = ("batch_size", "max_length", "max_new_tokens", "device", "dtype", "seed")
    said = {name: getattr(arguments, name) for name in settings if getattr(arguments, name) is not None}
    scores = evaluate(
        arguments.folder,
        given,
        asked_metrics(arguments.metric or (), given),
        individual=arguments.individual,
        rows=arguments.rows,
        base=arguments.base,
        trust_remote_code=arguments.trust_remote_code,
        quiet=arguments.quiet,
        **said,
    )
    print(scores)


def _analyze(arguments: argparse.Namespace, _: list[tuple[str, str]]) -> None:
    with _loading():
        from hf_fda.analysis.analyzing import analyze

    settings = ("rows", "grid", "batch_size", "max_length", "device", "seed")
    said = {name: getattr(arguments, name) for name in settings if getattr(arguments, name) is not None}
    found = analyze(
        arguments.folder,
        scored_data(arguments.data or (), arguments.columns or (), arguments.label or (), flag="--data"),
        output=arguments.output,
        base=arguments.base,
        through=arguments.through or (),
        trust_remote_code=arguments.trust_remote_code,
        quiet=arguments.quiet,
        **said,
    )
    if not arguments.quiet:
        print(found)


def _card(arguments: argparse.Namespace, _: list[tuple[str, str]]) -> None:
    from hf_fda.card_record import remake_card

    print(remake_card(Path(arguments.folder)))


def _push(arguments: argparse.Namespace, _: list[tuple[str, str]]) -> None:
    from hf_fda.pushing import push

    address = push(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private or None,
        revision=arguments.revision,
        commit_message=arguments.commit_message,
        create_pr=arguments.create_pr,
    )
    print(address)


def _demo(arguments: argparse.Namespace, _: list[tuple[str, str]]) -> None:
    from hf_fda.demo import run_demo

    run_demo(Path(arguments.output), seed=arguments.seed, quiet=arguments.quiet)


COMMANDS: dict[str, Callable[[argparse.Namespace, list[tuple[str, str]]], None]] = {
    "merge": _merge,
    "plan": _plan,
    "advise": _advise,
    "anchors": _anchors,
    "extract": _extract,
    "evaluate": _evaluate,
    "analyze": _analyze,
    "card": _card,
    "methods": _methods,
    "demo": _demo,
    "push": _push,
}


if __name__ == "__main__":
    sys.exit(main())
