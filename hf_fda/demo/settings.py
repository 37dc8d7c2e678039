"""How much work the demo does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The demo's budget. The default was chosen on validation rows; tests take a smaller one.

    `base_epochs` and `fine_tune_epochs` are passes of training over the images; `steps` are construction steps for
    each block and task, `num_anchors` the anchors of each, and `epochs` passes of adaptation over all anchors, or those
    that fda chooses if None.
    """

    base_epochs: int = 30
    fine_tune_epochs: int = 10
    steps: int = 25
    num_anchors: int = 64
    epochs: int | None = None
