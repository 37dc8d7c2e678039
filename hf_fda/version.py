"""Versions, as a card and a record state them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


@cache
def versions() -> dict[str, str]:
    """Versions of this package and of what its results depend on."""
    found = {"hf_fda": __version__}
    for name in ("torch", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # pragma: no cover (all are requirements)
            found[name] = "unknown"
    return found
