"""PEFT adapters: what each does to the base's tensors, exactly."""

from hf_fda.adapters.checkpoint import AdapterCheckpoint, open_adapter, open_source

__all__ = ["AdapterCheckpoint", "open_adapter", "open_source"]
