"""Processes that talk to the Hub of the tests: huggingface_hub reads its address when it is imported."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hub_server import FakeHub

from hf_fda.errors import HFFDAError

Away = Callable[..., Any]
"""Calls a function in the other process: ``away(function, *arguments, **options)``."""

TOKEN = "hf_of_the_tests"


def guarded(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call a function; an error that is none of ours comes back as a failed assertion with its whole story."""
    try:
        return function(*arguments, **options)
    except HFFDAError:
        raise
    except BaseException:
        raise AssertionError(traceback.format_exc()) from None


@contextlib.contextmanager
def process(**environment: str) -> Iterator[Away]:
    """A process with its own environment."""
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) or name.lower().endswith("_proxy"):
                patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        pool = ProcessPoolExecutor(1, mp_context=context)
        pool.submit(os.getpid).result()
    with pool:
        yield lambda function, *arguments, **options: pool.submit(guarded, function, arguments, options).result()


def environment_of(hub: FakeHub, home: Path) -> dict[str, str]:
    """What makes a process talk to a server, and keep what it downloads in a folder."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
