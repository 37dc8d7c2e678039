"""Which merges the demo compares, and what each is called in the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_fda.demo.settings import Settings

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "linear": [{}],
    "task_arithmetic": [{"scaling": 0.45}],
    "tsv": [{"scaling": 1.75}],
    "isotropic": [{"scaling": 3.5}],
    "wudi": [{"solver": "iterative", "scaling": 0.9}, {"solver": "closed_form", "scaling": 1.4}],
    "ties": [{"density": 0.5, "scaling": 1.0}],
    "knots": [{"density": 0.5, "scaling": 1.0}],
}
"""Options of the parameter-space methods: for each the scaling that is best on validation rows, over seeds 0, 1 and 2
and over a grid with worse values on both sides, so that fda is compared with each at its best."""

STARTS: list[dict[str, Any]] = [
    {"initial": "isotropic", "scaling": 3.0},
    {"initial": "tsv", "scaling": 1.75},
    {"initial": "wudi", "solver": "closed_form", "scaling": 1.4},
    {"initial": "task_arithmetic", "scaling": 0.45},
    {"initial": "base"},
]
"""Where fda starts from: its own default, then the others at their best scalings; all else are its defaults. The first
constructs the anchors, the others reuse them."""


@dataclass(frozen=True)
class Merge:
    """A row of the table: its label and what `hf_fda.merge` gets."""

    label: str
    method: str
    options: dict[str, Any]

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return self.label.replace(" ", "_")


def merges(settings: Settings) -> Iterator[Merge]:
    """The base with the tasks' heads, then methods in parameter space, fda last."""
    yield Merge("base with own heads", "task_arithmetic", {"scaling": 0.0})
    for name, variants in VARIANTS.items():
        for options in variants:
            yield Merge(f"{name} {options['solver']}" if "solver" in options else name, name, options)
    for start in STARTS:
        options = {**start, "steps": settings.steps, "num_anchors": settings.num_anchors}
        if settings.epochs is not None:
            options["epochs"] = settings.epochs
        yield Merge(f"fda from {start['initial']}", "fda", options)
