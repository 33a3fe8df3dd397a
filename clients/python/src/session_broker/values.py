"""Python values on their way to PostgreSQL and back.

Parameters travel with the type that psycopg would give them, text without any, so that PostgreSQL infers it. Results
come as psycopg loads them; what has no Python type of its own is PostgreSQL's text. What differs from psycopg: a
timestamptz is in UTC, whatever the session's time zone; int2vector and oidvector are lists of int; arrays of enums, of
domains and of an extension's types are lists of text; a composite or a record is its text. Knows nothing of channels
and sessions.
"""

from __future__ import annotations

import ipaddress
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import c_float
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from itertools import zip_longest
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast, get_args
from uuid import UUID

from session_broker.errors import DataError, ProgrammingError
from sessionbroker.v1 import value_pb2

__all__ = ["Column", "Json", "Jsonb", "Loaders", "Multirange", "Range"]

T = TypeVar("T")

Loaders = Mapping[str, Callable[[str], Any]]
"""What makes a value of a type's text, by the type's name in pg_type."""

# What Execute and ExecuteStream are asked for: a packed result takes a third of the time that values take to decode.
RESULT_FORMAT = value_pb2.RESULT_FORMAT_PACKED

# The first oid that PostgreSQL does not give by hand: types from there on may have any name.
_NOT_BUILT_IN = 16_384


class Column(NamedTuple):
    """A column of a result."""

    name: str
    """The column's name; names may repeat."""
    type_oid: int
    """``pg_type.oid`` of the column's type, of a domain's base type."""
    type_name: str
    """``pg_type.typname``: ``"int4"``, ``"_text"`` for ``text[]``."""
    type_modifier: int
    """The type modifier, as in ``varchar(10)``; -1 when there is none."""
    table_oid: int
    """``pg_class.oid`` of the table it comes from; 0 for an expression."""
    column_number: int
    """``pg_attribute.attnum`` in that table; 0 for an expression."""

    @classmethod
    def of(cls, column: value_pb2.Column) -> Column:
        """The column that the broker describes."""
        return cls(
            column.name,
            column.type_oid,
            column.type_name,
            column.type_modifier,
            column.table_oid,
            column.column_number,
        )


@dataclass(frozen=True)
class Json:
    """A parameter of type ``json``: anything that `json.dumps` takes."""

    value: object


@dataclass(frozen=True)
class Jsonb:
    """A parameter of type ``jsonb``: anything that `json.dumps` takes."""

    value: object


Bounds = Literal["[]", "[)", "(]", "()"]


@dataclass(frozen=True)
class Range(Generic[T]):
    """A value of a range type."""

    lower: T | None = None
    """The lower bound; None when there is none."""
    upper: T | None = None
    """The upper bound; None when there is none."""
    bounds: Bounds = "[)"
    """Which of the bounds belong to the range: ``[]``, ``[)``, ``(]`` or ``()``."""
    empty: bool = False
    """Nothing is in it."""

    def __post_init__(self) -> None:
        """Refuses bounds that there are not."""
        if self.bounds not in get_args(Bounds):
            raise ProgrammingError(f"bounds: is {self.bounds!r}: give one of '[]', '[)', '(]' and '()'")


class Multirange(tuple[Range[T], ...]):
    """A value of a multirange type: its ranges in order."""

    __slots__ = ()


def check_loaders(loaders: Loaders) -> None:
    """Refuses loaders that would never be given text.

    Raises:
        ProgrammingError: A type does not travel as text.
    """
    wrong = sorted(name for name in loaders if name in _BINARY and name not in ("json", "jsonb"))
    if wrong:
        raise ProgrammingError(f"loaders: {wrong[0]!r} does not travel as text: cast it to text in the statement")


def to_parameters(values: Sequence[object]) -> list[value_pb2.Parameter]:
    """The parameters of a statement.

    Raises:
        ProgrammingError: A value's type cannot be sent; the message names the parameter.
        DataError: PostgreSQL has no such value.
    """
    parameters: list[value_pb2.Parameter] = []
    try:
        parameters.extend(map(to_parameter, values))
    except (ProgrammingError, DataError) as error:
        raise type(error)(f"parameter ${len(parameters) + 1}: {error}") from None
    return parameters


