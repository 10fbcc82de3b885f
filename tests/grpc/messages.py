"""Random betterproto2 messages of any class, and an equality that sees what ``==`` does not."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import betterproto2
from hypothesis import strategies as st

INTEGERS = {
    betterproto2.TYPE_INT32: (-(2**31), 2**31 - 1),
    betterproto2.TYPE_SINT32: (-(2**31), 2**31 - 1),
    betterproto2.TYPE_SFIXED32: (-(2**31), 2**31 - 1),
    betterproto2.TYPE_UINT32: (0, 2**32 - 1),
    betterproto2.TYPE_FIXED32: (0, 2**32 - 1),
    betterproto2.TYPE_INT64: (-(2**63), 2**63 - 1),
    betterproto2.TYPE_SINT64: (-(2**63), 2**63 - 1),
    betterproto2.TYPE_SFIXED64: (-(2**63), 2**63 - 1),
    betterproto2.TYPE_UINT64: (0, 2**64 - 1),
    betterproto2.TYPE_FIXED64: (0, 2**64 - 1),
}
# betterproto2 drops -0.0 where upb keeps it; that difference has a test of its own.
SCALARS = {
    betterproto2.TYPE_BOOL: st.booleans(),
    betterproto2.TYPE_STRING: st.text(max_size=8),
    betterproto2.TYPE_BYTES: st.binary(max_size=200),
    betterproto2.TYPE_FLOAT: st.floats(width=32).filter(lambda x: math.copysign(1, x) > 0 or x != 0),
    betterproto2.TYPE_DOUBLE: st.floats().filter(lambda x: math.copysign(1, x) > 0 or x != 0),
} | {kind: st.integers(*ends) for kind, ends in INTEGERS.items()}


def _values(meta: betterproto2.FieldMetadata, cls: type[Any], depth: int) -> st.SearchStrategy[Any]:
    if meta.proto_type == betterproto2.TYPE_MESSAGE:
        return messages(cls, depth - 1)
    if meta.proto_type == betterproto2.TYPE_ENUM:
        return st.one_of(st.sampled_from(list(cls)), st.integers(-(2**31), 2**31 - 1).map(cls))
    return SCALARS[meta.proto_type]


@cache
def messages(cls: type[betterproto2.Message], depth: int = 3) -> st.SearchStrategy[betterproto2.Message]:
    """Messages of ``cls``, nested at most ``depth`` deep, with at most one member set in each oneof."""
    known = cls._betterproto
    plain: dict[str, st.SearchStrategy[Any]] = {}
    groups: dict[str, list[tuple[str, st.SearchStrategy[Any]]]] = {}
    for name, meta in known.meta_by_field_name.items():
        value = meta.map_meta[1] if meta.map_meta else meta
        inner = known.cls_by_field[f"{name}.value" if meta.map_meta else name]
        if value.proto_type == betterproto2.TYPE_MESSAGE and depth == 0:
            continue
        values = _values(value, inner, depth)
        if meta.map_meta:
            plain[name] = st.dictionaries(SCALARS[meta.map_meta[0].proto_type], values, max_size=3)
        elif meta.repeated:
            plain[name] = st.lists(values, max_size=3)
        elif meta.group:
            groups.setdefault(meta.group, []).append((name, values))
        elif meta.optional:
            plain[name] = st.none() | values
        else:
            plain[name] = values
    alternatives = [
        st.one_of(st.just({}), *(values.map(lambda value, name=name: {name: value}) for name, values in members))
        for members in groups.values()
    ]
    # Absent more often than not: a message with every field set hides what absence does.
    fields = st.fixed_dictionaries({}, optional=plain)
    return st.tuples(fields, *alternatives).map(lambda parts: cls(**{k: v for part in parts for k, v in part.items()}))


def same(one: Any, other: Any) -> bool:
    """Equal in value, type, presence and unknown fields, all the way down; NaN equals NaN, 0.0 is not -0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, betterproto2.Message):
        return vars(one).keys() == vars(other).keys() and all(same(v, vars(other)[k]) for k, v in vars(one).items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, betterproto2.Enum):
        return (one.value, one.name) == (other.value, other.name)
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or (
            one == other and math.copysign(1, one) == math.copysign(1, other)
        )
    return bool(one == other)


def message_classes(module: Any) -> list[type[betterproto2.Message]]:
    found = [getattr(module, name) for name in module.__all__]
    return [cls for cls in found if issubclass(cls, betterproto2.Message)]
