"""Running a merge in several processes, as torchrun and Accelerate start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import debug_launcher
from accelerate.utils import patch_environment

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(*words: str | Path, processes: int = 2, launcher: Sequence[str] = ()) -> list[str]:
    """A command line that runs `hf-fda` in some processes of this machine."""
    own = launcher or [
        "--nproc_per_node",
        str(processes),
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
    ]
    return [sys.executable, "-m", "torch.distributed.run", *own, "-m", "hf_fda.cli", *map(str, words)]


def environment() -> dict[str, str]:
    """The environment of a command: this tree's package, one thread, no network."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start a command."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **pipes, **options)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a launcher and what it launched (in sessions of their own), at once and without a word."""
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        one.kill()
    process.communicate()


def run(*words: str | Path, processes: int = 2) -> tuple[int, str, str]:
    """Run `hf-fda` in some processes to the end: exit status of the launcher, output, error output."""
    process = start(torchrun(*words, processes=processes))
    output, errors = process.communicate(timeout=180)
    return process.returncode, output, errors


def fork(function: Callable[..., None], *arguments: Any, processes: int = 2) -> None:
    """Call a function in some forked processes that know of each other, as Accelerate's own tests do."""
    torch.set_num_threads(1)
    with patch_environment(OMP_NUM_THREADS="1"):
        debug_launcher(function, args=arguments, num_processes=processes)


def rank() -> int:
    """Which of some forked processes this is."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
