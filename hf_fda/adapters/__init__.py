"""PEFT adapters: what each does to the base's tensors, exactly."""

from hf_fda.adapters.checkpoint import AdapterCheckpoint, is_adapter, open_adapter

__all__ = ["AdapterCheckpoint", "is_adapter", "open_adapter"]
