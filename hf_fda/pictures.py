"""The pictures of cards, drawn with matplotlib where that is installed: readable in print and on a dark page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fda.drawing import COLOURS, MARKERS, figure_of, ordered_colours, save_png, scale

if TYPE_CHECKING:
    from hf_fda.block_losses import BlockLosses
    from hf_fda.coefficients import Coefficients
    from hf_fda.evaluation.scores import Scores

NAMED = 12
"""How many lines have a name in a picture; of more, colours go from the first to the last."""


def draw_coefficients(coefficients: Coefficients, path: Path) -> None:
    """Draw learnt coefficients as a heat map of sources and groups, as PNG.

    Args:
        coefficients: what to draw.
        path: the file to write.
    """
    count, groups = len(coefficients.sources), len(coefficients.groups)
    limit = max(abs(value) for row in coefficients.values for value in row) or 1.0
    with figure_of((max(4.0, min(14.0, 1.8 + 0.28 * groups)), 1.8 + 0.4 * count)) as figure:
        axes = figure.subplots()
        image = axes.imshow(
            coefficients.values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none"
        )
        axes.set_yticks(range(count), coefficients.sources)
        places = coefficients.places()
        for numbers in list(places.values())[1:]:
            axes.axvline(min(numbers) - 0.5, color="black", linewidth=0.8)
        middles, labels = [sum(numbers) / len(numbers) for numbers in places.values()], list(places)
        axes.set_xticks(middles, labels, rotation=90 if len(labels) > 1 else 0, fontsize=7)
        axes.set_xlabel("part of the model")
        axes.set_ylabel("source")
        axes.grid(False)
        scale(figure, image, axes, "coefficient")
        save_png(figure, path)


def draw_losses(losses: BlockLosses, path: Path) -> None:
    """Draw the losses of a merge by block, as PNG: of its anchors, and how far adaptation brought the distance down.

    Args:
        losses: what to draw.
        path: the file to write.
    """
    blocks = [row.block for row in losses.rows]
    constructed = {source: [row.construction.get(source) for row in losses.rows] for source in losses.sources}
    left = [row.left for row in losses.rows]
    parts = [any(value is not None for values in constructed.values() for value in values), any(left)]
    with figure_of((_wide(len(blocks)), 3.2 * sum(parts))) as figure:
        panels = iter(figure.subplots(sum(parts), 1, squeeze=False)[:, 0])
        if parts[0]:
            axes = next(panels)
            _lines(axes, constructed)
            axes.set_ylabel("loss of the anchors\n(1 - mean cosine)")
            _blocks_below(axes, blocks)
        if parts[1]:
            axes = next(panels)
            axes.bar(range(len(blocks)), [0.0 if share is None else 100 * share for share in left], color=COLOURS[0])
            axes.set_ylabel("distance left after\nadaptation, % of that before")
            axes.set_ylim(bottom=0)
            _blocks_below(axes, blocks)
        save_png(figure, path)


def draw_construction(losses: Mapping[str, float], spectra: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw what anchors of one source are like, as PNG: their loss by block, and their spectra.

    Args:
        losses: by block.
        spectra: by block the singular values of its anchors, each a share of the largest.
        path: the file to write.
    """
    blocks = list(losses)
    with figure_of((max(8.0, 4.0 + _wide(len(blocks))), 3.6)) as figure:
        left, right = figure.subplots(1, 2)
        left.bar(range(len(blocks)), list(losses.values()), color=COLOURS[0])
        left.set_ylabel("loss (1 - mean cosine)")
        _blocks_below(left, blocks)
        few = len(spectra) <= NAMED
        for colour, (block, values) in zip(ordered_colours(len(spectra)), spectra.items(), strict=True):
            right.plot(range(1, len(values) + 1), values, color=colour, label=block if few else None)
        right.set_xscale("log")
        right.set_yscale("log")
        right.set_ylim(bottom=max(1e-4, 0.5 * min(values[-1] for values in spectra.values())))
        right.set_xlabel("number of the singular value")
        right.set_ylabel("share of the largest")
        if few:
            right.legend(fontsize=6)
        save_png(figure, path)


def draw_scores(scores: Scores, path: Path) -> None:
    """Draw the scores of a merged model beside those of the tasks' own fine-tunes, as PNG, a panel for each metric.

    Args:
        scores: what to draw; at least one.
        path: the file to write.
    """
    metrics = list(dict.fromkeys(name for task in scores.tasks.values() for name in task.merged))
    with figure_of((max(4.5, 1.8 + 0.9 * len(scores.tasks)), 0.4 + 2.8 * len(metrics))) as figure:
        for axes, metric in zip(figure.subplots(len(metrics), 1, squeeze=False)[:, 0], metrics, strict=True):
            own = {name: task for name, task in scores.tasks.items() if metric in task.merged}
            both = {"merged": [task.merged[metric] for task in own.values()]}
            single = [(task.individual or {}).get(metric) for task in own.values()]
            if any(value is not None for value in single):
                both["its own fine-tune"] = [float("nan") if value is None else value for value in single]
            width = 0.8 / len(both)
            for number, (label, values) in enumerate(both.items()):
                places = [place + (number - (len(both) - 1) / 2) * width for place in range(len(own))]
                bars = axes.bar(places, values, 0.9 * width, label=label, color=COLOURS[number])
                axes.bar_label(bars, fmt="{:.3g}", fontsize=7)
            axes.set_xticks(range(len(own)), list(own), rotation=30 if len(own) > 6 else 0)
            axes.set_ylabel(metric)
            axes.margins(y=0.15)
            if len(both) > 1:
                axes.legend(fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        save_png(figure, path)


def _lines(axes: Any, values: Mapping[str, Sequence[float | None]]) -> None:
    """A line for each name, broken where a value is missing."""
    for number, (name, own) in enumerate(values.items()):
        kept = [float("nan") if value is None else value for value in own]
        colour, mark = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(range(len(kept)), kept, marker=mark, markersize=4, linewidth=1.2, color=colour, label=name)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _blocks_below(axes: Any, blocks: Sequence[str]) -> None:
    axes.set_xticks(range(len(blocks)), blocks, rotation=90, fontsize=6)


def _wide(blocks: int) -> float:
    return max(4.5, min(14.0, 2.0 + 0.25 * blocks))
