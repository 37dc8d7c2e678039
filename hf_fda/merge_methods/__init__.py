"""Merge methods: one file each, found by name in the registry."""

from hf_fda.merge_methods import (  # noqa: F401  (each registers itself)
    ace,
    adamerging,
    arcee_fusion,
    breadcrumbs,
    cat,
    dare,
    della,
    distill,
    divmerge,
    fda,
    fisher,
    iso_cts,
    isotropic,
    karcher,
    knots,
    linear,
    magnitude_prune,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    regmean,
    sce,
    slerp,
    task_arithmetic,
    ties,
    tsv,
    wudi,
)
from hf_fda.merge_methods.config import MethodConfig, TaskVectorConfig, with_source_names
from hf_fda.merge_methods.fda import FDAConfig
from hf_fda.merge_methods.registry import MethodInfo, method_class, methods, resolve_method

__all__ = [
    "FDAConfig",
    "MethodConfig",
    "MethodInfo",
    "TaskVectorConfig",
    "method_class",
    "methods",
    "resolve_method",
    "with_source_names",
]
