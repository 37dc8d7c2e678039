"""What can be said to `hf-fda`: its commands, their flags, and how options of a method are told apart from these."""

from __future__ import annotations

import argparse
from typing import Any

from hf_fda.version import __version__

LOOSE_COMMANDS = ("merge", "plan", "advise", "anchors")
"""Commands that options of a method may follow."""


def take_options(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
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
    actions = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return actions[0].choices[command]


def _takes_value(command: str, flag: str) -> bool:
    return _subparser(command)._option_string_actions[flag].nargs != 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-fda", description="Merge models that were fine-tuned from one base.")
    parser.add_argument("--version", action="version", version=f"hf-fda {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    command = _command(commands, "merge", "merge sources into a folder that transformers loads")
    _merge_flags(command, output_required=True)
    command = _command(commands, "plan", "check a merge and say what it would do; reads no weights, writes nothing")
    _merge_flags(command)
    command.add_argument("--processes", type=int, metavar="N", help="predict the time on so many processes")
    help = "recommend a method and settings for a merge, with reasons and cost; try a few on held-out rows"
    command = _command(commands, "advise", help)
    _merge_flags(command)
    _advise_flags(command)
    _anchors_flags(_command(commands, "anchors", "construct the anchors of one fine-tune"))
    _extract_flags(_command(commands, "extract", "make a PEFT adapter of a full fine-tune"))
    help = "score a merged model on rows with labels, and put that into its card"
    _evaluate_flags(_command(commands, "evaluate", help))
    _analyze_flags(_command(commands, "analyze", "look at anchors or at a merge, and draw what is seen"))
    command = _command(commands, "card", "make the card of a merged folder anew, from what is recorded there")
    command.add_argument("folder", metavar="DIR")
    command = _command(commands, "methods", "list the merge methods, or one method's options")
    command.add_argument("name", nargs="?", metavar="NAME")
    _demo_flags(_command(commands, "demo", "train, merge and compare small models on real handwritten digits"))
    _push_flags(_command(commands, "push", "upload a merged folder or an anchors folder to the Hub"))
    return parser


def _merge_flags(command: argparse.ArgumentParser, output_required: bool = False) -> None:
    command.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="a configuration, as merge_config.yaml")
    command.add_argument("--base", help="folder or Hub id (org/name, org/name@revision)")
    command.add_argument("--source", action="append", metavar="[TASK=]S", help="a fine-tune of the base; repeat")
    command.add_argument("--method", help="merge method (default fda); see hf-fda methods")
    command.add_argument(
        "--data", action="append", metavar="TASK=ROWS", help="its rows: a file or dataset; or: synthetic, anchors"
    )
    command.add_argument("--columns", action="append", metavar="TASK=A[,B]", help="its text, or both texts of a pair")
    command.add_argument("--split", action="append", metavar="TASK=SPLIT", help="of its dataset")
    command.add_argument("--output", required=output_required, default=None, help="the folder to write")
    command.add_argument("--anchors", action="append", metavar="TASK=DIR", help="anchors made earlier for a source")
    command.add_argument("--force", action="store_true", help="merge anchors made on another revision of the base")
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


def _anchors_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", required=True, help="folder or Hub id")
    command.add_argument("--source", required=True, help="the fine-tune: folder or Hub id")
    command.add_argument("--output", required=True, help="the folder to write")
    command.add_argument("--dtype", help="type to store anchors in: float32 (default), bfloat16, float16")
    command.add_argument("--with-rest", action="store_true", help="add what it changed outside the blocks")
    command.add_argument("--with-head", action="store_true", help="add its task head")
    command.add_argument(
        "--snapshot", action="append", type=int, metavar="STEPS", help="keep the anchors after so many steps; repeat"
    )
    _common(command)


def _extract_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", required=True, help="folder or Hub id")
    command.add_argument("--source", required=True, help="the fine-tune: folder or Hub id")
    command.add_argument("--output", required=True, help="the folder to write")
    command.add_argument("--rank", type=int, help="of the factors, at most")
    command.add_argument("--energy", type=float, help="fraction of the squared norm that the factors keep")
    command.add_argument("--dtype", help="type of the written weights (default float32)")
    command.add_argument("--tokenizer", help="base: leave out the tokens that the base lacks")
    _common(command)


def _evaluate_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", help="the merged folder, or a Hub id")
    command.add_argument(
        "--task",
        action="append",
        required=True,
        metavar="TASK=ROWS[:SPLIT]",
        help="its rows: a file or dataset; repeat",
    )
    command.add_argument("--columns", action="append", metavar="TASK=A[,B]", help="what the model reads")
    command.add_argument("--label", action="append", metavar="TASK=COLUMN", help="what is right: label, number or text")
    command.add_argument("--metric", action="append", metavar="[TASK=]NAME", help="repeat; default: the usual ones")
    command.add_argument("--individual", action="store_true", help="score each task's own fine-tune too")
    command.add_argument("--rows", type=int, metavar="N", help="at most so many of each task (default all)")
    command.add_argument("--batch-size", type=int, metavar="N", help="rows at a time (default 16)")
    command.add_argument("--max-length", type=int, metavar="N", help="tokens of a text, at most (default 512)")
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="that a model writes, at most (default 128)")
    command.add_argument("--dtype", help="type of the weights meanwhile (default auto: as they are stored)")
    command.add_argument("--base", help="of a merged adapter, where its base is now")
    _common(command)


