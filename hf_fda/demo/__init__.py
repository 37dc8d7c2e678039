"""The demo: real digits, a small ViT, conflicting fine-tunes, every merge method, one table."""

from __future__ import annotations

from hf_fda.demo.run import DemoResult, run_demo
from hf_fda.demo.settings import Settings
from hf_fda.demo.table import Row

__all__ = ["DemoResult", "Row", "Settings", "run_demo"]