def to_parameter_sets(sets: Sequence[Sequence[object]]) -> list[list[value_pb2.Parameter]]:
    """The parameters of each run of a statement.

    They have one type for all runs where one will do: the statement is then prepared once.

    Raises:
        ProgrammingError: A value's type cannot be sent; the message names the parameter.
        DataError: PostgreSQL has no such value.
    """
    made = [to_parameters(values) for values in sets]
    for column in zip_longest(*made):
        typed = [each for each in column if each and (each.type or each.value.HasField("null_value"))]
        types = {parameter.type for parameter in typed if parameter.type}
        if types and types.issubset(_INT_TYPES):
            types = {max(types, key=_INT_TYPES.index)}
        if len(types) == 1:
            (type_name,) = types
            for parameter in typed:
                parameter.type = type_name
    return made


def to_parameter(value: object) -> value_pb2.Parameter:
    """The parameter that a value makes.

    Raises:
        ProgrammingError: Its type cannot be sent.
        DataError: PostgreSQL has no such value.
    """
    try:
        encoded, type_name = _encoder(type(value))(value)
    except ValueError:
        # Lone surrogates and integers of more digits than Python prints. The value itself is not for messages.
        raise DataError(f"a value of type {type(value).__name__} has no text form in UTF-8") from None
    except RecursionError:
        raise ProgrammingError(f"a value of type {type(value).__name__} is nested too deep, or in itself") from None
    return value_pb2.Parameter(value=encoded, type=type_name)


_Encoded = tuple[value_pb2.Value, str]
_Encoder = Callable[[Any], _Encoded]


def _encoder(kind: type) -> _Encoder:
    encoder = _ENCODERS.get(kind)
    if encoder is None:
        encoder = next((_ENCODERS[base] for base in kind.__mro__ if base in _ENCODERS), None)
        if encoder is None:
            raise ProgrammingError(
                f"values of type {kind.__module__}.{kind.__qualname__} cannot be sent: give a list for an array, "
                "Json or Jsonb for JSON, and PostgreSQL's text form for any other type"
            )
        _ENCODERS[kind] = encoder
    return encoder


def _text(text: str, type_name: str = "") -> _Encoded:
    if "\0" in text:
        raise DataError("text with a NUL character cannot be stored: PostgreSQL's text has none")
    return value_pb2.Value(string_value=text), type_name


def _printed(type_name: str) -> _Encoder:
    return lambda value: (value_pb2.Value(string_value=str(value)), type_name)


def _int(value: int) -> _Encoded:
    if -(2**63) <= value < 2**63:
        return value_pb2.Value(int_value=value), _int_type(value)
    return value_pb2.Value(string_value=str(int(value))), "numeric"


def _int_type(value: int) -> str:
    magnitude = value if value >= 0 else ~value
    return "int2" if magnitude < 2**15 else "int4" if magnitude < 2**31 else "int8"


def _decimal(value: Decimal) -> _Encoded:
    return value_pb2.Value(string_value="NaN" if value.is_nan() else str(value)), "numeric"


def _time(value: time) -> _Encoded:
    if value.tzinfo and value.utcoffset() is None:
        raise DataError("a time whose zone has an offset on some day only cannot be sent: give it a fixed offset")
    return value_pb2.Value(string_value=value.isoformat()), "timetz" if value.tzinfo else "time"


def _datetime(value: datetime) -> _Encoded:
    return value_pb2.Value(string_value=str(value)), "timestamptz" if value.tzinfo else "timestamp"


def _timedelta(value: timedelta) -> _Encoded:
    text = f"{value.days} day {value.seconds}.{value.microseconds:06} second"
    return value_pb2.Value(string_value=text), "interval"


def _json(type_name: str) -> _Encoder:
    return lambda value: _text(_json_text(value.value), type_name)


def _json_text(value: object) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        # These messages name types, and no values.
        raise ProgrammingError(
            f"JSON cannot hold it: {error}; give dict, list, str, int, float, bool and None"
        ) from None


_INT_TYPES = ("int2", "int4", "int8", "numeric")


def _list(values: list[Any]) -> _Encoded:
    """An array; one without any values, or of text, is of the type that PostgreSQL infers."""
    types: set[str] = set()
    encoded = value_pb2.Value(list_value=_list_value(values, types))
    if types and types.issubset(_INT_TYPES):
        types = {max(types, key=_INT_TYPES.index)}
    if len(types) > 1:
        found = ", ".join(sorted(name or "text" for name in types))
        raise DataError(f"a list cannot mix types, this one has {found}: give its values one type")
    element = next(iter(types), "")
    return encoded, f"{element}[]" if element else ""


