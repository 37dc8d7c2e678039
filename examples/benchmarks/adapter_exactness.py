"""How exactly adapters of each kind merge: `hf_fda.merge_adapters` and PEFT's `add_weighted_adapter` beside each other.

    python examples/benchmarks/adapter_exactness.py [--rank 4] [--only NAME ...]

Each kind is put twice, with random weights, on a tiny Llama (with biases) or Mixtral made from its config, in float32.
Merged are one adapter with weight 1, and both with weights 0.7 and -0.4. The truth is the weighted sum of what each
adapter does to every tensor of the base, in float64: PEFT's own `merge_and_unload` of a float64 copy with that
adapter, less the base. The same is done with the merged adapter. Printed is the norm of the difference of both, over
all tensors, as a fraction of the truth's norm.

Of PEFT both exact ways, "cat" and "svd" with rank to spare, are tried, and the better is shown. (Of a single adapter it
takes "linear", whatever it is told, which copies the factors.) Where a merge does nothing at all to tensors that the
truth changes, these are named ("lacks"); merges that leave the base's weights changed are marked. "refused" gives the
error.

The base is what is in memory when the merge begins. An adapter that is initialised by PiSSA takes something out of the
base's weights as it is added: after two of them the base is neither the original nor what the first one saw.
"""

from __future__ import annotations

import argparse
import copy
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import hf_fda

State = Mapping[str, Tensor]
Merge = Callable[[Any, dict[str, float]], None]

LINEAR = ["q_proj", "v_proj", "down_proj"]
WEIGHTS: tuple[dict[str, float], ...] = ({"first": 1.0}, {"first": 0.7, "second": -0.4})
"""The two merges, by adapter."""


@dataclass
class Kind:
    """Options of both adapters beside rank, alpha and targets; of the second alone; and the model that they are for."""

    both: dict[str, Any]
    second: dict[str, Any]
    model: str = "llama"

    def configs(self, rank: int) -> list[LoraConfig]:
        """Of the first and the second adapter."""
        common: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank + 1, "target_modules": LINEAR} | self.both
        return [LoraConfig(**copy.deepcopy(common | own)) for own in ({}, self.second)]


