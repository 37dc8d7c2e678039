"""Checkpoints: found, opened lazily, read tensor by tensor in memory layout, written in shards in disk layout."""

from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.layout import ModelLayout, TensorGroup
from hf_fda.checkpoint.memory import ModelCheckpoint
from hf_fda.checkpoint.reader import FileCheckpoint, open_checkpoint

__all__ = ["Checkpoint", "FileCheckpoint", "ModelCheckpoint", "ModelLayout", "TensorGroup", "open_checkpoint"]