def _list_value(values: list[Any], types: set[str]) -> value_pb2.ListValue:
    encoded = value_pb2.ListValue()
    for value in values:
        if isinstance(value, list):
            encoded.values.append(value_pb2.Value(list_value=_list_value(value, types)))
            continue
        element, type_name = _encoder(type(value))(value)
        encoded.values.append(element)
        if value is not None:
            types.add(type_name)
    return encoded


_RANGE_TYPES = {"numeric": "num", "date": "date", "timestamp": "ts", "timestamptz": "tstz"}


def _range(value: Range[Any]) -> _Encoded:
    text, element = _range_text(value)
    return _text(text, f"{element}range" if element else "")


def _multirange(value: Multirange[Any]) -> _Encoded:
    parts = [_range_text(part) for part in value]
    element = next((element for _, element in parts if element), "")
    return _text(f"{{{','.join(text for text, _ in parts)}}}", f"{element}multirange" if element else "")


def _range_text(value: Range[Any]) -> tuple[str, str]:
    """A range's text and the beginning of its type's name; empty for those of integers, where several would do."""
    if value.empty:
        return "empty", ""
    texts, element = [], ""
    for bound in (value.lower, value.upper):
        if bound is None:
            texts.append("")
            continue
        encoded, type_name = _encoder(type(bound))(bound)
        kind = encoded.WhichOneof("kind")
        if kind not in ("string_value", "int_value", "double_value"):
            raise ProgrammingError(f"a range of {type(bound).__name__} cannot be sent: give its text, with a cast")
        text = str(getattr(encoded, kind))
        texts.append('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')
        element = _RANGE_TYPES.get(type_name, "")
    return f"{value.bounds[0]}{texts[0]},{texts[1]}{value.bounds[1]}", element


_ENCODERS: dict[type, _Encoder] = {
    type(None): lambda _: (value_pb2.Value(null_value="NULL_VALUE"), ""),
    bool: lambda value: (value_pb2.Value(bool_value=value), "bool"),
    int: _int,
    float: lambda value: (value_pb2.Value(double_value=value), "float8"),
    str: _text,
    bytes: lambda value: (value_pb2.Value(bytes_value=value), "bytea"),
    bytearray: lambda value: (value_pb2.Value(bytes_value=bytes(value)), "bytea"),
    memoryview: lambda value: (value_pb2.Value(bytes_value=bytes(value)), "bytea"),
    Decimal: _decimal,
    UUID: _printed("uuid"),
    date: _printed("date"),
    time: _time,
    datetime: _datetime,
    timedelta: _timedelta,
    Enum: lambda value: _text(value.name),
    dict: lambda value: _text(_json_text(value)),
    Json: _json("json"),
    Jsonb: _json("jsonb"),
    list: _list,
    Range: _range,
    Multirange: _multirange,
    ipaddress.IPv4Address: _printed("inet"),
    ipaddress.IPv6Address: _printed("inet"),
    ipaddress.IPv4Interface: _printed("inet"),
    ipaddress.IPv6Interface: _printed("inet"),
    ipaddress.IPv4Network: _printed("cidr"),
    ipaddress.IPv6Network: _printed("cidr"),
}


Row = tuple[Any, ...]


def row_decoder(
    columns: Sequence[value_pb2.Column], packed: bool, loaders: Loaders | None = None
) -> Callable[[Any], list[Row]]:
    """What makes tuples of a result's rows: of packed rows, or of `Row` messages.

    The decoder raises `DataError` for a value that is outside of Python's range, such as the date "infinity".
    """
    if packed:
        return _packed_decoder([_wire_loader(column, loaders or {}) for column in columns])
    return _values_decoder([_text_loader(column, loaders or {}) for column in columns])


def _packed_decoder(loads: list[Callable[[bytes], Any]]) -> Callable[[bytes], list[Row]]:
    length_at = struct.Struct(">i").unpack_from

    def decode(data: bytes) -> list[Row]:
        rows, offset, end = [], 0, len(data)
        while offset < end:
            row: list[Any] = []
            for load in loads:
                (length,) = length_at(data, offset)
                offset += 4
                if length < 0:
                    row.append(None)
                else:
                    row.append(load(data[offset : offset + length]))
                    offset += length
            rows.append(tuple(row))
        return rows

    return decode


def _values_decoder(loads: list[Callable[[Any], Any]]) -> Callable[[Sequence[value_pb2.Row]], list[Row]]:
    def decode(rows: Sequence[value_pb2.Row]) -> list[Row]:
        return [tuple(_of_value(value, load) for value, load in zip(row.values, loads, strict=True)) for row in rows]

    return decode


