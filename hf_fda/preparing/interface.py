"""What a method has to find out before a tensor can be merged."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from torch import Tensor

from hf_fda.lowrank import LowRank
from hf_fda.merge_methods import MethodConfig
from hf_fda.running import Run
from hf_fda.stages import Piece


class Preparation:
    """What a method does before tensors are written. Most need nothing: this one does nothing.

    Args:
        run: the run it is part of.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.plan = run, run.plan

    @property
    def count(self) -> int:
        """How many pieces of work it has."""
        return 0

    def stages(self, wanted: Container[str]) -> Iterator[Sequence[Piece]]:
        """The stages in their order; each is asked for when the one before is done by all processes.

        Args:
            wanted: the base's names of the tensors that still have to be written.
        """
        return iter(())

    def key(self, name: str) -> str | None:
        """A hash of everything found out that determines how one of the base's tensors is merged.

        Args:
            name: the base's name of it.
        """
        return None

    def settled(self, name: str, config: MethodConfig) -> MethodConfig:
        """The config that one of the base's tensors is merged by, with what was found out; all stages are done.

        Args:
            name: the base's name of it.
            config: the one that its recipe says.
        """
        return config

    def adapted(self, name: str) -> Tensor | LowRank:
        """One of the base's tensors that was adapted with its unit, or as factors what is added to it; all stages are
        done.

        Args:
            name: the base's name of it.
        """
        raise KeyError(name)
