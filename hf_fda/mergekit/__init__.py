"""Merges described in mergekit's configuration files."""

from hf_fda.mergekit.run import is_mergekit, merge_documents, plan_documents

__all__ = ["is_mergekit", "merge_documents", "plan_documents"]