KINDS = {
    "plain": Kind({}, {}),
    "plain, two ranks": Kind({}, {"r": 7}),
    "plain, different targets": Kind({}, {"target_modules": ["k_proj", "v_proj"]}),
    "rslora": Kind({"use_rslora": True}, {}),
    "DoRA": Kind({"use_dora": True}, {}),
    "lora_bias": Kind({"lora_bias": True}, {}),
    "PiSSA": Kind({"init_lora_weights": "pissa"}, {}),
    "rank_pattern, alpha_pattern": Kind({"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"down_proj": 3}}, {}),
    "layers_to_transform": Kind({"layers_to_transform": [1]}, {}),
    "layers_to_transform, different layers": Kind({"layers_to_transform": [1]}, {"layers_to_transform": [0]}),
    "modules_to_save on a norm": Kind({"modules_to_save": ["input_layernorm"]}, {}),
    "Embedding": Kind({"target_modules": [*LINEAR, "embed_tokens"]}, {}),
    "target_parameters": Kind(
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {},
        "mixtral",
    ),
}


def make_base(kind: str) -> Any:
    """A tiny model, "llama" or "mixtral", whose parameters are all random, biases and norms too."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 120}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    base: Any
    if kind == "mixtral":
        base = MixtralForCausalLM(MixtralConfig(num_local_experts=4, **sizes))
    else:
        base = LlamaForCausalLM(LlamaConfig(attention_bias=True, mlp_bias=True, **sizes))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return base


def make_model(kind: Kind, rank: int) -> Any:
    """A model with the adapters "first" and "second", moved from where they start as if they had been trained."""
    configs = kind.configs(rank)
    model: Any = get_peft_model(make_base(kind.model), configs[0], "first")
    model.add_adapter("second", configs[1])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if {"first", "second"} & set(name.split(".")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def base_state(model: Any) -> State:
    """The base's tensors in float64, by their names without adapters."""
    state = model.get_base_model().state_dict()
    plain = {re.sub(r"\.(base_layer|original_module)(?=\.)", "", name): own for name, own in state.items()}
    added = re.compile(r"\.(lora_|modules_to_save)")
    return {name: own.double().clone() for name, own in plain.items() if not added.search(name)}


def effect(model: Any, adapter: str, base: State) -> State:
    """What a model with one adapter is more than a base: by tensor, in float64."""
    whole = copy.deepcopy(model).double()
    whole.set_adapter(adapter)
    merged = whole.merge_and_unload(adapter_names=[adapter]).state_dict()
    return {name: own - base[name] for name, own in merged.items()}


def merge_own(model: Any, weights: dict[str, float]) -> None:
    """The package's merge into an adapter "merged"."""
    hf_fda.merge_adapters(model, list(weights), "merged", "linear", weights=weights, normalize=False)


def merge_peft(way: str, rank: int) -> Merge:
    """PEFT's merge into an adapter "merged", "cat" or "svd" with a rank."""

    def merge(model: Any, weights: dict[str, float]) -> None:
        names, values = list(weights), list(weights.values())
        model.add_weighted_adapter(names, values, "merged", combination_type=way, svd_rank=rank)

    return merge


@dataclass
class Outcome:
    """A merge's relative error, and what is to be said about it."""

    error: float
    notes: str

    def cell(self) -> str:
        """As it is shown in the table."""
        shown = f"{self.error:.1e}" if self.error < float("inf") else ""
        return f"{shown} {self.notes}".strip()


def outcome(model: Any, weights: dict[str, float], merge: Merge) -> Outcome:
    """Merge in a copy of a model, and compare with the truth."""
    base = base_state(model)
    effects = {name: effect(model, name, base) for name in weights}
    truth = {key: sum(weight * effects[name][key] for name, weight in weights.items()) for key in base}
    own = copy.deepcopy(model)
    try:
        merge(own, weights)
    except Exception as error:  # what a library raises is what the table is to show
        said = str(error).strip().splitlines()[0].removeprefix("as_adapter=True: ")
        return Outcome(float("inf"), f"refused: {said}")
    found = effect(own, "merged", base)
    after = base_state(own)
    missing = lacking(found, truth)
    notes = [f"lacks {', '.join(missing)}"] if missing else []
    notes += ["changes the base's weights"] if any(not torch.equal(after[name], base[name]) for name in base) else []
    return Outcome(distance(found, truth), f"({'; '.join(notes)})" if notes else "")


def lacking(found: State, truth: Mapping[str, Any]) -> list[str]:
    """Tensors that the truth changes and the merge does not, by the last two parts of their names."""
    missing = [name for name, own in truth.items() if bool(own.any()) and not bool(found[name].any())]
    return sorted({".".join(name.split(".")[-2:]) for name in missing})


def distance(found: State, truth: Mapping[str, Any]) -> float:
    """The norm of the difference over all tensors, as a fraction of the truth's."""
    apart = sum(float((found[name] - own).square().sum()) for name, own in truth.items())
    return (apart / sum(float(own.square().sum()) for own in truth.values())) ** 0.5


def best_of_peft(model: Any, weights: dict[str, float], rank: int) -> Outcome:
    """The better of PEFT's exact ways, named."""
    if len(weights) == 1:
        return outcome(model, weights, merge_peft("linear", rank))
    found = {way: outcome(model, weights, merge_peft(way, rank)) for way in ("cat", "svd")}
    way = min(found, key=lambda name: found[name].error)
    refused = found[way].error == float("inf")
    return found[way] if refused else Outcome(found[way].error, f"{way} {found[way].notes}".strip())


def main() -> None:
    """Merge each kind in all ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=KINDS, help="these kinds only")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    header = ["adapters", "one: hf_fda", "one: PEFT", "0.7 and -0.4: hf_fda", "0.7 and -0.4: PEFT"]
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header), flush=True)
    for name in options.only or KINDS:
        model = make_model(KINDS[name], options.rank)
        cells = [name]
        for weights in WEIGHTS:
            cells.append(outcome(model, weights, merge_own).cell())
            cells.append(best_of_peft(model, weights, rank=4 * options.rank).cell())
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
