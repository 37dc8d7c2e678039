"""Merging adapters of a PEFT model in memory into a new one beside them."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from hf_fda.adapters.checkpoint import AdapterCheckpoint
from hf_fda.adapters.files import REPLAYED, UNREPEATABLE, WEIGHTS, named_in
from hf_fda.adapters.report import AdapterReport
from hf_fda.adapters.skeleton import plain_name, skeleton_of
from hf_fda.checkpoint.memory import ModelCheckpoint
from hf_fda.errors import InputError, nearest
from hf_fda.merge_methods import MethodConfig
from hf_fda.merging import merge
from hf_fda.progress import logger


def merge_adapters(
    peft_model: PeftModel,
    adapters: Sequence[str],
    adapter_name: str,
    method: str | MethodConfig = "linear",
    rank: int | None = None,
    *,
    energy: float | None = None,
    heads: str = "keep",
    device: str = "auto",
    seed: int = 0,
    **options: Any,
) -> AdapterReport:
    """Merge adapters of a model into a new adapter of it: the counterpart of PEFT's `add_weighted_adapter`.

    Neither the base's weights nor any other adapter is touched, and the active adapter stays active
    (`peft_model.set_adapter(adapter_name)` makes the new one so). Adapters of LoRA in all its forms, of any ranks and
    targets, merge together. The new one goes with the base as it is in memory: where PEFT has changed that, as it does
    for adapters initialised by PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA, it is none of the original base.

    Args:
        peft_model: the model; its adapters may not be merged into its weights at the moment.
        adapters: names of the adapters to merge.
        adapter_name: name of the new adapter.
        method: a registered name (`hf_fda.methods()`) or a config object.
        rank: of the new adapter's factors, at most. None: as much as the adapters' ranks together, which is exact
            wherever the merge is a linear combination; full rank where one of them is DoRA.
        energy: the fraction of the squared norm that the factors keep, module by module.
        heads: "keep": the adapters' task heads are left out of the new adapter. "merge": their mean is in it.
        device: "auto" (Accelerate's choice) or a torch device; where to compute.
        seed: of everything random.
        options: fields of the method's config, such as `weights`.

    Returns:
        by module the rank, and what the factors leave out.

    Raises:
        InputError: when an adapter is not there or cannot be merged, the name is taken, or an option is wrong; the
            model is as it was.

    Example:
        >>> report = merge_adapters(model, ["sst2", "trec"], "both", method="tsv", rank=16)  # doctest: +SKIP
        >>> model.set_adapter("both")  # doctest: +SKIP
    """
    _check_names(peft_model, adapters, adapter_name)
    model: Any = peft_model.get_base_model()
    base = _InjectedBase(model, "the model's base", _base_state(model))
    sources = {}
    for name in adapters:
        files = named_in(peft_model, name)
        start = getattr(files.config, "init_lora_weights", True)
        if isinstance(start, str) and start.startswith((*REPLAYED, *UNREPEATABLE)):
            logger.warning(
                "adapter '%s' was initialised by '%s', which changes the base's weights in memory; the merged adapter "
                "goes with these, not with the base as it was loaded",
                name,
                start,
            )
        if hasattr(files.config, "init_lora_weights"):
            files.config.init_lora_weights = True  # the base in memory is what the adapter was initialised to go with
        sources[name] = AdapterCheckpoint(files, base, skeleton_of(peft_model, name, base.layout))
    with tempfile.TemporaryDirectory(prefix="hf_fda-") as folder:
        merged = merge(
            base,
            sources,
            method,
            Path(folder) / "merged",
            as_adapter=True,
            rank=rank,
            energy=energy,
            heads=heads,
            device=device,
            seed=seed,
            quiet=True,
            **options,
        )
        config = PeftConfig.from_pretrained(str(merged.folder))
        tensors = load_file(merged.folder / WEIGHTS)
        report = merged.report
    _add(peft_model, adapter_name, config, tensors)
    assert report is not None
    return report


class _InjectedBase(ModelCheckpoint):
    """The base inside a PEFT model, hashed by no more than its identity: nothing of the work outlives the call."""

    def fingerprint(self) -> str:
        """A hash of what is in memory now."""
        return str(id(self))


def _check_names(peft_model: PeftModel, adapters: Sequence[str], adapter_name: str) -> None:
    if not isinstance(peft_model, PeftModel):
        raise InputError(f"peft_model must be a peft.PeftModel, not {type(peft_model).__name__}")
    if isinstance(adapters, str) or not adapters:
        raise InputError("adapters must be a list of names of the model's adapters")
    for name in adapters:
        if name not in peft_model.peft_config:
            raise InputError(f"the model has no adapter '{name}': {nearest(str(name), peft_model.peft_config)}")
    if adapter_name in peft_model.peft_config:
        raise InputError(f"the model has an adapter '{adapter_name}' already; choose another name, or delete it first")
    if not re.fullmatch(r"[A-Za-z0-9_][\w-]*", str(adapter_name)):
        raise InputError(f"adapter_name '{adapter_name}': use letters, digits, '_' and '-'")
    kinds = {str(getattr(own.peft_type, "value", own.peft_type)) for own in peft_model.peft_config.values()}
    if kinds != {"LORA"}:
        raise InputError(
            f"the model's adapters are {', '.join(sorted(kinds))}, a merged one is LORA, and PEFT keeps those of one "
            "kind in a model: save them and merge their folders, hf_fda.merge(..., as_adapter=True)"
        )
    if any(getattr(module, "merged", False) is True for module in peft_model.modules()):
        raise InputError("an adapter is merged into the model's weights; call unmerge_adapter() first")


def _base_state(model: Any) -> dict[str, Tensor]:
    """The tensors of a model without its adapters, by the names they would have had without them."""
    state: Mapping[str, Tensor] = model.state_dict()
    return {plain_name(name): own for name, own in state.items()}


def _add(peft_model: PeftModel, name: str, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put a new adapter into a model, or leave the model as it was."""
    inner: Any = peft_model.base_model
    active = inner.active_adapters
    said = [own for other in peft_model.peft_config.values() if (own := getattr(other, "target_parameters", None))]
    if said and getattr(config, "target_parameters", None):
        config.target_parameters = said[0]  # PEFT wants the same words of all adapters
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PeftModel.add_adapter(peft_model, name, config)  # of this class: others add a head of their own
            set_peft_model_state_dict(peft_model, dict(tensors), name)
    except BaseException:
        if name in peft_model.peft_config:
            peft_model.delete_adapter(name)
        raise
    finally:
        inner.set_adapter(active)
