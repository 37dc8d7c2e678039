"""Vocabularies: tokens of base and sources brought to the same rows, and the tokenizer of the merged model."""

from hf_fda.vocabulary.aligning import Vocabulary, align_vocabularies
from hf_fda.vocabulary.request import VocabularyRequest, check_request

__all__ = ["Vocabulary", "VocabularyRequest", "align_vocabularies", "check_request"]
