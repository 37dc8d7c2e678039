"""Publish the anchors of fine-tuned models, merge from what was published alone, score the merge, and publish it.

    python examples/share_anchors.py --checkpoints DIR --tasks DIR --namespace me
    python examples/share_anchors.py --checkpoints DIR --tasks DIR --local

`--checkpoints` holds a folder `base` and one for each fine-tune, named after its task; `--tasks` holds
`TASK.test.jsonl` with `text`, perhaps `text_pair`, and `label`. With `--local` everything goes to a small server here
that speaks the Hub's protocol (`tests/hub_server.py`) in place of the real one. Each step tells its seconds; at
the end stand the sizes of what was published beside those of the checkpoints, and the scores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PRIVATE = "hf_of_nobody"
"""The token for the small server, which takes any."""


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long something took."""
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.0f} seconds", flush=True)


def megabytes(folder: Path) -> float:
    """Size of a folder's files that go to the Hub."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return sum(path.stat().st_size for path in files) / 1e6


def on_a_small_server(arguments: Sequence[str], home: Path) -> int:
    """Run this script again with a server of its own for a Hub."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from hub_server import FakeHub

    hub = FakeHub()
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": PRIVATE,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    words = [sys.executable, __file__, *(word for word in arguments if word != "--local"), "--namespace", "me"]
    try:
        return subprocess.run(words, env={**os.environ, **environment}).returncode
    finally:
        hub.stop()


def share(options: argparse.Namespace) -> None:
    """The whole way, from checkpoints to a published merge."""
    import hf_fda

    me, work, base = options.namespace, options.work, str(options.checkpoints / "base")
    names = sorted(path.name for path in options.checkpoints.iterdir() if path.is_dir() and path.name != "base")
    with timed("publish the base"):
        base_id = publish_base(base, f"{me}/base")
    sizes = []
    for name in names:
        folder = work / "anchors" / name
        with timed(f"make the anchors of {name} and publish them"):
            anchors = hf_fda.FunctionalDualAnchors.construct(
                base_id,
                str(options.checkpoints / name),
                output=folder,
                dtype=options.dtype,
                include_head=True,
                include_rest=options.with_rest,
                quiet=True,
            )
            anchors.push_to_hub(f"{me}/anchors-{name}")
        sizes.append((name, megabytes(options.checkpoints / name), megabytes(folder)))
        shutil.rmtree(folder)
    with timed("merge from what was published"):
        merged = hf_fda.merge(
            base_id, {name: f"{me}/anchors-{name}" for name in names}, output=work / "merged", quiet=True
        )
    data = {name: str(options.tasks / f"{name}.test.jsonl") for name in names}
    with timed("score the merge"):
        scores = hf_fda.evaluate(merged, data, rows=options.rows, max_length=64, quiet=True)
    with timed("publish the merge"):
        print(merged.push_to_hub(f"{me}/merged"))
    print("\n| task | checkpoint, MB | anchors, MB |\n| --- | --- | --- |")
    for name, whole, small in sizes:
        print(f"| {name} | {whole:.1f} | {small:.1f} |")
    print(f"\n{scores}")
    loaded = hf_fda.load(f"{me}/merged", task=names[0])
    print(f"\n{me}/merged loads as a {type(loaded).__name__}")


def publish_base(folder: str, repo_id: str) -> str:
    """Upload the base, unless it is there; its id."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, exist_ok=True)
    if not api.file_exists(repo_id, "config.json"):
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    return repo_id


def main() -> int:
    """Parse, share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folders `base` and one for each fine-tune")
    parser.add_argument("--tasks", type=Path, required=True, help="TASK.test.jsonl")
    parser.add_argument("--work", type=Path, default=Path("share_anchors"), help="where folders are made")
    parser.add_argument("--namespace", help="whose repositories on the Hub")
    parser.add_argument("--local", action="store_true", help="on a small server of this machine in place of the Hub")
    parser.add_argument("--dtype", default="float32", help="type in which anchors are stored (default float32)")
    parser.add_argument("--with-rest", action="store_true", help="publish what changed outside the blocks, too")
    parser.add_argument("--rows", type=int, default=1000, help="test rows a task at most")
    options = parser.parse_args()
    if options.local:
        return on_a_small_server(sys.argv[1:], options.work.resolve() / "home")
    if options.namespace is None:
        parser.error("give --namespace, or --local")
    share(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
