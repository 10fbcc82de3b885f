"""Functions between betterproto2 objects and messages of protobuf's C runtime (upb).

betterproto2 reads and writes the wire format in Python, one varint at a time. upb does it in C; what stays in Python is
the walk between its message and the betterproto2 object. Each message type gets one function per direction, written
out field by field and compiled when the type is first met: no dispatch is left for run time.

Tensors do not pass through upb. It copies bytes twice each way and asks for memory as it goes: 2.7 ms to write 1 MB,
1.1 ms to read it. A message is the concatenation of its fields, so lists of bytes are joined to what upb writes of the
others, and cut out before upb reads the rest: one copy each way, 0.03 ms.

upb needs descriptors. They are derived from the betterproto2 class into a pool of this module's own. So every
betterproto2 class works, a user's too, and nothing clashes with generated code that knows the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from functools import cache, lru_cache
from threading import Lock
from typing import Any, cast, get_args

import betterproto2
from betterproto2 import FieldMetadata
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

Buffer = bytes | bytearray | memoryview

LARGE = 256 * 1024
"""Bytes of a message from which on it pays to cut its lists of bytes out; below, upb is faster than the search."""

MOST_FIELDS = 256
"""Fields to look at before upb gets the message as it is: a bound on the search, as a field may take 2 bytes."""

_FLOATS = (betterproto2.TYPE_FLOAT, betterproto2.TYPE_DOUBLE)


class Unmapped(Exception):
    """The type has a field that betterproto2 shows as an object of its own, such as a datetime for a Timestamp."""


def converters(cls: type[betterproto2.Message]) -> tuple[Callable[[Any], bytes], Callable[[Buffer], Any]]:
    """``(encode, decode)`` for a betterproto2 class. Raises :exc:`Unmapped`."""
    # Two threads that meet a type at the same time must not describe it twice.
    with _lock:
        if cls not in _numbers:
            _add(cls)
        number = _numbers[cls]
    upb, to_upb, from_upb = (_namespace[f"{name}_{number}"] for name in ("upb", "to_upb", "from_upb"))
    to_chunks = _namespace.get(f"to_chunks_{number}")
    lists = {meta.number: name for name, meta, _, _ in _fields(cls) if name in _heavy(cls) and meta.repeated}

    def encode(message: Any) -> bytes:
        target = upb()
        to_upb(message, target)
        return cast(bytes, target.SerializeToString())

    def encode_chunks(message: Any) -> bytes:
        return b"".join(to_chunks(message))  # type: ignore[misc]

    def decode(data: Buffer) -> Any:
        return from_upb(upb.FromString(data))

    def decode_chunks(data: Buffer) -> Any:
        if len(data) < LARGE or (parts := _cut_out(lists, data)) is None:
            return from_upb(upb.FromString(data))
        rest, found = parts
        message = from_upb(upb.FromString(rest))
        for name, blobs in found.items():
            setattr(message, name, blobs)
        return message

    return (encode_chunks if to_chunks else encode), (decode_chunks if lists else decode)


def _cut_out(lists: dict[int, str], data: Buffer) -> tuple[bytes, dict[str, list[bytes]]] | None:
    """Take the lists of bytes out of a message: the rest of it, and the lists by name.

    None if that is not simple. upb then has the last word, on what is malformed too.
    """
    view = memoryview(data)
    rest: list[memoryview] = []
    found: dict[str, list[bytes]] = {name: [] for name in lists.values()}
    at = kept = 0
    try:
        for _ in range(MOST_FIELDS):
            if at >= len(view):
                break
            start = at
            tag, at = _varint(view, at, 5)
            kind = tag & 7
            if kind == 2:
                size, at = _varint(view, at, 5)
                end = at + size
                if (name := lists.get(tag >> 3)) is not None:
                    rest.append(view[kept:start])
                    found[name].append(bytes(view[at:end]))
                    kept = end
                at = end
            elif kind == 0:
                _, at = _varint(view, at, 10)
            else:
                at += {1: 8, 5: 4}[kind]
    except (IndexError, KeyError):
        return None
    if at != len(view):
        return None
    rest.append(view[kept:])
    return b"".join(rest), found


def _varint(view: memoryview, at: int, most: int) -> tuple[int, int]:
    """The varint at ``at``, and where it ends. :exc:`IndexError`: it is cut off, or longer than ``most`` bytes."""
    value = 0
    for shift in range(most):
        byte = view[at + shift]
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    raise IndexError


def _rest(message: Message) -> bytes:
    """The unknown fields, byte for byte. Consumes the message."""
    for field, _ in message.ListFields():
        message.ClearField(field.name)
    return message.SerializeToString()


@lru_cache(maxsize=4096)
def _head(number: int, size: int) -> bytes:
    """What stands before the ``size`` bytes of field ``number``."""
    head = bytearray()
    for value in (number << 3 | 2, size):
        while value > 0x7F:
            head.append(value & 0x7F | 0x80)
            value >>= 7
        head.append(value)
    return bytes(head)


def _flat(value: Buffer) -> Buffer:
    """A buffer whose ``len`` is its size in bytes, whatever its items are."""
    view = memoryview(value)
    return view.cast("B") if view.nbytes else b""


class _Members(dict[int, Any]):
    """An enum's members by number. An unknown number makes a nameless member, as in betterproto2."""

    def __init__(self, enum: type[betterproto2.Enum]) -> None:
        super().__init__((member.value, member) for member in enum)
        self._enum = enum

    def __missing__(self, number: int) -> betterproto2.Enum:
        return self._enum(number)


