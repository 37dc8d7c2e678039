"""mergekit's parameters as a method's options, tensor by tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, get_type_hints

from hf_fda.errors import InputError, nearest
from hf_fda.inputs import Inputs
from hf_fda.merge_methods import FDAConfig, MethodConfig, method_class, with_source_names
from hf_fda.merge_methods.conversion import coerce
from hf_fda.mergekit.groups import Group
from hf_fda.mergekit.places import Place, Places
from hf_fda.mergekit.schema import Document
from hf_fda.mergekit.values import Setting

NAMES = {"weight": "weights", "lambda": "scaling"}
"""Our names of options that have others in mergekit."""

DEFAULTS = {"task_arithmetic": {"scaling": 1.0}}
"""mergekit's defaults of options, by method, that are others than ours."""

WITHOUT_EFFECT = ("int8_mask",)
"""Parameters that change how mergekit computes, not what."""

Levels = Sequence[Mapping[str, Setting]]


class Parameters:
    """The config of a document's method for every tensor.

    Args:
        document: gives the parameters.
        groups: the parts of its output.

    Raises:
        InputError: naming the line, for a parameter that the method does not have.
    """

    def __init__(self, document: Document, groups: Sequence[Group]) -> None:
        self.document, self.groups = document, tuple(groups)
        self.method = method_class(document.method.text())
        self._made: dict[str, MethodConfig] = {}
        for group in groups:
            for level in self._shared(group):
                self._check(level, own=False)
            for number in range(len(group.sources)):
                self._check(group.sources[number].parameters, own=True)

    @property
    def varying(self) -> tuple[str, ...]:
        """The options that are not the same for all tensors."""
        several = len(self.groups) > 1
        found = [name for name, setting in self.document.parameters.items() if not setting.constant]
        for group in self.groups:
            own = [source.parameters for source in group.sources]
            levels = own if group.slice is None else [group.slice.parameters, *own]
            found += [name for level in levels for name, setting in level.items() if several or not setting.constant]
        return tuple(dict.fromkeys(NAMES.get(name, name) for name in found))

    @property
    def general(self) -> MethodConfig:
        """The config by what holds for all tensors, at the first layer where it differs by layer."""
        group = self.groups[0]
        return self.config_at(Place(group, 0.0, (), ((),) * len(group.sources)))

    def at(self, inputs: Inputs) -> Callable[[str], MethodConfig]:
        """What gives the config for one of the base's tensors by name, for a merge of these inputs."""
        filtered = any(setting.filtered for setting in self._settings())
        spread = [setting for setting in self._settings() if any(len(one.values) > 1 for one in setting.choices)]
        if spread and not inputs.base.layout.known:
            spread[0].node.refuse("the layers of a model that transformers does not know are not known; give one value")
        places = Places(inputs, self.groups, filtered)
        names = [source.name for source in inputs.sources]
        return lambda name: with_source_names(self.config_at(places.of(name)), names)

    def _settings(self) -> list[Setting]:
        levels = [level for group in self.groups for level in self._shared(group)]
        levels += [own.parameters for group in self.groups for own in group.sources]
        return [setting for level in levels for setting in level.values()]

    def _shared(self, group: Group) -> Levels:
        """The parameters of a part of the output, those that win first."""
        return [*([] if group.slice is None else [group.slice.parameters]), self.document.parameters]

    def _check(self, level: Mapping[str, Setting], own: bool) -> None:
        for name, setting in level.items():
            if name in WITHOUT_EFFECT:
                continue
            option = NAMES.get(name, name)
            known = self._options()
            if option not in known:
                setting.node.refuse(f"method '{self.method.name}' has no parameter '{name}': {nearest(name, known)}")
            if own and not self._per_source(option) and self.method.max_sources != 1:
                setting.node.refuse(f"'{name}' holds for the whole merge; move it to the parameters of the merge")
            if issubclass(self.method, FDAConfig) and not setting.constant:
                setting.node.refuse(f"'{name}' of method 'fda' must be the same for all tensors")
            self._check_values(option, setting)

    def _check_values(self, option: str, setting: Setting) -> None:
        """Refuse values that the option cannot have, where they are written."""
        field = self._options()[option]
        hint = float if self._per_source(option) else get_type_hints(self._owner(option))[option]
        for value in (value for choice in setting.choices for value in choice.values):
            try:
                coerce(field, hint, value, self.method.name)
            except InputError as error:
                setting.node.refuse(str(error))

    @cached_property
    def _start(self) -> type[MethodConfig] | None:
        """The method that `fda` starts from, whose options it takes too, where one is named."""
        start = self.document.parameters.get("initial")
        if not issubclass(self.method, FDAConfig) or start is None:
            return None
        name = start.at((), 0.0)
        return method_class(name) if isinstance(name, str) and name != "base" else None

    def _owner(self, option: str) -> type[MethodConfig]:
        """The method that an option belongs to."""
        return self.method if self._start is None or option in self.method.option_fields() else self._start

    def _options(self) -> dict[str, dataclasses.Field[Any]]:
        """The options that may be given."""
        own = self.method.option_fields()
        return own if self._start is None else {**self._start.option_fields(), **own}

    def _per_source(self, option: str) -> bool:
        field = self._options().get(option)
        return field is not None and bool(field.metadata.get("per_source"))

    def config_at(self, place: Place) -> MethodConfig:
        """The config for a tensor; equal ones are one object."""
        options: dict[str, Any] = dict(DEFAULTS.get(self.method.name, {}))
        shared = self._shared(place.group)
        names = {name for level in shared for name in level}
        names |= {name for own in place.group.sources for name in own.parameters}
        for name in sorted(names - set(WITHOUT_EFFECT)):
            option = NAMES.get(name, name)
            if self._per_source(option):
                value = self._of_each(name, option, place, shared)
            elif self.method.max_sources == 1:
                own = place.group.sources[0].parameters
                value = _first([own, *shared], name, place.source_names[0], place.depth)
            else:
                value = _first(shared, name, place.names, place.depth)
            if value is not None:
                options[option] = value
        key = repr(options)
        if key not in self._made:
            try:
                self._made[key] = self.method.from_options(options)
            except InputError as error:
                self.document.method.refuse(str(error))
        return self._made[key]

    def _of_each(self, name: str, option: str, place: Place, shared: Levels) -> tuple[Any, ...] | None:
        """A parameter for each source; the method's default for a source that has none."""
        found = []
        for own, names in zip(place.group.sources, place.source_names, strict=True):
            found.append(_first([own.parameters, *shared], name, names, place.depth))
        if all(value is None for value in found):
            return None
        field = self._options()[option]
        default = 1.0 if field.default is None else field.default
        return tuple(default if value is None else value for value in found)


def _first(levels: Levels, name: str, names: Sequence[str], depth: float) -> Any:
    """The value of a parameter at the first level that has one for a tensor."""
    for level in levels:
        if name in level:
            value = level[name].at(names, depth)
            if value is not None:
                return value
    return None
