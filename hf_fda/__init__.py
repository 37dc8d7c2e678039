"""Merge fine-tuned models in function space.

The names below are imported when they are first used, so that `import hf_fda` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_fda.version import __version__

if TYPE_CHECKING:
    from hf_fda.advising.advice import Advice
    from hf_fda.advising.advising import advise
    from hf_fda.analysis.analyzing import Analysis, analyze
    from hf_fda.anchors import FunctionalDualAnchors
    from hf_fda.configured import merge_config, plan_config
    from hf_fda.errors import HFFDAError, InputError, RunError
    from hf_fda.evaluation.evaluating import evaluate
    from hf_fda.evaluation.scores import Scores
    from hf_fda.merge_methods import FDAConfig, MethodConfig, methods
    from hf_fda.merged import Merged, load
    from hf_fda.merging import extract, merge
    from hf_fda.merging_adapters import merge_adapters
    from hf_fda.planning import plan
    from hf_fda.plans import Plan
    from hf_fda.pushing import push

_PLACES = {
    "Advice": "hf_fda.advising.advice",
    "Analysis": "hf_fda.analysis.analyzing",
    "FDAConfig": "hf_fda.merge_methods",
    "FunctionalDualAnchors": "hf_fda.anchors",
    "HFFDAError": "hf_fda.errors",
    "InputError": "hf_fda.errors",
    "Merged": "hf_fda.merged",
    "MethodConfig": "hf_fda.merge_methods",
    "Plan": "hf_fda.plans",
    "RunError": "hf_fda.errors",
    "Scores": "hf_fda.evaluation.scores",
    "advise": "hf_fda.advising.advising",
    "analyze": "hf_fda.analysis.analyzing",
    "evaluate": "hf_fda.evaluation.evaluating",
    "extract": "hf_fda.merging",
    "load": "hf_fda.merged",
    "merge": "hf_fda.merging",
    "merge_adapters": "hf_fda.merging_adapters",
    "merge_config": "hf_fda.configured",
    "methods": "hf_fda.merge_methods",
    "plan": "hf_fda.planning",
    "plan_config": "hf_fda.configured",
    "push": "hf_fda.pushing",
}

__all__ = [
    "Advice",
    "Analysis",
    "FDAConfig",
    "FunctionalDualAnchors",
    "HFFDAError",
    "InputError",
    "Merged",
    "MethodConfig",
    "Plan",
    "RunError",
    "Scores",
    "__version__",
    "advise",
    "analyze",
    "evaluate",
    "extract",
    "load",
    "merge",
    "merge_adapters",
    "merge_config",
    "methods",
    "plan",
    "plan_config",
    "push",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'hf_fda' has no attribute '{name}'")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