def _demo_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", default="demo", help="the folder to write (default demo/)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--quiet", action="store_true", help="print the table only")


def _push_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR")
    command.add_argument("repo_id", metavar="REPO_ID")
    command.add_argument("--private", action="store_true")
    command.add_argument("--revision", help="branch to push to")
    command.add_argument("--commit-message", help="of the commit")
    command.add_argument("--create-pr", action="store_true", help="open a pull request")


def _analyze_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", nargs="+", help="a merged folder, or folders of anchors")
    command.add_argument(
        "--data", action="append", metavar="TASK=ROWS[:SPLIT]", help="rows of a task: a file or dataset; repeat"
    )
    command.add_argument("--columns", action="append", metavar="TASK=A[,B]", help="what the model reads")
    command.add_argument(
        "--label", action="append", metavar="TASK=COLUMN", help="what is right (default: compare with the fine-tune)"
    )
    command.add_argument("--output", help="the folder to write (default DIR/analysis)")
    command.add_argument("--base", help="of anchors, what they were constructed from; of a merge, where its base is")
    command.add_argument("--through", action="append", metavar="DIR", help="another merge on the path; repeat")
    command.add_argument("--rows", type=int, metavar="N", help="at most so many of each task (default 128)")
    command.add_argument("--grid", type=int, metavar="N", help="points on each axis of the landscape (default 9)")
    command.add_argument("--batch-size", type=int, metavar="N", help="rows at a time (default 16)")
    command.add_argument("--max-length", type=int, metavar="N", help="tokens of a text, at most (default 512)")
    _common(command)


def _command(commands: Any, name: str, help: str) -> argparse.ArgumentParser:
    loose = name in LOOSE_COMMANDS
    epilog = "Options of the method follow as --name value; hf-fda methods NAME lists them." if loose else None
    command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=epilog)
    command.set_defaults(command=name)
    return command


def _advise_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--try",
        dest="held",
        action="append",
        metavar="TASK=ROWS[:SPLIT]",
        help="held-out rows with labels, to try the first few on: a file or dataset; repeat, once for every source",
    )
    command.add_argument("--try-columns", action="append", metavar="TASK=A[,B]", help="what the model reads of these")
    command.add_argument("--label", action="append", metavar="TASK=COLUMN", help="what is right: label, number or text")
    command.add_argument("--metric", action="append", metavar="[TASK=]NAME", help="to rank by (default: the usual one)")
    command.add_argument("--try-rows", type=int, metavar="N", help="at most so many rows of each task (default all)")
    command.add_argument("--keep", type=int, metavar="N", help="of the recommended, how many are tried (default 3)")
    command.add_argument("--seconds", type=float, help="that a merge may take; slower methods come behind")


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="auto (default) or a torch device")
    command.add_argument("--seed", type=int, help="of everything random (default 0)")
    command.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with a checkpoint")
    command.add_argument("--quiet", action="store_true", help="no progress, no closing words")
    command.add_argument("--verbose", action="store_true", help="say more")
