"""Which methods are recommended for what: each rule is read off a measured table, and says which.

A rule is an order of methods for a kind of merge. The first rule that fits is taken. Every rule but those for sources
without weights has a closed form among its methods, for models that are too large, or time that is too short, for
anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_fda.advising.evidence import (
    ADAPTERS,
    CHOSEN,
    DECODERS,
    DIGITS,
    ENCODERS,
    LANGUAGE,
    SHARED,
    WITH_DATA,
    Cell,
    Table,
)
from hf_fda.advising.facts import Facts

Shown = Literal["given", "synthetic", "anchors"]
"""What a method looks at: rows that a user gives, such as are drawn from weights, or anchors alone."""


@dataclass(frozen=True)
class Proposal:
    """A method with its options, why, and the cells of tables that say so.

    `data` says what it is to look at (None: what it looks at by itself); `closed` whether it takes no learning.
    """

    method: str
    why: str
    cells: tuple[Cell, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Shown | None = None
    closed: bool = False

    @property
    def label(self) -> str:
        """What to call it."""
        return labelled(self.method, self.options, self.data)


def labelled(method: str, options: Mapping[str, Any], data: Shown | None = None) -> str:
    """What to call a method with options.

    >>> labelled("fda", {"initial": "tsv"}, "given"), labelled("fda", {}, "synthetic"), labelled("fda", {}, "anchors")
    ('fda initial=tsv with data', 'fda with synthetic data', 'fda on anchors alone')
    """
    words = [method, *(f"{name}={value}" for name, value in options.items())]
    shown = {None: (), "given": ("with data",), "synthetic": ("with synthetic data",), "anchors": ("on anchors alone",)}
    return " ".join([*words, *shown[data]])


@dataclass(frozen=True)
class Rule:
    """An order of methods, best first, for merges that it fits."""

    name: str
    fits: Callable[[Facts], bool]
    table: Table
    proposals: tuple[Proposal, ...]


def cells(table: Table, row: str, **values: str) -> tuple[Cell, ...]:
    """Cells of one row of a table, by the names of their columns."""
    return tuple(Cell(table, row, column.replace("_", " "), value) for column, value in values.items())


MANY_ROWS = 1000
"""Rows of each task in the larger of the two sizes that the table of methods with data has."""

FDA_SYNTHETIC = Proposal(
    "fda",
    "anchors, and synthetic rows of the words that each source's embeddings show: without any data by far the most "
    "accurate merge of its table, and the nearest to the fine-tunes' answers but for another start",
    cells(ENCODERS, "fda from isotropic 3.0", average="0.860", divergence="0.066"),
    data="synthetic",
)
FDA_ENCODER = cells(ENCODERS, "fda on anchors alone, from isotropic 3.0", average="0.832", divergence="0.135")
ISOTROPIC_ENCODER = cells(ENCODERS, "isotropic 3.0", average="0.841", divergence="0.220")
TSV_ENCODER = cells(ENCODERS, "tsv 1.0", average="0.834", divergence="0.152")

DISTILL_FEW = Proposal(
    "distill",
    "blocks matched one after the other on real hidden states: the most accurate merge of its table, and by far the "
    "nearest to the fine-tunes' answers",
    cells(WITH_DATA, "distill", average="0.856", divergence="0.064", seconds="191"),
    data="given",
)
DIVMERGE = Proposal(
    "divmerge",
    "near to the most accurate, and answers nearer to the fine-tunes' than fda's, in little more than half of the time",
    cells(WITH_DATA, "divmerge, tensor", average="0.839", divergence="0.103", seconds="144"),
    {"granularity": "tensor"},
    data="given",
)
FDA_STATES = Proposal(
    "fda",
    "blocks matched on the real hidden states of the rows, each apart from the others: next to the most accurate",
    cells(WITH_DATA, "fda on real hidden states", average="0.844", divergence="0.118", seconds="252"),
    data="given",
)
DISTILL = Proposal(
    "distill",
    "with so many rows by far the most accurate merge of its table, and by far the nearest to the fine-tunes' answers",
    cells(WITH_DATA, "distill, 1,000 rows", average="0.864", divergence="0.048", seconds="699"),
    data="given",
)
FDA_MANY_STATES = Proposal(
    "fda",
    "blocks matched on the real hidden states of the rows, each apart from the others",
    cells(WITH_DATA, "fda on real hidden states, 1,000 rows", average="0.848", divergence="0.110", seconds="503"),
    data="given",
)
TSV = Proposal(
    "tsv", "a closed form, from weights alone, near to the best at any number of sources", TSV_ENCODER, closed=True
)
ISOTROPIC = Proposal(
    "isotropic",
    "a closed form, and of those the most accurate of three encoders or more, above fda on anchors alone on test rows "
    "and on training rows (interpolation 0 of fda is isotropic 3.0 itself); its answers lie further from the "
    "fine-tunes'",
    ISOTROPIC_ENCODER
    + cells(CHOSEN, "interpolation: 0", accuracy="0.891")
    + cells(CHOSEN, "defaults", accuracy="0.882"),
    {"scaling": 3.0},
    closed=True,
)
FDA = Proposal(
    "fda",
    "on anchors alone: its accuracy changes little with the number of sources, and its answers lie nearer to the "
    "fine-tunes' than those of any closed form but tsv 1.2",
    FDA_ENCODER,
    data="anchors",
)
FDA_DECODER = Proposal(
    "fda",
    "the highest mean over three families, within chance of isotropic 3.0, with better text than closed forms near it",
    cells(DECODERS, "fda from isotropic 3.0", accuracy="0.585", nats_per_token="4.497"),
)
ISOTROPIC_DECODER = Proposal(
    "isotropic",
    "the most accurate closed form of its table, at the cost of much worse text",
    cells(DECODERS, "isotropic 3.0", accuracy="0.570", nats_per_token="5.757"),
    {"scaling": 3.0},
    closed=True,
)
TASK_ARITHMETIC_DECODER = Proposal(
    "task_arithmetic",
    "of two fine-tunes the lowest perplexity of all closed forms of its table, on both kinds of text; isotropic and "
    "fda are not in it",
    cells(LANGUAGE, "task_arithmetic 0.4", news="106.45", questions="78.53"),
    {"scaling": 0.4},
    closed=True,
)

RULES: tuple[Rule, ...] = (
    Rule(
        "sources without weights",
        lambda facts: facts.some_anchors_only,
        SHARED,
        (
            Proposal(
                "fda",
                "a source is anchors only: nothing else merges these, and adaptation starts from the base",
                cells(SHARED, "merged from anchors alone", average="0.818"),
            ),
        ),
    ),
    Rule(
        "no blocks",
        lambda facts: facts.kind == "unknown",
        ENCODERS,
        (
            Proposal("tsv", "merges tensor by tensor; safe on encoders", TSV_ENCODER, closed=True),
            Proposal(
                "isotropic",
                "merges tensor by tensor; best on encoders",
                ISOTROPIC_ENCODER,
                {"scaling": 3.0},
                closed=True,
            ),
            Proposal(
                "task_arithmetic",
                "merges entry by entry, in any architecture alike",
                cells(ENCODERS, "task_arithmetic 0.4", average="0.792"),
                {"scaling": 0.4},
                closed=True,
            ),
        ),
    ),
    Rule(
        "adapters",
        lambda facts: facts.all_adapters,
        ADAPTERS,
        (
            Proposal(
                "fda",
                "the highest average of its table, from task arithmetic at 0.3; differences below a point are chance",
                cells(ADAPTERS, "fda", average="0.840") + cells(ADAPTERS, "fda, rank 16", average="0.841"),
            ),
            Proposal(
                "task_arithmetic",
                "a closed form in seconds, a point below fda and as good as PEFT's cat and svd",
                cells(ADAPTERS, "task_arithmetic 0.5", average="0.832")
                + cells(ADAPTERS, "PEFT svd 0.5", average="0.830"),
                {"scaling": 0.5},
                closed=True,
            ),
            Proposal(
                "fda",
                "another start, which fda lifts by 6 points",
                cells(ADAPTERS, "fda from isotropic 3.0", average="0.832"),
                {"initial": "isotropic", "scaling": 3.0},
            ),
        ),
    ),
    Rule(
        "images",
        lambda facts: facts.kind == "vision",
        DIGITS,
        (
            Proposal(
                "fda",
                "leads on test images, and on validation images (from isotropic at 3, 74.1 against 73.7 from tsv: "
                "examples/benchmarks/defaults.md)",
                cells(DIGITS, "fda from isotropic", mean="72.2"),
            ),
            Proposal(
                "fda",
                "next on test images, from tsv at 1.75, a scaling that was chosen on validation images",
                cells(DIGITS, "fda from tsv", mean="71.8"),
                {"initial": "tsv", "scaling": 1.75},
            ),
            Proposal(
                "tsv",
                "the best closed form, at a scaling that was chosen on validation images",
                cells(DIGITS, "tsv", mean="69.7"),
                {"scaling": 1.75},
                closed=True,
            ),
        ),
    ),
    Rule(
        "language models, with rows",
        lambda facts: facts.kind == "decoder" and facts.rows > 0,
        LANGUAGE,
        (
            Proposal(
                "divmerge",
                "weights learnt by divergence on the rows: lower perplexity than every average, on both kinds of text",
                cells(LANGUAGE, "divmerge, tensor", news="102.18", questions="71.02"),
                {"granularity": "tensor"},
                data="given",
            ),
            FDA_DECODER,
            TASK_ARITHMETIC_DECODER,
        ),
    ),
    Rule(
        "two language models",
        lambda facts: facts.kind == "decoder" and facts.count == 2,
        DECODERS,
        (FDA_DECODER, TASK_ARITHMETIC_DECODER, ISOTROPIC_DECODER),
    ),
    Rule(
        "language models",
        lambda facts: facts.kind == "decoder",
        DECODERS,
        (
            FDA_DECODER,
            Proposal(
                "fda",
                "another start: a point less accurate, with better text",
                cells(DECODERS, "fda from wudi iterative", accuracy="0.575", nats_per_token="4.279"),
                {"initial": "wudi"},
            ),
            ISOTROPIC_DECODER,
        ),
    ),
    Rule(
        "encoders, with many rows",
        lambda facts: facts.rows >= MANY_ROWS,
        WITH_DATA,
        (DISTILL, FDA_MANY_STATES, TSV),
    ),
    Rule("encoders, with rows", lambda facts: facts.rows > 0, WITH_DATA, (DISTILL_FEW, FDA_STATES, DIVMERGE, TSV)),
    Rule(
        "two encoders",
        lambda facts: facts.count == 2,
        ENCODERS,
        (
            Proposal(
                "fda",
                "anchors, and synthetic rows of the words that each source's embeddings show: leads, without any data",
                cells(ENCODERS, "fda", **{"2": "0.838"}),
                data="synthetic",
            ),
            Proposal(
                "fda",
                "on anchors alone: leads among the others",
                cells(ENCODERS, "fda on anchors alone", **{"2": "0.832"}),
                data="anchors",
            ),
            Proposal(
                "tsv",
                "a closed form 0.3 points below fda on anchors",
                cells(ENCODERS, "tsv 1.0", **{"2": "0.829"}),
                closed=True,
            ),
            Proposal(
                "isotropic",
                "a closed form, which leads only from three sources on",
                cells(ENCODERS, "isotropic 3.0", **{"2": "0.821"}),
                {"scaling": 3.0},
                closed=True,
            ),
        ),
    ),
    Rule("encoders", lambda facts: True, ENCODERS, (FDA_SYNTHETIC, ISOTROPIC, FDA, TSV)),
)
"""In the order in which they are tried; the last fits everything."""


def rule_for(facts: Facts) -> Rule:
    """The first rule that fits."""
    return next(rule for rule in RULES if rule.fits(facts))