_lock = Lock()
_pool = descriptor_pool.DescriptorPool()
# A number stands for a message class or an enum, as their names need not be unique.
_numbers: dict[type, int] = {}
_files: dict[type, str] = {}
# What the written functions see: these, and each other.
_namespace: dict[str, Any] = {
    "new": object.__new__,
    "unknown": UnknownFieldSet,
    "rest": _rest,
    "head": _head,
    "flat": _flat,
}


def _name(cls: type) -> str:
    return f"betterproto2.{cls.__name__}_{_numbers[cls]}"


@cache
def _fields(cls: type[betterproto2.Message]) -> list[tuple[str, FieldMetadata, FieldMetadata, type[Any]]]:
    """Of each field: its name, its metadata, and the metadata and class of one value (of a list, of a map)."""
    hints = cls._type_hints()
    found = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # every generated message is a dataclass
        meta, hint = FieldMetadata.get(field), hints[field.name]
        inner = get_args(hint) or (hint,)  # of list[T], dict[K, T], T | None, T
        found.append(
            (field.name, meta, meta.map_meta[1], inner[1]) if meta.map_meta else (field.name, meta, meta, inner[0])
        )
    return found


def _add(root: type[betterproto2.Message]) -> None:
    """Describe and compile ``root`` and all that it can hold, in one file: types may refer to each other in circles."""
    added: dict[type[betterproto2.Message], None] = {}
    needed: set[str] = set()
    todo = [root]
    while todo:
        cls = todo.pop()
        if cls in _files:
            needed.add(_files[cls])
        elif cls not in added:
            added[cls] = None
            for _, _, value, inner in _fields(cls):
                if value.unwrap:
                    raise Unmapped(cls.__name__)
                if value.proto_type == betterproto2.TYPE_MESSAGE:
                    todo.append(inner)
    for cls in added:
        _numbers[cls] = len(_numbers)
    file = FileDescriptorProto(name=_name(root), package="betterproto2", syntax="proto3", dependency=sorted(needed))
    file.message_type.extend(_describe(cls) for cls in added)
    _pool.AddSerializedFile(file.SerializeToString())
    for cls in added:
        _files[cls] = file.name
        _namespace[f"class_{_numbers[cls]}"] = cls
        _namespace[f"upb_{_numbers[cls]}"] = message_factory.GetMessageClass(_pool.FindMessageTypeByName(_name(cls)))
        source = "\n".join([*_write_from_upb(cls), *_write_to_upb(cls), *_write_to_chunks(cls)])
        exec(compile(source, f"<upb converters of {cls.__name__}>", "exec"), _namespace)


# --- from a betterproto2 class to a descriptor


def _describe(cls: type[betterproto2.Message]) -> DescriptorProto:
    described = DescriptorProto(name=_name(cls).rpartition(".")[2])
    groups = list(dict.fromkeys(meta.group for _, meta, _, _ in _fields(cls) if meta.group))
    for group in groups:
        described.oneof_decl.add(name=group)
    for name, meta, value, inner in _fields(cls):
        field = described.field.add(name=name, number=meta.number, label=FieldDescriptorProto.LABEL_OPTIONAL)
        if meta.map_meta:
            entry = described.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
            entry.options.map_entry = True
            for part, part_name in zip(meta.map_meta, ("key", "value"), strict=True):
                of_entry = entry.field.add(name=part_name, number=part.number, label=field.label)
                _describe_type(of_entry, part, inner)
            field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{_name(cls)}.{entry.name}"
        else:
            _describe_type(field, value, inner)
        if meta.map_meta or meta.repeated:
            field.label = FieldDescriptorProto.LABEL_REPEATED
        elif meta.group:
            field.oneof_index = groups.index(meta.group)
        elif meta.optional and meta.proto_type != betterproto2.TYPE_MESSAGE:
            field.proto3_optional = True
            field.oneof_index = len(described.oneof_decl)
            described.oneof_decl.add(name=f"_{name}")
    return described


def _describe_type(field: FieldDescriptorProto, meta: FieldMetadata, cls: type) -> None:
    if meta.proto_type == betterproto2.TYPE_MESSAGE:
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{_name(cls)}"
    elif meta.proto_type == betterproto2.TYPE_ENUM:
        field.type = FieldDescriptorProto.TYPE_INT32  # the same on the wire, and open to any number
    else:
        field.type = FieldDescriptorProto.Type.Value(f"TYPE_{meta.proto_type.upper()}")


# --- from a betterproto2 class to functions: m is upb's message, o betterproto2's object


