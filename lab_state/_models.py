"""Models and type adapters of Pydantic.

lab_state does not import Pydantic. It recognizes models and adapters by their methods, and
uses the module that the application has imported. The JSON of a model has the names of its
fields, not their aliases. A model is stored only if an equal model can be read from its JSON. Fields that
the model excludes may differ. Parts whose class has no `__eq__` are compared by their JSON.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from math import isfinite
from typing import Any, cast, get_args, get_origin

import msgspec

from lab_state._json_keys import double_key
from lab_state.exceptions import InvalidValueError

Way = list[str | int]
"""The path to a part of a value, as a list of keys and indexes. `path_of` returns its text."""

NOT_FINITE = "NaN and infinity cannot be kept: JSON has no such numbers"
HIDDEN = "a secret of Pydantic would be kept as asterisks: give its field a serializer, or keep the text itself"

_decode = msgspec.json.Decoder().decode
_PACKAGES = frozenset({"pydantic", "pydantic_core", "annotated_types"})


def is_model(kind: object) -> bool:
    """Return whether an object is a class of models of Pydantic 2, or another class with `model_validate_json`."""
    return isinstance(kind, type) and hasattr(kind, "model_validate_json")


def read(kind: Any, data: bytes) -> Any:
    """Return a model that is decoded from JSON. The JSON may have the names of the fields, or their aliases."""
    return kind.model_validate_json(data, by_alias=True, by_name=True)


def write(model: Any) -> bytes:
    """Return the JSON of a model.

    Raises:
        InvalidValueError: The JSON would be read as another value, or has a key twice.
        Exception: Pydantic, msgspec or a serializer of the model raised it.
    """
    data = _dump(model)
    tree = _decode(data)  # this raises an error for numbers that are out of range
    if data.count(b"{") > 1 and (double := double_key(data)) is not None:
        way, name = double
        raise InvalidValueError(f"a dict with two keys that are both {name!r} in JSON cannot be kept", path_of(way))
    kind = class_of(model)
    if not hasattr(kind, "model_validate_json"):
        return data
    back = read(kind, data)
    if back != model:
        _compare(model, back, tree)
    return data


def _compare(model: Any, back: Any, tree: object) -> None:
    """Check that `back`, the model that was read from the JSON, equals the model. Excluded fields may differ.

    Raises:
        InvalidValueError: A part differs.
    """
    name = class_of(model).__qualname__
    incomparable = False
    for way, old, new in _leaves(model, back, []):
        if hasattr(old, "get_secret_value"):
            raise InvalidValueError(HIDDEN, path_of(way))
        if isinstance(old, float) and not isfinite(old):
            raise InvalidValueError(NOT_FINITE, path_of(way))
        if is_model(class_of(old)) and is_model(class_of(new)):
            raise InvalidValueError(
                f"a {class_of(old).__qualname__} cannot be kept where it is read back as {class_of(new).__qualname__}: "
                "name its class in the annotation of the field",
                path_of(way),
            )
        if class_of(new) is not class_of(old) or getattr(class_of(old), "__eq__", None) is not object.__eq__:
            raise _changed(name, way)
        incomparable = True
    if incomparable and (again := _decode(_dump(back))) != tree:
        raise _changed(name, _first_difference(tree, again))


def _changed(name: str, way: Way) -> InvalidValueError:
    return InvalidValueError(f"a model of the class {name} cannot be kept: it is read back changed", path_of(way))


def _dump(model: Any) -> bytes:
    data: bytes = model.model_dump_json(by_alias=False, round_trip=True, warnings="none").encode()
    return data


def class_of(value: object) -> Any:
    """Return the class of an object. Type checkers see `Any`."""
    return type(value)


def _all_are(kind: Any, *values: Any) -> bool:
    """Return whether all values are of a class. Unlike `isinstance`, this does not narrow `Any` for type checkers."""
    return all(isinstance(value, kind) for value in values)


def _leaves(old: Any, new: Any, way: Way) -> Iterator[tuple[Way, Any, Any]]:
    """Yield the innermost parts that differ: the path, the old part and the new part. Skip excluded fields.

    A model that was read as another class is one part.
    """
    parts: Iterable[tuple[Any, Any, Any]] = ()
    if is_model(class_of(old)) and class_of(new) is class_of(old):
        names = [name for name, field in class_of(old).model_fields.items() if not field.exclude]
        names += getattr(old, "model_extra", None) or ()
        parts = ((name, getattr(old, name, None), getattr(new, name, None)) for name in names)
    elif _all_are(dict, old, new) and old.keys() == new.keys():
        parts = ((key, old[key], new[key]) for key in old)
    elif _all_are((list, tuple), old, new) and len(old) == len(new):
        parts = ((place, *pair) for place, pair in enumerate(zip(old, new, strict=True)))
    elif old is not new and old != new:
        yield way, old, new
    for step, before, after in parts:
        yield from _leaves(before, after, [*way, step])


def _first_difference(old: Any, new: Any) -> Way:
    """Return the path to the first innermost part in which two decoded JSON values differ."""
    way: Way = []
    while class_of(old) is class_of(new) and _all_are((dict, list), old):
        steps: Any = [*old, *new] if _all_are(dict, old) else range(max(len(old), len(new)))
        step = next(step for step in steps if _part(old, step) != _part(new, step))
        way.append(step)
        old, new = _part(old, step), _part(new, step)
    return way


def _part(container: Any, step: Any) -> Any:
    """Return a part of a dict or a list. If there is no such part, return this function, because no JSON value equals it."""
    if _all_are(dict, container):
        return container.get(step, _part)
    return container[step] if step < len(container) else _part


def step_of(key: object) -> str:
    """Return the text for a key of a dict in a path: `.name` for an identifier, `['a b']` for another key."""
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"


def path_of(way: Way) -> str:
    """Return the text of a path, such as `$.jobs[3]`."""
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else step_of(step) for step in way)


# Type adapters


def is_adapter(type_: object) -> bool:
    """Return whether an object is a `pydantic.TypeAdapter`."""
    kind: Any = type(type_)
    return bool(kind.__name__ == "TypeAdapter" and hasattr(kind, "validate_json"))


def of_pydantic(type_: Any) -> bool:
    """Return whether a type is from Pydantic, or has such a type in its parameters or metadata. Do not examine fields."""
    if isinstance(type_, type) and get_origin(type_) is None:
        return _is_of_pydantic(type_)
    metadata = getattr(type_, "__metadata__", ())
    if any(_is_of_pydantic(class_of(data)) for data in metadata):
        return True
    return any(of_pydantic(part) for part in get_args(type_))


def _is_of_pydantic(kind: type) -> bool:
    return (
        kind.__module__.partition(".")[0] in _PACKAGES
        or hasattr(kind, "__get_pydantic_core_schema__")
        or hasattr(kind, "__pydantic_core_schema__")
    )


def adapted(type_: Any) -> Callable[[bytes], Any]:
    """Return a decoder for a type that Pydantic decodes.

    Raises:
        Exception: Pydantic cannot decode the type.
    """
    if is_adapter(type_):
        adapter = type_
    else:
        pydantic: Any = sys.modules["pydantic"]
        try:
            # msgspec writes bytes as base64, so Pydantic must read them in that form.
            adapter = pydantic.TypeAdapter(type_, config={"val_json_bytes": "base64"})
        except pydantic.PydanticUserError:  # Pydantic refuses `config` for a class that has a configuration
            adapter = pydantic.TypeAdapter(type_)
    if not adapter.pydantic_complete:
        adapter.rebuild(raise_errors=True)
    validate = adapter.validate_json
    return lambda data: validate(data, by_alias=True, by_name=True)


def check_complete(kind: Any) -> None:
    """Check that a model is fully defined. Resolve annotations that name classes defined after it.

    Raises:
        NameError: An annotation names a class that does not exist.
    """
    if not getattr(kind, "__pydantic_complete__", True):
        kind.model_rebuild(raise_errors=True)


_SAYS_NO_VALUE = re.compile(
    r"missing|extra_forbidden|.*_type|(int|float|bool)_parsing|int_from_float|(greater|less)_than(_equal)?|finite_number|"
    r"multiple_of|(string_)?too_(short|long)|string_pattern_mismatch|literal_error|enum|none_required"
)
"""The kinds of Pydantic's problems whose messages never quote the value. The messages name only what was expected."""


def first_problem(error: object) -> tuple[str, str]:
    """Return the path and the message of the first problem that Pydantic found.

    A message that might quote the value is replaced by the kind of the problem.
    """
    problems = cast("Any", error).errors(include_url=False, include_context=False, include_input=False)
    first: dict[str, Any] = problems[0]
    kind = str(first["type"])
    detail = str(first["msg"]) if _SAYS_NO_VALUE.fullmatch(kind) else kind
    return path_of(list(first["loc"])), detail
