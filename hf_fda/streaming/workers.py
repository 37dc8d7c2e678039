"""Several tensors at a time, and several parts of a large one, in order and within a budget of bytes.

Torch's kernels, reads and writes let other threads run, so threads are enough. Two pools keep each other busy: a few
threads bring one tensor each on its way (they read and wait), and as many as there are cores compute. Each of these
computes with one thread of torch, so that no result depends on how many there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")
S = TypeVar("S")

AHEAD = 2
"""Tensors on their way beside those that are being computed."""


class Workers:
    """The threads of one process; a context manager.

    Args:
        count: threads that compute; as many as torch would use if None.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count or torch.get_num_threads()
        self._items = ThreadPoolExecutor(self.count + AHEAD, "tensor", torch.set_num_threads, (1,))
        self._parts = ThreadPoolExecutor(self.count, "part", torch.set_num_threads, (1,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parts.shutdown(cancel_futures=kind is not None)
        self._items.shutdown(cancel_futures=kind is not None)

    def begin(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """One call in a thread that brings items on their way, behind those that are begun; it may use `compute` and
        `each`."""
        return self._items.submit(function, *arguments)

    def compute(self, function: Callable[..., T], *arguments: object) -> T:
        """One call in a thread that computes; the caller waits."""
        return self._parts.submit(function, *arguments).result()

    def each(self, function: Callable[[S], T], parts: Sequence[S]) -> Iterator[T]:
        """`function` of every part, in the order of the parts, computed side by side."""
        return self._parts.map(function, parts)

    def in_order(
        self, function: Callable[[S], T], items: Iterable[S], size: Callable[[S], int], budget: int
    ) -> Iterator[T]:
        """`function` of every item, in the order of the items; the next ones are begun while one is being used.

        Args:
            function: brings one item on its way; may use `compute` and `each`.
            items: what to do.
            size: bytes that an item holds until the one after it is asked for.
            budget: bytes that all begun items hold together; a single larger one is done alone.
        """
        begun: deque[tuple[Future[T], int]] = deque()
        held = 0
        try:
            for item in items:
                need = size(item)
                while begun and (held + need > budget or len(begun) == limit(self.count)):
                    future, own = begun[0]
                    yield future.result()
                    del future
                    begun.popleft()
                    held -= own
                begun.append((self._items.submit(function, item), need))
                held += need
            while begun:
                yield begun[0][0].result()
                begun.popleft()
        finally:
            for future, _ in begun:
                future.cancel()


def limit(count: int) -> int:
    """Items that are on their way, or done and not yet used, with so many threads that compute."""
    return count + AHEAD + 1


def most_held(sizes: Sequence[int], budget: int, count: int) -> int:
    """The most bytes that the items of `Workers.in_order` hold together.

    >>> most_held([3, 1, 1, 9], budget=4, count=1)
    9

    Args:
        sizes: of the items, in order.
        budget: as there.
        count: threads that compute.
    """
    begun: deque[int] = deque()
    most = 0
    for need in sizes:
        while begun and (sum(begun) + need > budget or len(begun) == limit(count)):
            begun.popleft()
        begun.append(need)
        most = max(most, sum(begun))
    return most


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's threads of the calling thread, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
