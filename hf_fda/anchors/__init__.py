"""Functional dual anchors: the container, their construction, and adaptation to them."""

from hf_fda.anchors.adaptation import Adapted, Objective, adapt_unit
from hf_fda.anchors.builder import AnchorBuilder
from hf_fda.anchors.construction import UnitAnchors, construct_unit
from hf_fda.anchors.container import FunctionalDualAnchors
from hf_fda.anchors.manifest import AnchorsInfo
from hf_fda.anchors.stepping import CoefficientAdam, Moves

__all__ = [
    "Adapted",
    "AnchorBuilder",
    "AnchorsInfo",
    "CoefficientAdam",
    "FunctionalDualAnchors",
    "Moves",
    "Objective",
    "UnitAnchors",
    "adapt_unit",
    "construct_unit",
]
