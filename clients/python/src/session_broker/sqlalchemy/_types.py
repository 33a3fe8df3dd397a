"""What SQLAlchemy's types need beside what `PGDialect` gives them.

`session_broker.values` makes Python values of results already. Parameters of text have no type, so those that a
statement may leave ambiguous are cast where they stand, as SQLAlchemy's own drivers do.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

from sqlalchemy import types as sqltypes
from sqlalchemy.dialects.postgresql import ARRAY, CITEXT, INTERVAL, JSON, JSONB, REGCONFIG, ranges
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.dialects.postgresql.json import JSONPathType
from sqlalchemy.engine import processors

from session_broker.values import Multirange, Range

Processor = Callable[[Any], Any]

# float4, float8 and arrays of them.
_FLOATS = (700, 701, 1021, 1022)


class _String(sqltypes.String):
    render_bind_cast = True


class _RegConfig(REGCONFIG):
    render_bind_cast = True


class _Read:
    """JSON is read by `session_broker.values`, or by the loader that `json_deserializer` becomes."""

    def result_processor(self, dialect: Any, coltype: Any) -> None:
        return None


class _Json(_Read, JSON):
    render_bind_cast = True


class _Jsonb(_Read, JSONB):
    render_bind_cast = True


class _JsonIntIndex(sqltypes.JSON.JSONIntIndexType):
    __visit_name__ = "json_int_index"
    render_bind_cast = True


class _JsonStrIndex(sqltypes.JSON.JSONStrIndexType):
    __visit_name__ = "json_str_index"
    render_bind_cast = True


class _Interval(INTERVAL):
    render_bind_cast = True


class _Date(sqltypes.Date):
    render_bind_cast = True


class _DateTime(sqltypes.DateTime):
    render_bind_cast = True


class _Time(sqltypes.Time):
    render_bind_cast = True


class _Integer(sqltypes.Integer):
    render_bind_cast = True


class _SmallInteger(sqltypes.SmallInteger):
    render_bind_cast = True


class _BigInteger(sqltypes.BigInteger):
    render_bind_cast = True


class _Array(ARRAY[Any]):
    render_bind_cast = True


class _Numbers:
    """Numbers that come as `Decimal` or `float`, and are asked for as either."""

    asdecimal: bool
    _effective_decimal_return_scale: int

    def bind_processor(self, dialect: Any) -> None:
        return None

    def result_processor(self, dialect: Any, coltype: Any) -> Processor | None:
        is_float = coltype in _FLOATS
        if self.asdecimal != is_float:
            return None
        made: Processor = processors.to_float
        if is_float:
            made = processors.to_decimal_processor_factory(Decimal, self._effective_decimal_return_scale)
        return made


class _Numeric(_Numbers, sqltypes.Numeric[Any]):
    pass


class _Float(_Numbers, sqltypes.Float[Any]):
    pass


def _range_to_wire(value: Any) -> Any:
    if isinstance(value, ranges.Range):
        return Range(value.lower, value.upper, bounds=value.bounds, empty=value.empty)
    return value


def _range_of_wire(value: Any) -> Any:
    if isinstance(value, Range):
        return ranges.Range(value.lower, value.upper, bounds=value.bounds, empty=value.empty)
    return value


class _Range(ranges.AbstractSingleRangeImpl[Any]):
    def bind_processor(self, dialect: Any) -> Processor:
        return _range_to_wire

    def result_processor(self, dialect: Any, coltype: Any) -> Processor:
        return _range_of_wire


class _Multirange(ranges.AbstractMultiRangeImpl[Any]):
    def bind_processor(self, dialect: Any) -> Processor:
        def to_wire(value: Any) -> Any:
            return value if value is None or isinstance(value, str) else Multirange(map(_range_to_wire, value))

        return to_wire

    def result_processor(self, dialect: Any, coltype: Any) -> Processor:
        def of_wire(value: Any) -> Any:
            return ranges.MultiRange(map(_range_of_wire, value)) if isinstance(value, Multirange) else value

        return of_wire


COLSPECS = {
    **PGDialect.colspecs,
    sqltypes.String: _String,
    # Else a string like any other, cast to VARCHAR, which compares cases.
    CITEXT: CITEXT,
    REGCONFIG: _RegConfig,
    sqltypes.JSON: _Json,
    JSON: _Json,
    JSONB: _Jsonb,
    sqltypes.JSON.JSONPathType: JSONPathType,
    sqltypes.JSON.JSONIntIndexType: _JsonIntIndex,
    sqltypes.JSON.JSONStrIndexType: _JsonStrIndex,
    sqltypes.Interval: _Interval,
    INTERVAL: _Interval,
    sqltypes.Date: _Date,
    sqltypes.DateTime: _DateTime,
    sqltypes.Time: _Time,
    sqltypes.Integer: _Integer,
    sqltypes.SmallInteger: _SmallInteger,
    sqltypes.BigInteger: _BigInteger,
    sqltypes.Numeric: _Numeric,
    sqltypes.Float: _Float,
    sqltypes.ARRAY: _Array,
    ranges.AbstractSingleRange: _Range,
    ranges.AbstractMultiRange: _Multirange,
}
"""What PGDialect's types become."""
