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

from hf_fda.arguments import document_arguments, merge_arguments, method_options, read_text
from hf_fda.errors import HFFDAError, InputError, PeerError, agreed
from hf_fda.launch import is_main, several
from hf_fda.version import __version__

LOOSE_COMMANDS = ("merge", "plan", "anchors")
SHARED_COMMANDS = (*LOOSE_COMMANDS, "extract")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status is 0 when done, 2 for bad arguments or input, 1 for a failure on the way.

    Of several processes launched together only the main one speaks, unless another one fails on its own.
    """
    if not is_main():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    words, loose = _take_options(list(sys.argv[1:] if argv is None else argv))
    arguments = _parse(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    level = logging.DEBUG if getattr(arguments, "verbose", False) else logging.INFO
    logging.getLogger("hf_fda").setLevel(level if is_main() else logging.ERROR)
    try:
        if several() and words[0] not in SHARED_COMMANDS:
            raise agreed(InputError(f"{words[0]} is the work of one process; start it without torchrun"))
        arguments.command(arguments, loose)
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
    if several() and "hf_fda.processes" in sys.modules:
        from hf_fda.processes import leave

        leave()


def _parse(words: list[str]) -> argparse.Namespace:
    """The parsed command line; what is wrong with it is said by the main process only."""
    if is_main():
        return _parser().parse_args(words)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return _parser().parse_args(words)


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
        if merged.report is not None:
            print(merged.report)
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


def _push(arguments: argparse.Namespace, _: list[tuple[str, str]]) -> None:
    from hf_fda.pushing import push

    address = push(arguments.folder, arguments.repo_id, private=arguments.private or None, revision=arguments.revision)
    print(address)


def _demo(arguments: argparse.Namespace, _: list[tuple[str, str]]) -> None:
    from hf_fda.demo import run_demo

    run_demo(Path(arguments.output), seed=arguments.seed, quiet=arguments.quiet)


def _take_options(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Part a command line into what the parser knows and the method's own options.

    Those are written `--num-anchors 64`, `--num-anchors=64` or, for true, `--normalize`.
    """
    if not words or words[0] not in LOOSE_COMMANDS:
        return words, []
    known, loose = words[:1], []
    flags = set(_subparser(words[0])._option_string_actions)
    position = 1
    while position < len(words):
        word = words[position]
        name, equals, value = word.partition("=")
        position += 1
        if not word.startswith("--") or name in flags:
            known.append(word)
            if name in flags and not equals and position < len(words) and _takes_value(words[0], name):
                known.append(words[position])
                position += 1
            continue
        if not equals:
            value = "true"
            if position < len(words) and not words[position].startswith("--"):
                value, position = words[position], position + 1
        loose.append((name[2:], value))
    return known, loose


def _subparser(command: str) -> argparse.ArgumentParser:
    actions = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return actions[0].choices[command]


def _takes_value(command: str, flag: str) -> bool:
    return _subparser(command)._option_string_actions[flag].nargs != 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-fda", description="Merge models that were fine-tuned from one base.")
    parser.add_argument("--version", action="version", version=f"hf-fda {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    for name, function, help in (
        ("merge", _merge, "merge sources into a folder that transformers loads"),
        ("plan", _plan, "check a merge and say what it would do; reads no weights, writes nothing"),
    ):
        command = _command(commands, name, function, help)
        command.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="a configuration, as merge_config.yaml")
        command.add_argument("--base", help="folder or Hub id (org/name, org/name@revision)")
        command.add_argument("--source", action="append", metavar="[TASK=]S", help="a fine-tune of the base; repeat")
        command.add_argument("--method", help="merge method (default fda); see hf-fda methods")
        command.add_argument("--output", required=name == "merge", default=None, help="the folder to write")
        command.add_argument("--anchors", action="append", metavar="TASK=DIR", help="anchors made earlier for a source")
        command.add_argument("--as-adapter", action="store_true", help="write a PEFT adapter, not a full checkpoint")
        command.add_argument("--rank", type=int, help="of the adapter's factors, at most (default: exact)")
        command.add_argument("--energy", type=float, help="fraction of the squared norm that the factors keep")
        command.add_argument("--dtype", help="type of the written weights (default float32; auto: the base's)")
        command.add_argument("--heads", choices=("keep", "merge"), help="task heads: keep each (default) or merge them")
        command.add_argument("--tokenizer", help="the output's vocabulary: base, union or a source's name")
        command.add_argument("--chat-template", help="auto, base, a source's name or the template itself")
        command.add_argument("--pad-to-multiple-of", type=int, metavar="N", help="of the output's vocabulary")
        command.add_argument("--max-shard-bytes", type=int, help="size of a weight file")
        _common(command)
        if name == "plan":
            command.add_argument("--processes", type=int, metavar="N", help="predict the time on so many processes")

    command = _command(commands, "anchors", _anchors, "construct the anchors of one fine-tune")
    command.add_argument("--base", required=True, help="folder or Hub id")
    command.add_argument("--source", required=True, help="the fine-tune: folder or Hub id")
    command.add_argument("--output", required=True, help="the folder to write")
    _common(command)

    command = _command(commands, "extract", _extract, "make a PEFT adapter of a full fine-tune")
    command.add_argument("--base", required=True, help="folder or Hub id")
    command.add_argument("--source", required=True, help="the fine-tune: folder or Hub id")
    command.add_argument("--output", required=True, help="the folder to write")
    command.add_argument("--rank", type=int, help="of the factors, at most")
    command.add_argument("--energy", type=float, help="fraction of the squared norm that the factors keep")
    command.add_argument("--dtype", help="type of the written weights (default float32)")
    command.add_argument("--tokenizer", help="base: leave out the tokens that the base lacks")
    _common(command)

    command = _command(commands, "methods", _methods, "list the merge methods, or one method's options")
    command.add_argument("name", nargs="?", metavar="NAME")

    command = _command(commands, "demo", _demo, "train, merge and compare small models on real handwritten digits")
    command.add_argument("--output", default="demo", help="the folder to write (default demo/)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--quiet", action="store_true", help="print the table only")

    command = _command(commands, "push", _push, "upload a merged folder or an anchors folder to the Hub")
    command.add_argument("folder", metavar="DIR")
    command.add_argument("repo_id", metavar="REPO_ID")
    command.add_argument("--private", action="store_true")
    command.add_argument("--revision", help="branch to push to")
    return parser


def _command(commands: Any, name: str, function: Callable[..., None], help: str) -> argparse.ArgumentParser:
    loose = name in LOOSE_COMMANDS
    epilog = "Options of the method follow as --name value; hf-fda methods NAME lists them." if loose else None
    command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=epilog)
    command.set_defaults(command=function)
    return command


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="auto (default) or a torch device")
    command.add_argument("--seed", type=int, help="of everything random (default 0)")
    command.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with a checkpoint")
    command.add_argument("--quiet", action="store_true", help="no progress, no closing words")
    command.add_argument("--verbose", action="store_true", help="say more")


if __name__ == "__main__":
    sys.exit(main())
