"""Streams of random numbers that do not depend on what else is drawn, or by how many processes."""

from __future__ import annotations

import hashlib

import torch


def random_stream(seed: int, purpose: str, name: str) -> torch.Generator:
    """A random stream of its own for each purpose and name, on the CPU, the same on any number of processes."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
