"""What a run tells its user: one bar on a terminal, log lines elsewhere, nothing when quiet."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

logger = logging.getLogger("hf_fda")


class Progress:
    """Counts finished pieces of work.

    Args:
        total: number of pieces, as far as it is known.
        quiet: say nothing.
        every: seconds between two lines when there is no terminal.
    """

    def __init__(self, total: int = 0, quiet: bool = False, every: float = 10.0) -> None:
        self.total, self.done, self.quiet, self.every = total, 0, quiet, every
        self._spoke = time.monotonic()
        terminal = sys.stderr.isatty() and not quiet
        self._bar: Any = tqdm(total=total, unit="step", file=sys.stderr, leave=False) if terminal else None

    def expect(self, total: int) -> None:
        """Say how many pieces there are."""
        self.total = total
        if self._bar is not None:
            self._bar.reset(total)

    def now(self, what: str, loss: float | None = None) -> None:
        """Say what is being worked on, with its current loss."""
        text = what if loss is None else f"{what}  loss {loss:.4f}"
        logger.debug("%s", text)
        if self._bar is not None:
            self._bar.set_description_str(text)
        elif not self.quiet and time.monotonic() - self._spoke > self.every:
            self._spoke = time.monotonic()
            logger.info("%d of %d: %s", self.done + 1, self.total, text)

    def finish(self, what: str) -> None:
        """One piece is done."""
        self.done += 1
        logger.debug("done: %s", what)
        if self._bar is not None:
            self._bar.update(1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