def _of_value(value: value_pb2.Value, load: Callable[[Any], Any]) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "null_value":
        return None
    if kind == "list_value":
        return [_of_value(element, load) for element in value.list_value.values]
    return load(getattr(value, str(kind)))


def _is_array(column: value_pb2.Column) -> bool:
    return column.type_name.startswith("_")


def _element_name(column: value_pb2.Column) -> str:
    return column.type_name.removeprefix("_")


def _text_loader(column: value_pb2.Column, loaders: Loaders) -> Callable[[Any], Any]:
    """What makes a value of a value's own kind; of an array's element where it is one."""
    name = _element_name(column)
    if name in loaders:
        return loaders[name]
    return _TEXT.get(name, _as_it_is) if column.type_oid < _NOT_BUILT_IN else _as_it_is


def _wire_loader(column: value_pb2.Column, loaders: Loaders) -> Callable[[bytes], Any]:
    """What makes a value of a packed value's bytes."""
    name = _element_name(column)
    load = _text_loader(column, loaders)
    if column.wire_format == value_pb2.WIRE_FORMAT_TEXT:
        if _is_array(column):
            delimiter = _DELIMITERS.get(name, ",")
            return lambda data: _array_of_text(data.decode(), delimiter, load)
        return bytes.decode if load is _as_it_is else lambda data: load(data.decode())
    if name in loaders:
        binary = _jsonb_text(load) if name == "jsonb" else lambda data: load(data.decode())
    else:
        binary = _BINARY.get(name, bytes.decode) if column.type_oid < _NOT_BUILT_IN else bytes.decode
    return (lambda data: _array_of_binary(data, binary)) if _is_array(column) else binary


def _as_it_is(value: T) -> T:
    return value


# Where the elements of an array's text are not set apart by a comma.
_DELIMITERS = {"box": ";", "geometry": ":", "geography": ":"}

_QUOTED = r'"(?:[^"\\]|\\.)*"'


def _array_of_text(text: str, delimiter: str, load: Callable[[str], Any]) -> Any:
    """An array's text form: ``{a,"b c",NULL}``, with its lower bounds before an equals sign where they are not 1."""
    if not text.startswith(("{", "[")):
        # A type that only has the name of an array.
        return load(text)
    if text.startswith("["):
        text = text[text.index("=") + 1 :]
    tokens = re.finditer(rf"{_QUOTED}|[{{}}]|[^{re.escape(delimiter)}{{}}]+", text)
    next(tokens)
    return _elements_of_text(tokens, load)


def _elements_of_text(tokens: Iterator[re.Match[str]], load: Callable[[str], Any]) -> list[Any]:
    elements: list[Any] = []
    for match in tokens:
        token = match.group()
        if token == "}":
            break
        if token == "{":
            elements.append(_elements_of_text(tokens, load))
        elif token.startswith('"'):
            elements.append(load(re.sub(r"\\(.)", r"\1", token[1:-1], flags=re.DOTALL)))
        else:
            elements.append(None if token == "NULL" else load(token))
    return elements


def _array_of_binary(data: bytes, load: Callable[[bytes], Any]) -> Any:
    """An array's binary form: dimensions, flags, element type, then length and lower bound of each dimension."""
    if data[:3] != b"\0\0\0":
        # No count of dimensions: the text of an enum that only has the name of an array.
        return load(data)
    (dimensions,) = struct.unpack_from(">i", data)
    lengths = [struct.unpack_from(">i", data, 12 + 8 * dimension)[0] for dimension in range(dimensions)]
    offset = 12 + 8 * dimensions

    def elements(lengths: list[int]) -> list[Any]:
        nonlocal offset
        if len(lengths) > 1:
            return [elements(lengths[1:]) for _ in range(lengths[0])]
        found: list[Any] = []
        for _ in range(lengths[0]):
            (length,) = struct.unpack_from(">i", data, offset)
            offset += 4
            found.append(None if length < 0 else load(data[offset : offset + length]))
            offset += max(length, 0)
        return found

    return elements(lengths) if lengths else []


def _signed(data: bytes) -> int:
    return int.from_bytes(data, "big", signed=True)


def _float4(data: bytes) -> float:
    return _shortest_float4(struct.unpack(">f", data)[0])


