"""Construct blocks of one form together and one by one: time, and that the losses are the same.

    python examples/benchmarks/together.py [--device cpu] [--widths 32 64 128 384] [--blocks 6]

BERT blocks with random weights, and fine-tunes of them by a little noise, 64 anchors of five tokens, the defaults of
construction. Both ways in turn, the best of some rounds; seconds of the process on a CPU, of the wall elsewhere. The
package itself runs as many together as `hf_fda.anchors.grouping` says; here all blocks are, whatever their width.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from construction import seconds
from gpu import CALL, fine_tune, start_of

from hf_fda.anchors.construction import UnitAnchors, construct_units
from hf_fda.anchors.stacked import UnitPair
from hf_fda.merge_methods import FDAConfig


def blocks_of(width: int, count: int, device: torch.device) -> list[UnitPair]:
    """Blocks of a width, fine-tunes of them, and where their anchors start."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    heads = max(width // 32, 1)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    sizes |= {"num_hidden_layers": count, "vocab_size": 8, "attn_implementation": "eager"}
    config = BertConfig(**sizes)
    pairs = []
    model: Any = BertModel(config).eval().requires_grad_(False)
    for number, base in enumerate(model.to(device).encoder.layer):
        source = fine_tune(base, number)
        pairs.append(UnitPair(base, source, CALL, start_of(source, 64, 5, number)))
    return pairs


def compare(width: int, options: argparse.Namespace) -> str:
    """A row of the table."""
    device = torch.device(options.device)
    pairs = blocks_of(width, options.blocks, device)
    descent = FDAConfig().for_family("encoder", width).descent()
    found: dict[str, list[UnitAnchors]] = {}

    def alone() -> None:
        found["alone"] = [construct_units([pair], **descent)[0] for pair in pairs]

    def together() -> None:
        found["together"] = construct_units(pairs, **descent)

    rounds = [(seconds(alone, device), seconds(together, device)) for _ in range(options.rounds)]
    first, second = (min(own) for own in zip(*rounds, strict=True))
    losses = [sum(own.loss for own in found[way]) / len(pairs) for way in ("alone", "together")]
    return f"| {width} | {first:.2f} | {second:.2f} | {first / second:.2f} | {losses[0]:.4f} | {losses[1]:.4f} |"


def main() -> None:
    """Compare each width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 384])
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| width | seconds one by one | together | ratio | loss one by one | together |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for width in options.widths:
        print(compare(width, options), flush=True)


if __name__ == "__main__":
    main()
