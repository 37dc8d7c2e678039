"""Which columns of a table a model takes: those a user names, or those that usually hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hf_fda.data.forms import Form
from hf_fda.data.request import Given
from hf_fda.data.tables import IMAGE, LABEL, MESSAGES, NOTHING, SOLE, TEXT, TEXTS, described
from hf_fda.errors import InputError, nearest

SINGLE = (
    *(SOLE, "text", "sentence", "content", "review", "document", "article", "passage", "question", "query"),
    *("prompt", "instruction", "input", "inputs", "utterance", "sms", "tweet", "title"),
)
PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text", "text_pair")),
    *(("text1", "text2"), ("text_a", "text_b"), ("sentence_a", "sentence_b"), ("question", "sentence")),
    *(("question", "context"), ("question", "passage"), ("query", "passage"), ("query", "document")),
)
IMAGES = (SOLE, "image", "img", "pixels", "pixel_values", "picture", "photo")
WORDS = ("tokens", "words")
CHATS = ("messages", "conversations", "conversation")
JOINED = (("prompt", "completion"),)
"""Prompts and what follows on them, letter by letter."""
ANSWERED = (
    *(("instruction", "output"), ("instruction", "response"), ("prompt", "response"), ("prompt", "output")),
    *(("question", "answer"), ("query", "response"), ("problem", "solution"), ("input", "output")),
    *(("inputs", "targets"), ("input", "target"), ("source", "target")),
)
"""Questions and answers, which a chat template or a new line puts together."""
REWRITTEN = (
    *(("article", "highlights"), ("document", "summary"), ("dialogue", "summary"), ("article", "summary")),
    *(("text", "summary"), ("text", "target"), ("input_text", "target_text"), ("source_text", "target_text")),
)
FURTHER = {"instruction": ("input", "context")}
"""What belongs to a prompt where it is there, too."""
ANSWERS = ("label", "labels", "target", "targets", "class", "category", "answer", "intent", "id", "idx", "guid")
"""Columns that are never taken for the only text."""

IMAGE_TYPES = (IMAGE, TEXT, "ndarray", "Tensor")
"""What an image column may hold: images, or the files they are in."""


@dataclass(frozen=True)
class Columns:
    """The columns that are read: of a text or a pair (`text`), of an image, of the words of a text, of a conversation,
    or of a prompt (its parts) and what is to be predicted of it. `joint` lies between prompt and target; None leaves
    that to the chat template."""

    text: tuple[str, ...] = ()
    image: str | None = None
    words: str | None = None
    chat: str | None = None
    prompt: tuple[str, ...] = ()
    target: str | None = None
    joint: str | None = ""


class _Finder:
    """The columns of one table by name and type."""

    def __init__(self, types: Mapping[str, str], label: str) -> None:
        self.types, self.label = types, label
        self._lower = {name.lower(): name for name in types}

    def of_type(self, kinds: Sequence[str]) -> list[str]:
        return [name for name, kind in self.types.items() if kind in kinds]

    def first(self, names: Sequence[str], kinds: Sequence[str]) -> str | None:
        """The first of some usual names that is there, with one of some types."""
        found = (self._lower.get(name) for name in names)
        return next((name for name in found if name is not None and self.types[name] in kinds), None)

    def first_pair(self, pairs: Sequence[tuple[str, str]], kinds: Sequence[str] = (TEXT,)) -> tuple[str, str] | None:
        for pair in pairs:
            one, two = (self.first((name,), kinds) for name in pair)
            if one is not None and two is not None:
                return one, two
        return None

    def only(self, kinds: Sequence[str]) -> str | None:
        """The only column of some types that can be meant."""
        possible = [name for name in self.of_type(kinds) if name.lower() not in ANSWERS]
        return possible[0] if len(possible) == 1 else None

    def check(self, name: str, kinds: Sequence[str], what: str) -> str:
        """A column that a user named.

        Raises:
            InputError: when it is not there, or holds something else.
        """
        if name not in self.types:
            raise InputError(f"{self.label} has no column '{name}': {nearest(name, self.types)}")
        kind = self.types[name]
        if kind in kinds:
            return name
        if kind == NOTHING:
            raise InputError(f"{self.label}: column '{name}' is empty")
        labels = "labels" if kind == LABEL or "integer" in kind else f"of type '{kind}'"
        others = [other for other, own in self.types.items() if own in kinds]
        hint = f"; columns of {what}: {', '.join(others)}" if others else ""
        raise InputError(f"{self.label}: column '{name}' holds {labels} where {what} was expected{hint}")

    def unknown(self, what: str, way_out: str) -> InputError:
        return InputError(f"{self.label}: which column holds the {what}? It has {described(self.types)}; {way_out}")


def find_columns(types: Mapping[str, str], form: Form, given: Given, label: str) -> Columns:
    """The columns that a model's rows are made of.

    Args:
        types: columns with their types in words.
        form: what the model takes and predicts.
        given: the columns that a user names.
        label: what to call the table in errors.

    Raises:
        InputError: when a named column is not there or holds something else, or none can be told to be meant.
    """
    table = _Finder(types, label)
    if (given.prompt or given.target) and form.head not in ("causal", "seq2seq"):
        raise InputError(f"{label}: prompt and target are of models that write text; name columns instead")
    if form.takes == "image":
        return _image(table, given)
    if form.head == "words":
        return _words(table, given)
    if form.head == "causal":
        return _written_on(table, given)
    if form.head == "seq2seq":
        return _rewritten(table, given)
    return _texts(table, given, pairs=True)


def _image(table: _Finder, given: Given) -> Columns:
    if len(given.columns) > 1:
        raise InputError(f"{table.label}: an image is in one column, not in {len(given.columns)}")
    if given.columns:
        return Columns(image=table.check(given.columns[0], IMAGE_TYPES, "images"))
    found = table.first(IMAGES, IMAGE_TYPES) or table.only([IMAGE])
    if found is None:
        raise table.unknown("images", "name it: columns=['...']")
    return Columns(image=found)


def _words(table: _Finder, given: Given) -> Columns:
    if len(given.columns) == 1 and table.types.get(given.columns[0]) == TEXTS:
        return Columns(words=given.columns[0])
    found = None if given.columns else table.first(WORDS, (TEXTS,))
    return _texts(table, given, pairs=False) if found is None else Columns(words=found)


def _texts(table: _Finder, given: Given, pairs: bool) -> Columns:
    """The column of a text, or the two of a pair."""
    if len(given.columns) > (2 if pairs else 1):
        raise InputError(
            f"{table.label}: this model takes one text, not the two of {', '.join(given.columns)}; where one is to be "
            "written on the other, name them prompt and target"
        )
    if given.columns:
        return Columns(text=tuple(table.check(name, (TEXT,), "text") for name in given.columns))
    pair = table.first_pair(PAIRS) if pairs else None
    if pair is not None:
        return Columns(text=pair)
    found = table.first(SINGLE, (TEXT,)) or table.only((TEXT,))
    if found is None:
        way_out = "name it, or the two of a pair: " if pairs else "name it: "
        raise table.unknown("text", f"{way_out}{{'path': ..., 'columns': ['...']}} (--columns TASK=...)")
    return Columns(text=(found,))


def _written_on(table: _Finder, given: Given) -> Columns:
    """What a language model goes on writing: conversations, prompts with targets, or plain text."""
    kinds = (TEXT, MESSAGES)
    if given.target:
        return _named_target(table, given, kinds)
    if given.prompt:
        given = replace(given, columns=(given.prompt,), prompt=None)
    if given.columns:
        if len(given.columns) == 1 and table.types.get(given.columns[0]) == MESSAGES:
            return Columns(chat=given.columns[0])
        return _texts(table, given, pairs=False)
    chat = table.first(CHATS, (MESSAGES,))
    if chat is not None:
        return Columns(chat=chat)
    joined = table.first_pair(JOINED, kinds)
    if joined is not None:
        return Columns(prompt=joined[:1], target=joined[1])
    if table.first(("text",), (TEXT,)) is None and (answered := table.first_pair(ANSWERED)) is not None:
        further = [table.first((name,), (TEXT,)) for name in FURTHER.get(answered[0].lower(), ())]
        parts = [answered[0], *(name for name in further if name is not None and name != answered[1])]
        return Columns(prompt=tuple(parts), target=answered[1], joint=None)
    return _texts(table, given, pairs=False)


def _rewritten(table: _Finder, given: Given) -> Columns:
    """What an encoder-decoder reads, and what it writes where rows say so."""
    if given.prompt or given.target:
        return _named_target(table, given, (TEXT,))
    if not given.columns and (pair := table.first_pair((*REWRITTEN, *JOINED, *ANSWERED))) is not None:
        return Columns(prompt=pair[:1], target=pair[1])
    return Columns(prompt=_texts(table, given, pairs=False).text)


def _named_target(table: _Finder, given: Given, kinds: Sequence[str]) -> Columns:
    prompt = given.prompt or (given.columns[0] if given.columns else None)
    if prompt is None:
        raise InputError(f"{table.label}: target '{given.target}' needs its prompt: {{'prompt': '...', 'target': ...}}")
    target = None if given.target is None else table.check(given.target, kinds, "text")
    return Columns(prompt=(table.check(prompt, kinds, "text"),), target=target)
