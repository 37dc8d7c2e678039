"""Which preparation a plan has."""

from __future__ import annotations

from hf_fda.merge_methods import FDAConfig, MethodConfig
from hf_fda.merge_methods.distill import DistillConfig
from hf_fda.merge_methods.fisher import FisherConfig
from hf_fda.merge_methods.learned import LearnedConfig
from hf_fda.merge_methods.regmean import RegMeanConfig, RegMeanPlusConfig
from hf_fda.preparing.anchored import AnchoredPreparation
from hf_fda.preparing.anchors import AnchorPreparation
from hf_fda.preparing.distill import DistillPreparation
from hf_fda.preparing.fisher import FisherPreparation
from hf_fda.preparing.interface import Preparation
from hf_fda.preparing.learned import LearnedPreparation
from hf_fda.preparing.regmean import RegMeanPreparation
from hf_fda.preparing.regmean_pp import RegMeanPlusPreparation
from hf_fda.running import Run
from hf_fda.streaming.global_trim import GlobalTrim
from hf_fda.streaming.trimming import trims_globally

PREPARATIONS: dict[type[MethodConfig], type[Preparation]] = {
    FDAConfig: AnchorPreparation,
    DistillConfig: DistillPreparation,
    LearnedConfig: LearnedPreparation,
    FisherConfig: FisherPreparation,
    RegMeanConfig: RegMeanPreparation,
    RegMeanPlusConfig: RegMeanPlusPreparation,
}
"""What the methods that have to find something out do before tensors are written, by their configs."""


def preparation_of(run: Run) -> Preparation:
    """What a plan's method does before tensors are written."""
    if isinstance(run.plan.config, LearnedConfig) and run.plan.anchoring is not None:
        return AnchoredPreparation(run)
    for kind in type(run.plan.config).mro():
        if kind in PREPARATIONS:
            return PREPARATIONS[kind](run)
    return GlobalTrim(run) if trims_globally(run.plan.config) else Preparation(run)