def _shortest_float4(value: float) -> float:
    """The number that a float4 prints as: 0.1, where the four bytes say 0.10000000149011612."""
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((candidate for candidate in candidates if c_float(candidate).value == value), value)


_NUMERIC_SIGNS = {0x0000: "", 0x4000: "-"}
_NUMERIC_SPECIAL = {0xC000: Decimal("NaN"), 0xD000: Decimal("Infinity"), 0xF000: Decimal("-Infinity")}


def _numeric(data: bytes) -> Decimal:
    """Digits to the base of 10,000, the first of them times 10,000 to the power of the weight."""
    count, weight, sign, scale = struct.unpack_from(">HhHH", data)
    if sign in _NUMERIC_SPECIAL:
        return _NUMERIC_SPECIAL[sign]
    digits = "".join(f"{digit:04}" for digit in struct.unpack_from(f">{count}H", data, 8))
    surplus = 4 * (count - 1 - weight) - scale
    digits = digits[:-surplus] if surplus > 0 else digits + "0" * -surplus
    return Decimal(f"{_NUMERIC_SIGNS[sign]}{digits or '0'}E-{scale}")


_EPOCH = datetime(2000, 1, 1)
_EPOCH_UTC = _EPOCH.replace(tzinfo=timezone.utc)
_EPOCH_ORDINAL = date(2000, 1, 1).toordinal()


def _outside(what: str) -> DataError:
    return DataError(f"a {what} is outside of Python's range: cast it to text in the statement")


def _date(data: bytes) -> date:
    try:
        return date.fromordinal(_EPOCH_ORDINAL + _signed(data))
    except (ValueError, OverflowError):
        raise _outside("date") from None


def _time_of(microseconds: int, zone: timezone | None = None) -> time:
    seconds, microsecond = divmod(microseconds, 1_000_000)
    minutes, second = divmod(seconds, 60)
    hour, minute = divmod(minutes, 60)
    if hour > 23:
        raise _outside("time (24:00)")
    return time(hour, minute, second, microsecond, zone)


def _timetz(data: bytes) -> time:
    microseconds, seconds_west = struct.unpack(">qi", data)
    return _time_of(microseconds, timezone(timedelta(seconds=-seconds_west)))


def _timestamp(data: bytes) -> datetime:
    try:
        return _EPOCH + timedelta(microseconds=_signed(data))
    except OverflowError:
        raise _outside("timestamp") from None


def _timestamptz(data: bytes) -> datetime:
    try:
        return _EPOCH_UTC + timedelta(microseconds=_signed(data))
    except OverflowError:
        raise _outside("timestamptz") from None


def _interval(data: bytes) -> timedelta:
    microseconds, days, months = struct.unpack(">qii", data)
    return _timedelta_of(months, days, microseconds)


