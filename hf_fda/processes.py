"""The processes that work on one merge: who they are, what they tell each other, and when they wait.

They are started by `torchrun` or `accelerate launch` and found by Accelerate's `PartialState`. They talk through a
gloo group of their own, whose timeout is PATIENCE: work is uneven and long, and the timeout of the group that
`PartialState` opens (ten minutes for NCCL, thirty for gloo, or whatever the user's script asked for) must not end it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from hf_fda.errors import HFFDAError, PeerError, agreed
from hf_fda.launch import several

T = TypeVar("T")
S = TypeVar("S")

PATIENCE = timedelta(days=30)
"""How long a process waits for the others at most; one that ends is noticed at once, as its connections close."""

_groups: dict[int, Any] = {}  # the gloo group by the default group it belongs to


def partial_state(device: str | torch.device = "auto") -> PartialState:
    """Accelerate's state of this process; joins the other processes when first asked.

    Args:
        device: "auto" or a device; with the CPU, or no accelerator here, processes join by gloo.
    """
    # Without cpu=True a process launched on a machine without GPUs believes that it is alone.
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    on_cpu = not accelerated or (device != "auto" and str(device).startswith("cpu"))
    if PartialState._shared_state or not several():
        return PartialState(cpu=on_cpu)
    return PartialState(cpu=on_cpu, timeout=PATIENCE)


class Team:
    """The processes of one merge, as one of them sees it; alone by default.

    Args:
        rank: this process, from 0.
        count: number of processes.
        group: the gloo group they talk through; None when alone.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None) -> None:
        self.rank, self.count, self._group = rank, count, group
        self.near = 1
        """How many of the first processes are on the main one's machine."""

    @property
    def main(self) -> bool:
        """Whether this is the process that speaks and publishes."""
        return self.rank == 0

    def meet(self) -> None:
        """Find out who is on the main process's machine; all do this at once.

        Raises:
            PeerError: when another process ended or failed.
        """
        hosts = self.gather(socket.gethostname())
        self.near = next((rank for rank, host in enumerate(hosts) if host != hosts[0]), self.count)

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank; all wait for each other.

        Raises:
            PeerError: when another process ended or failed.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.count
        with _peer_errors():
            distributed.all_gather_object(values, value, group=self._group)
        return values

    def wait(self) -> None:
        """Wait until every process is here.

        Raises:
            PeerError: when another process ended or failed.
        """
        if self._group is not None:
            with _peer_errors():
                distributed.barrier(group=self._group)

    def from_owner(self, value: T | None, owner: int) -> T:
        """One process's value, in all of them.

        Raises:
            PeerError: when another process ended or failed.
        """
        held: list[Any] = [value]
        if self._group is not None:
            with _peer_errors():
                distributed.broadcast_object_list(held, src=owner, group=self._group)
        return held[0]

    def swap(self, own: Tensor, taken: Tensor, other: int) -> None:
        """Give another process a tensor and take the one that it gives.

        Args:
            own: on the CPU.
            taken: of its shape and type; gets the other's.
            other: the other process.

        Raises:
            PeerError: when the other process ended or failed.
        """
        with _peer_errors():
            sending = distributed.isend(own, other, group=self._group)
            distributed.recv(taken, other, group=self._group)
            assert sending is not None
            sending.wait()

    def map(self, function: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """`function` of every item, in all processes; each calls it for its share of the items.

        Raises:
            PeerError: when another process ended or failed.
        """
        own = {number: function(items[number]) for number in range(self.rank, len(items), self.count)}
        results: dict[int, T] = {}
        for part in self.gather(own):
            results.update(part)
        return [results[number] for number in range(len(items))]

    def agree(self, work: Callable[[], T]) -> T:
        """Do the same in every process; what one refuses, all refuse.

        Raises:
            HFFDAError: what the first process that failed raised, marked as `agreed`.
            PeerError: when another process ended.
        """
        result, failure = None, None
        try:
            result = work()
        except HFFDAError as error:
            if self._group is None or error.agreed:
                raise
            failure = error
        failures = self.gather(None if failure is None else (type(failure), str(failure), self._here()))
        first = next((found for found in failures if found is not None), None)
        if first is not None:
            kind, text, where = first
            shared = all(found is not None and found[1] == text for found in failures)
            raise agreed(kind(text if shared else f"{where}: {text}")) from None
        return result  # type: ignore[return-value]

    def _here(self) -> str:
        return f"process {self.rank} on {socket.gethostname()}"


@contextmanager
def together(device: str | torch.device = "auto") -> Iterator[Team]:
    """The processes that were launched together, for as long as they work on one thing.

    When one fails on its own, its connections are closed, so that those who wait for it are told.

    Args:
        device: "auto" or a device, as `partial_state`.
    """
    if not several():
        yield Team()
        return
    partial_state(device)
    if not distributed.is_initialized():
        yield Team()
        return
    key = id(distributed.group.WORLD)
    if key not in _groups:
        _groups[key] = distributed.new_group(backend="gloo", timeout=PATIENCE)
    team = Team(distributed.get_rank(), distributed.get_world_size(), _groups[key])
    try:
        team.meet()
        yield team
    except BaseException as error:
        if not getattr(error, "agreed", False) and key in _groups:
            team._group = None
            distributed.destroy_process_group(_groups.pop(key))
        raise


def leave() -> None:
    """Wait for the others and end what `partial_state` joined, at the end of a program that all leave alike."""
    if distributed.is_initialized():
        for group in _groups.values():
            with suppress(RuntimeError):
                distributed.barrier(group=group)
        _groups.clear()
        distributed.destroy_process_group()


@contextmanager
def _peer_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError:  # whatever a backend raises when a connection closes
        raise PeerError(
            "another process failed or was killed (its own message, if it left one, says why); "
            "the same command goes on from here"
        ) from None
