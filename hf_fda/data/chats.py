"""Conversations, through the chat template of the model that takes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_fda.data.columns import Columns
from hf_fda.data.encoding import EncodedRow, Taker, next_tokens, text_of
from hf_fda.data.tables import Row
from hf_fda.data.texts import Tokenizing, common, prompt_of
from hf_fda.errors import InputError
from hf_fda.hub import first_line

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Roles of conversations in "from" and "value", by the names that chat templates know."""

MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a chat template has that says which tokens are the assistant's."""


class Chats(Tokenizing):
    """Conversations for causal language models.

    Of a prompt and its target the tokens of the target count, of a conversation the assistant's where the template
    marks them, else all.

    Raises:
        InputError: when the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, taker: Taker, max_length: int, columns: Columns) -> None:
        super().__init__(tokenizer, taker, max_length)
        self.columns = columns
        template = tokenizer.chat_template
        if template is None:
            raise InputError(
                f"{taker.label}: its rows are conversations, and its tokenizer has no chat template that says how to "
                "write them; give the merge one (chat_template=...), or rows that are plain text"
            )
        if isinstance(template, Mapping):
            template = template.get("default", "")
        self._marks = tokenizer.is_fast and MARKS_ANSWERS.search(template) is not None

    def __call__(self, row: Row) -> EncodedRow | None:
        """One row."""
        if self.columns.chat is not None:
            messages, before = messages_of(row.get(self.columns.chat), "user"), 0
        else:
            asked, answer = self._prompt(row), messages_of(row.get(str(self.columns.target)), "assistant")
            if not asked or not answer:
                return None
            messages, before = asked + answer, len(asked)
        if not messages:
            return None
        found = self._written(messages, return_assistant_tokens_mask=self._marks and not before)
        ids = found["input_ids"]
        if before:
            alone = self._written(messages[:before], add_generation_prompt=True)["input_ids"]
            counted = torch.arange(len(ids)) >= common(alone, ids)
        elif self._marks:
            counted = torch.tensor(found["assistant_masks"], dtype=torch.bool)
        else:
            counted = torch.ones(len(ids), dtype=torch.bool)
        scored = next_tokens(counted[: self.limit])
        kept = {name: values[: self.limit] for name, values in found.items()}
        return EncodedRow(self.taker.taken(kept), scored, len(ids) > self.limit) if scored.any() else None

    def _prompt(self, row: Row) -> list[dict[str, str]]:
        if len(self.columns.prompt) == 1:
            return messages_of(row.get(self.columns.prompt[0]), "user")
        text = prompt_of(row, self.columns, "\n\n")
        return [] if text is None else messages_of(text, "user")

    def _written(self, messages: list[dict[str, str]], **options: Any) -> dict[str, list[int]]:
        try:
            found: Any = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        except (TemplateError, TypeError, KeyError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"{self.taker.label}: its chat template does not take a conversation of {roles} ({first_line(error)})"
            ) from None
        return dict(found)


def messages_of(value: Any, role: str) -> list[dict[str, str]]:
    """A value as the messages of a conversation: they themselves, in either usual form, or a text of some role."""
    if isinstance(value, str):
        return [{"role": role, "content": value}] if text_of({"text": value}, ["text"]) else []
    messages = []
    for message in value or []:
        if "role" in message:
            messages.append({name: own for name, own in message.items() if own is not None})
        else:
            speaker = str(message["from"])
            messages.append({"role": ROLES.get(speaker, speaker), "content": message["value"]})
    return messages
