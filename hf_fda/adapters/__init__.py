"""PEFT adapters: what each does to the base's tensors, exactly."""

from hf_fda.adapters.checkpoint import AdapterCheckpoint, adapter_of, open_adapter, open_source

__all__ = ["AdapterCheckpoint", "adapter_of", "open_adapter", "open_source"]
