"""Classes that payloads are declared as: what they are called, what they bound by themselves."""

from __future__ import annotations

import dataclasses
import functools
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints
from uuid import UUID

import msgspec

from mesh.values import Value

#: A class, or several that a tag tells from each other.
Schema: TypeAlias = type[Any] | UnionType

#: What holds nothing else.
SCALARS = frozenset({NoneType, bool, int, float, str, bytes, datetime})
#: What is one of them on the wire.
_SINGLE = SCALARS | {date, time, timedelta, Decimal, UUID, msgspec.UnsetType}
_LISTS = frozenset({list, tuple, set, frozenset})
_UNBOUNDED = float("inf")


class Shape(Value, frozen=True):
    """What everything that fits a schema, and holds nothing else, looks like on the wire."""

    #: Its twin, into which what holds anything else cannot be decoded.
    strict: Any
    #: Levels of objects and arrays.
    depth: int = 0
    #: The most items in all of them together.
    items: float = 0
    #: Whether it can be nothing but an object.
    is_object: bool = False
    #: Whether a class of it looks at values with code of its own, which the twin has not.
    has_code: bool = False


def name_of(schema: Any) -> str:
    """Give a schema's name for messages: a class, or several of them."""
    origin, args = get_origin(schema), get_args(schema)
    if origin is Annotated:
        return name_of(args[0])
    if origin in (Union, UnionType):
        return " | ".join(map(name_of, args))
    if schema is NoneType:
        return "None"
    name: str | None = getattr(schema, "__qualname__", None)
    if name is None or origin is Literal:
        return str(schema)
    return f"{name}[{', '.join(map(name_of, args))}]" if args else name


def is_closed(schema: Any, within: tuple[Any, ...] = ()) -> bool:
    """Say whether a schema bounds depth and number of items by itself."""
    if schema in SCALARS:
        return True
    if get_origin(schema) in (Union, UnionType):
        return all(is_closed(each, within) for each in get_args(schema))
    if schema in within or not isinstance(schema, type):
        return False
    if issubclass(schema, Enum):
        return True
    if not (issubclass(schema, msgspec.Struct) or dataclasses.is_dataclass(schema)):
        return False
    try:
        hints = get_type_hints(schema)
    except (NameError, TypeError):
        return False
    return all(is_closed(each, (*within, schema)) for each in hints.values())


@functools.cache
def shape_of(schema: Any) -> Shape | None:
    """Give the shape of a schema; None where it has no bounds, or none that can be told."""
    try:
        return _shape(schema, ())
    except (NameError, TypeError):
        return None


def _shape(schema: Any, within: tuple[Any, ...]) -> Shape | None:
    origin, args = get_origin(schema), get_args(schema)
    if schema in _SINGLE or origin is Literal:
        return Shape(schema)
    if origin is Annotated:
        found = _shape(args[0], within)
        return found and msgspec.structs.replace(found, strict=Annotated[(found.strict, *args[1:])])
    if origin in (Union, UnionType):
        return _join(Union, [_shape(each, within) for each in args])
    if origin in _LISTS:
        inner = [Shape(...) if each is ... else _shape(each, within) for each in args]
        return _enclose(_join(origin, inner))
    if origin is dict and args[0] is str:
        found = _enclose(_join(dict, [Shape(str), _shape(args[1], within)]))
        return found and msgspec.structs.replace(found, is_object=True)
    if origin is not None or schema in within or not isinstance(schema, type):
        return None
    if issubclass(schema, Enum):
        return Shape(schema)
    return _shape_of_class(schema, (*within, schema))


def _join(kind: Any, found: list[Shape | None]) -> Shape | None:
    """Give the shape of what is one of several, or holds them."""
    shapes = [each for each in found if each is not None]
    if len(shapes) < len(found):
        return None
    return Shape(
        kind[tuple(each.strict for each in shapes)],
        max(each.depth for each in shapes),
        max(each.items for each in shapes),
        all(each.is_object for each in shapes),
        any(each.has_code for each in shapes),
    )


def _enclose(inner: Shape | None) -> Shape | None:
    """Give the shape of an array of any length."""
    return inner and msgspec.structs.replace(
        inner, depth=inner.depth + 1, items=_UNBOUNDED, is_object=False
    )


def _shape_of_class(kind: type[Any], within: tuple[Any, ...]) -> Shape | None:
    tags: dict[str, Any] = {}
    if issubclass(kind, msgspec.Struct):
        config = kind.__struct_config__
        if config.array_like:
            return None
        if config.tag is not None:
            tags = {"tag": config.tag, "tag_field": config.tag_field}
        fields = [
            (each.encode_name, each.type, each.required) for each in msgspec.structs.fields(kind)
        ]
    elif dataclasses.is_dataclass(kind) and all(each.init for each in dataclasses.fields(kind)):
        hints = get_type_hints(kind, include_extras=True)
        missing = dataclasses.MISSING
        fields = [
            (each.name, hints[each.name], each.default is each.default_factory is missing)
            for each in dataclasses.fields(kind)
        ]
    else:
        return None
    shapes = [_shape(each, within) for _, each, _ in fields]
    twins = []
    depth, items, has_code = 0, float(len(fields) + bool(tags)), hasattr(kind, "__post_init__")
    for number, ((name, _, is_required), found) in enumerate(zip(fields, shapes, strict=True)):
        if found is None:
            return None
        default = msgspec.NODEFAULT if is_required else None
        twins.append((f"f{number}", found.strict, msgspec.field(default=default, name=name)))
        depth, items = max(depth, found.depth), items + found.items
        has_code = has_code or found.has_code
    strict = msgspec.defstruct(
        kind.__name__, twins, forbid_unknown_fields=True, kw_only=True, gc=False, **tags
    )
    return Shape(strict, depth + 1, items, is_object=True, has_code=has_code)