def _timedelta_of(months: int, days: int, microseconds: int) -> timedelta:
    """A month counts as 30 days and a year as 365, as psycopg counts them."""
    years, months = divmod(months, 12) if months >= 0 else (-(-months // 12), -(-months % 12))
    try:
        return timedelta(days=days + 365 * years + 30 * months, microseconds=microseconds)
    except OverflowError:
        raise _outside("interval") from None


def _jsonb_text(load: Callable[[str], Any]) -> Callable[[bytes], Any]:
    """The binary form is a version byte and the text."""
    return lambda data: load(data[1:].decode())


_BINARY: dict[str, Callable[[bytes], Any]] = {
    "bool": lambda data: data != b"\0",
    "bytea": _as_it_is,
    "int2": _signed,
    "int4": _signed,
    "int8": _signed,
    "oid": lambda data: int.from_bytes(data, "big"),
    "float4": _float4,
    "float8": lambda data: struct.unpack(">d", data)[0],
    "numeric": _numeric,
    "date": _date,
    "time": lambda data: _time_of(_signed(data)),
    "timetz": _timetz,
    "timestamp": _timestamp,
    "timestamptz": _timestamptz,
    "interval": _interval,
    "uuid": lambda data: UUID(bytes=data),
    "json": json.loads,
    "jsonb": _jsonb_text(json.loads),
}

_ISO = re.compile(
    r"(\d{4,})-(\d\d)-(\d\d)(?: (\d\d):(\d\d):(\d\d)(?:\.(\d{1,6}))?)?(?:([+-])(\d\d)(?::(\d\d))?(?::(\d\d))?)?"
)


def _zone_of(sign: str, hours: str, minutes: str | None, seconds: str | None) -> timezone:
    offset = timedelta(hours=int(hours), minutes=int(minutes or 0), seconds=int(seconds or 0))
    return timezone(-offset if sign == "-" else offset)


def _datetime_of_text(text: str) -> datetime:
    """What PostgreSQL prints for a timestamp, in UTC where it has an offset."""
    match = _ISO.fullmatch(text)
    if match is None:
        raise _outside("timestamp")
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    fraction, sign, *offset = match.groups()[6:]
    try:
        made = datetime(year, month, day, hour, minute, second, int((fraction or "").ljust(6, "0")))
        return made.replace(tzinfo=_zone_of(sign, *offset)).astimezone(timezone.utc) if sign else made
    except (ValueError, OverflowError):
        raise _outside("timestamp") from None


def _date_of_text(text: str) -> date:
    return _datetime_of_text(text).date()


_CLOCK = re.compile(r"([+-]?)(\d+):(\d\d):(\d\d)(?:\.(\d{1,6}))?")


def _microseconds_of(match: re.Match[str]) -> int:
    sign, hours, minutes, seconds, fraction = match.groups()
    whole = (int(hours) * 60 + int(minutes)) * 60 + int(seconds)
    microseconds = whole * 1_000_000 + int((fraction or "").ljust(6, "0"))
    return -microseconds if sign == "-" else microseconds


_TIME = re.compile(r"([\d:.]+)(?:([+-])(\d\d)(?::(\d\d))?(?::(\d\d))?)?")


def _time_of_text(text: str) -> time:
    match = _TIME.fullmatch(text)
    clock = match and _CLOCK.fullmatch(match[1])
    if match is None or clock is None:
        raise _outside("time")
    _, sign, *offset = match.groups()
    return _time_of(_microseconds_of(clock), _zone_of(sign, *offset) if sign else None)


_INTERVAL = re.compile(r"(?:([+-]?\d+) years? ?)?(?:([+-]?\d+) mons? ?)?(?:([+-]?\d+) days? ?)?(.*)")


def _interval_of_text(text: str) -> timedelta:
    match = _INTERVAL.fullmatch(text)
    clock = match and _CLOCK.fullmatch(match[4] or "00:00:00")
    if match is None or clock is None:
        raise _outside("interval")
    years, months, days = (int(part or 0) for part in match.groups()[:3])
    return _timedelta_of(12 * years + months, days, _microseconds_of(clock))


def _inet(text: str) -> Any:
    return ipaddress.ip_interface(text) if "/" in text else ipaddress.ip_address(text)


def _vector(text: str) -> list[int]:
    return [int(number) for number in text.split()]


_RANGE = re.compile(rf"([\[(])({_QUOTED}|[^,]*),({_QUOTED}|[^\])]*)([\])])")


def _range_of(load: Callable[[str], Any]) -> Callable[[str], Range[Any]]:
    def bound(text: str) -> Any:
        return load(text.strip('"')) if text else None

    def read(text: str) -> Range[Any]:
        if text == "empty":
            return Range(empty=True)
        match = _RANGE.fullmatch(text)
        if match is None:
            raise _outside("range")
        return Range(bound(match[2]), bound(match[3]), bounds=cast(Bounds, match[1] + match[4]))

    return read


def _multirange_of(load: Callable[[str], Any]) -> Callable[[str], Multirange[Any]]:
    read = _range_of(load)
    return lambda text: Multirange(read(match.group()) for match in _RANGE.finditer(text))


_TEXT: dict[str, Callable[[Any], Any]] = {
    "float4": _shortest_float4,
    "numeric": Decimal,
    "date": _date_of_text,
    "time": _time_of_text,
    "timetz": _time_of_text,
    "timestamp": _datetime_of_text,
    "timestamptz": _datetime_of_text,
    "interval": _interval_of_text,
    "uuid": UUID,
    "json": json.loads,
    "jsonb": json.loads,
    "inet": _inet,
    "cidr": ipaddress.ip_network,
    "int2vector": _vector,
    "oidvector": _vector,
}

_BOUNDS: dict[str, Callable[[str], Any]] = {
    "int4": int,
    "int8": int,
    "num": Decimal,
    "date": _date_of_text,
    "ts": _datetime_of_text,
    "tstz": _datetime_of_text,
}
for _prefix, _load in _BOUNDS.items():
    _TEXT[f"{_prefix}range"] = _range_of(_load)
    _TEXT[f"{_prefix}multirange"] = _multirange_of(_load)