def _write_from_upb(cls: type[betterproto2.Message]) -> Iterator[str]:
    number = _numbers[cls]
    yield f"def from_upb_{number}(m):"
    yield f"    o = new(class_{number})"
    alternatives: dict[str, list[str]] = {}
    for name, meta, value, inner in _fields(cls):
        read, convert = f"m.{name}", _reader(value, inner)
        if meta.map_meta:
            # Looking keys up is twice as fast as upb's items().
            yield f"    v = {read}"
            yield f"    o.{name} = {{k: {convert('v[k]')} for k in v}} if v else {{}}"
        elif meta.repeated:
            # A slice is upb's fastest way to a list.
            yield f"    o.{name} = " + (f"{read}[:]" if convert("x") == "x" else f"[{convert('x')} for x in {read}[:]]")
        elif meta.group:
            yield f"    o.{name} = None"
            alternatives.setdefault(meta.group, []).append(f"if v == {name!r}: o.{name} = {convert(read)}")
        elif meta.optional:
            yield f"    o.{name} = {convert(read)} if m.HasField({name!r}) else None"
        else:
            yield f"    o.{name} = {convert(read)}"
    for group, branches in alternatives.items():
        yield f"    v = m.WhichOneof({group!r})"
        yield "    " + "\n    el".join(branches)
    yield "    o._unknown_fields = rest(m) if unknown(m) else b''"
    yield "    return o"


def _reader(meta: FieldMetadata, cls: type[Any]) -> Callable[[str], str]:
    """From an expression for upb's value to one for betterproto2's."""
    if meta.proto_type == betterproto2.TYPE_MESSAGE:
        return lambda expression: f"from_upb_{_numbers[cls]}({expression})"
    if meta.proto_type == betterproto2.TYPE_ENUM:
        number = _numbers.setdefault(cls, len(_numbers))
        _namespace.setdefault(f"members_{number}", _Members(cls))
        return lambda expression: f"members_{number}[{expression}]"
    return lambda expression: expression


def _write_to_upb(cls: type[betterproto2.Message], name_of: str = "to_upb", but: Collection[str] = ()) -> Iterator[str]:
    yield f"def {name_of}_{_numbers[cls]}(o, m):"
    for name, meta, value, inner in _fields(cls):
        if name in but:
            continue
        yield f"    v = o.{name}"
        fill = f"to_upb_{_numbers[inner]}" if value.proto_type == betterproto2.TYPE_MESSAGE else ""
        if meta.map_meta:
            yield "    if v:"
            yield f"        t = m.{name}"
            yield "        for k, x in v.items(): " + (f"{fill}(x, t[k])" if fill else "t[k] = x")
        elif meta.repeated and fill:
            yield "    if v:"
            yield f"        add = m.{name}.add"
            yield f"        for x in v: {fill}(x, add())"
        elif meta.repeated:
            yield f"    if v: m.{name}.extend(v)"
        elif fill:
            yield "    if v is not None:"
            yield f"        t = m.{name}"
            yield "        t.SetInParent()"
            yield f"        {fill}(v, t)"
        elif meta.optional or meta.group or value.proto_type in _FLOATS:
            # A float's -0.0 is false, and yet not the default.
            yield f"    if v is not None: m.{name} = v"
        else:
            yield f"    if v: m.{name} = v"
    yield "    if o._unknown_fields: m.MergeFromString(o._unknown_fields)"


def _heavy(cls: type[betterproto2.Message], seen: tuple[type, ...] = ()) -> dict[str, int]:
    """Fields that may hold much, by name: lists of bytes, and single messages that have such fields themselves."""
    found = {}
    for name, meta, value, inner in _fields(cls):
        if meta.map_meta or meta.group or cls in seen:
            continue
        if meta.repeated:
            heavy = value.proto_type == betterproto2.TYPE_BYTES
        else:
            heavy = value.proto_type == betterproto2.TYPE_MESSAGE and bool(_heavy(inner, (*seen, cls)))
        if heavy:
            found[name] = meta.number
    return found


def _write_to_chunks(cls: type[betterproto2.Message]) -> Iterator[str]:
    heavy = _heavy(cls)
    if not heavy:
        return
    number = _numbers[cls]
    yield from _write_to_upb(cls, "light_to_upb", heavy)
    yield f"def to_chunks_{number}(o):"
    yield f"    m = upb_{number}()"
    yield f"    light_to_upb_{number}(o, m)"
    yield "    c = [m.SerializeToString()]"
    for name, meta, _, inner in _fields(cls):
        if name not in heavy:
            continue
        if meta.repeated:
            yield f"    for x in o.{name}:"
            yield "        if type(x) is not bytes: x = flat(x)"
            yield f"        c += (head({meta.number}, len(x)), x)"
        else:
            yield f"    if o.{name} is not None:"
            yield f"        v = to_chunks_{_numbers[inner]}(o.{name})"
            yield f"        c.append(head({meta.number}, sum(map(len, v))))"
            yield "        c += v"
    yield "    return c"
