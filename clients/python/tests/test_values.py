"""Values both ways through a broker and PostgreSQL, and what psycopg makes of the same."""

from __future__ import annotations

import enum
import ipaddress
import json
import random
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, cast
from uuid import UUID
from zoneinfo import ZoneInfo

import psycopg
import pytest
from conftest import Server
from psycopg.types.multirange import Multirange as PsycopgMultirange
from psycopg.types.range import Range as PsycopgRange

import session_broker
from session_broker import DataError, Json, Jsonb, Multirange, ProgrammingError, Range, values
from session_broker.values import Bounds
from sessionbroker.v1 import value_pb2


@pytest.fixture
def session(shared: session_broker.Session) -> Iterator[session_broker.Session]:
    yield shared
    shared.rollback()


@pytest.fixture(scope="module")
def shared(server: Server) -> Iterator[session_broker.Session]:
    with server.postgres.connect() as witness:
        witness.execute("CREATE EXTENSION IF NOT EXISTS hstore; CREATE EXTENSION IF NOT EXISTS citext")
        witness.execute("CREATE TYPE mood AS ENUM ('sad', 'so so', 'happy, really')")
        witness.execute("CREATE TYPE _odd AS ENUM ('plain', '{braced}')")
        witness.execute("CREATE DOMAIN cents AS numeric(12, 2)")
    with session_broker.connect(server.target) as broker, broker.session() as session:
        yield session


@pytest.fixture(scope="module")
def psycopg_connection(server: Server) -> Iterator[psycopg.Connection]:
    with psycopg.connect(server.postgres.url()) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        yield connection


Query = Callable[[str], Any]


@pytest.fixture(params=["packed", "values"])
def query(request: pytest.FixtureRequest, session: session_broker.Session) -> Query:
    """The value of an expression, as Execute returns it packed and as ExecuteBatch returns it in messages."""

    def ask(expression: str) -> Any:
        sql = f"SELECT {expression}"
        return (session.execute(sql) if request.param == "packed" else session.batch([(sql, ())])[0]).scalar()

    return ask


def of_psycopg(value: Any) -> Any:
    """What psycopg loads, in this package's classes."""
    if isinstance(value, PsycopgRange):
        if value.isempty:
            return Range(empty=True)
        return Range(value.lower, value.upper, bounds=cast("Bounds", value.bounds))
    if isinstance(value, PsycopgMultirange):
        return Multirange(of_psycopg(part) for part in value)
    if isinstance(value, list):
        return [of_psycopg(element) for element in value]
    return value


AS_PSYCOPG = [
    *("true", "false", "NULL", "'x'::text", "''::text", "'né🙂'::varchar", "'a'::bpchar(3)", "'n'::name"),
    "'c'::\"char\"",
    *("1::int2", "'-32768'::int2", "2147483647::int4", "'-9223372036854775808'::int8", "4294967295::oid"),
    *("0.1::float4", "3.4028235e38::float4", "1e-45::float4", "'-Infinity'::float4", "16777216::float4"),
    *("0.1::float8", "1e300::float8", "'Infinity'::float8", "-0.0::float8"),
    *("0::numeric", "0.00::numeric", "1.50::numeric", "-0.000123::numeric", "12345678901234567890.123456789::numeric"),
    *("10000::numeric", "100000000::numeric", "1e30::numeric", "1e-30::numeric", "'Infinity'::numeric"),
    "9999.9999::numeric",
    *("'\\x00ff'::bytea", "''::bytea"),
    *("'2026-11-22'::date", "'0001-01-01'::date", "'9999-12-31'::date"),
    *("'10:00:00.5'::time", "'23:59:59.999999'::time", "'10:00+05:30'::timetz", "'10:00:01-00:00:30'::timetz"),
    *("'2026-11-22 10:00:00.000001'::timestamp", "'1999-12-31 23:59:59.5'::timestamp", "'0001-01-01'::timestamp"),
    *("'2026-11-22 10:00:00.5+05'::timestamptz", "'9999-12-31 23:59:59+00'::timestamptz"),
    *("'1 mon 2 days 03:04:05.6'::interval", "'-1 year -2 mons +3 days -04:05:06.789'::interval", "'0'::interval"),
    *("'14 mons'::interval", "'-14 mons'::interval", "'-00:00:00.000001'::interval", "'100:00:00'::interval"),
    "'00112233-4455-6677-8899-aabbccddeeff'::uuid",
    *("'{\"a\": [1, 2.5, null]}'::json", "'{\"é\": \"x\"}'::jsonb", "'1'::jsonb", "'null'::json", "'\"s\"'::jsonb"),
    *("'10.0.0.1'::inet", "'10.0.0.1/8'::inet", "'::1'::inet", "'10.0.0.0/8'::cidr", "'fe80::/10'::cidr"),
    *("'08:00:2b:01:02:03'::macaddr", "B'101'", "'1.5'::money", "'<a/>'::xml", "'a b'::tsvector", "point(1, 2)"),
    *("'[1,5)'::int4range", "'(,5)'::int4range", "'empty'::int8range", "'(1.5,2]'::numrange", "'(,)'::numrange"),
    *("'[2026-01-01,2026-02-01)'::daterange", "'[2026-01-01 10:00:00.5,)'::tsrange"),
    "'[2026-01-01 10:00+05,2026-01-02 00:00+00]'::tstzrange",
    *("'{[1,3),[5,7)}'::int4multirange", "'{}'::nummultirange", "'{(,2026-01-01),[2026-02-01,)}'::datemultirange"),
    *("'{1,NULL,3}'::int4[]", "'{}'::int4[]", "'{{1,2},{3,4}}'::int8[]", "'[0:1]={1,2}'::int2[]"),
    "'[2:2][3:4]={{5,6}}'::int4[]",
    *("ARRAY['a', 'b,c', 'd\"e', 'f\\g', NULL, 'NULL', '', '{}']::text[]", "ARRAY[['a'], ['b c']]::varchar[]"),
    *("ARRAY[1.5, NULL]::numeric[]", "ARRAY[true, false]", "ARRAY['\\x00ff'::bytea]"),
    "ARRAY['2026-01-01'::date, NULL]",
    *("ARRAY['10.0.0.1'::inet, NULL, '10.0.0.0/8']", "ARRAY['[1,5)'::int4range, 'empty']", "ARRAY['1 day'::interval]"),
    *("ARRAY['{\"a\": 1}'::jsonb, '[1, 2]']", "ARRAY['[2026-01-01 10:00,)'::tsrange]", "ARRAY[0.1::float4]"),
    *("1.5::cents", "'happy, really'::mood"),
]  # fmt: skip


@pytest.mark.parametrize("expression", AS_PSYCOPG)
def test_results_are_as_psycopg_loads_them(
    expression: str, query: Query, psycopg_connection: psycopg.Connection
) -> None:
    row = psycopg_connection.execute(f"SELECT {expression}".encode()).fetchone()
    assert row is not None
    expected = of_psycopg(row[0])

    found = query(expression)

    assert found == expected
    assert type(found) is type(expected)
    assert str(found) == str(expected) or isinstance(expected, datetime | Range | Multirange | list)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("'NaN'::float8", "nan"),
        ("'NaN'::float4", "nan"),
        ("'NaN'::numeric", "NaN"),
    ],
)
def test_not_a_number_is_none(expression: str, expected: str, query: Query) -> None:
    assert str(query(expression)) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("ARRAY['sad', 'happy, really', NULL]::mood[]", ["sad", "happy, really", None]),
        ("ARRAY[1.5, 2, NULL]::cents[]", ["1.50", "2.00", None]),
        ("ARRAY[[1.5], [2]]::cents[]", [["1.50"], ["2.00"]]),
        ("'plain'::_odd", "plain"),
        ("ARRAY['plain', '{braced}']::_odd[]", ["plain", "{braced}"]),
        ("ARRAY['(1,2),(0,0)'::box, '(3,4),(0,0)']", ["(1,2),(0,0)", "(3,4),(0,0)"]),
        ("'a=>1, b=>NULL'::hstore", '"a"=>"1", "b"=>NULL'),
        ("ARRAY['a=>1'::hstore]", ['"a"=>"1"']),
        ("ARRAY['A'::citext, NULL]", ["A", None]),
        ("ROW(1, 'a b')", '(1,"a b")'),
        ("'1 2'::int2vector", [1, 2]),
        ("'2026-11-22 10:00:00+00'::timestamptz", datetime(2026, 11, 22, 10, tzinfo=timezone.utc)),
    ],
)
def test_what_psycopg_leaves_as_text_where_more_is_known(expression: str, expected: object, query: Query) -> None:
    found = query(expression)

    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "expression",
    [
        *("'infinity'::date", "'0044-03-15 BC'::date", "'10000-01-01'::date", "'-infinity'::timestamp"),
        *("'infinity'::timestamptz", "'10000-01-01'::timestamptz", "'24:00'::time", "'24:00+00'::timetz"),
        *("'1000000000 days'::interval", "'-90000000 years'::interval", "'[2026-01-01,infinity]'::daterange"),
    ],
)
def test_what_python_cannot_hold_is_a_data_error(expression: str, session: session_broker.Session) -> None:
    with pytest.raises(DataError, match="cast it to text"):
        session.execute(f"SELECT {expression}")

    assert session.execute(f"SELECT ({expression})::text").scalar()


def test_a_day_of_24_hours_in_text_is_a_data_error(session: session_broker.Session) -> None:
    with pytest.raises(DataError, match="cast it to text"):
        session.batch([("SELECT '24:00'::time", ())])


class Color(enum.Enum):
    RED = 1


class Loud(str, enum.Enum):
    YES = "yes!"


class Level(enum.IntEnum):
    HIGH = 3


UTC = timezone.utc
BERLIN = timezone(timedelta(hours=1))

# A value, the type that PostgreSQL is told, and what it makes of it.
PARAMETERS: list[tuple[object, str, str]] = [
    (True, "boolean", "true"),
    (1, "smallint", "1"),
    (-32768, "smallint", "-32768"),
    (32768, "integer", "32768"),
    (-(2**31), "integer", "-2147483648"),
    (2**31, "bigint", "2147483648"),
    (-(2**63), "bigint", "-9223372036854775808"),
    (2**63, "numeric", "9223372036854775808"),
    (Level.HIGH, "smallint", "3"),
    (0.1, "double precision", "0.1"),
    (float("-inf"), "double precision", "-Infinity"),
    (float("nan"), "double precision", "NaN"),
    (Decimal("1.50"), "numeric", "1.50"),
    (Decimal("1E+5"), "numeric", "100000"),
    (Decimal("sNaN"), "numeric", "NaN"),
    (b"\0\xff", "bytea", "\\x00ff"),
    (bytearray(b"a"), "bytea", "\\x61"),
    (memoryview(b"abcd")[::2], "bytea", "\\x6163"),
    (UUID(int=1), "uuid", "00000000-0000-0000-0000-000000000001"),
    (date(1, 1, 1), "date", "0001-01-01"),
    (time(10, 0, 0, 5), "time without time zone", "10:00:00.000005"),
    (time(10, tzinfo=BERLIN), "time with time zone", "10:00:00+01"),
    (datetime(1, 1, 1), "timestamp without time zone", "0001-01-01 00:00:00"),
    (datetime(2026, 11, 22, 10, tzinfo=BERLIN), "timestamp with time zone", "2026-11-22 09:00:00+00"),
    (timedelta(days=-1, seconds=5, microseconds=7), "interval", "-1 days +00:00:05.000007"),
    (timedelta.max, "interval", "999999999 days 23:59:59.999999"),
    (Json({"a": [1, None]}), "json", '{"a": [1, null]}'),
    (Jsonb("x"), "jsonb", '"x"'),
    ([1, 70000, None], "integer[]", "{1,70000,NULL}"),
    ([1, 2**70], "numeric[]", "{1,1180591620717411303424}"),
    ([[1, 2], [3, 4]], "smallint[]", "{{1,2},{3,4}}"),
    ([Decimal("1.5")], "numeric[]", "{1.5}"),
    ([b"\xff", b""], "bytea[]", '{"\\\\xff","\\\\x"}'),
    ([date(2026, 1, 1), None], "date[]", "{2026-01-01,NULL}"),
    ([Jsonb([1])], "jsonb[]", "{[1]}"),
    (Range(Decimal(1), None), "numrange", "[1,)"),
    (Range(date(2026, 1, 1), date(2026, 2, 1), bounds="(]"), "daterange", "[2026-01-02,2026-02-02)"),
    (Range(datetime(2026, 1, 1)), "tsrange", '["2026-01-01 00:00:00",)'),
    (Range(datetime(2026, 1, 1, tzinfo=UTC)), "tstzrange", '["2026-01-01 00:00:00+00",)'),
    (Multirange([Range(date(2026, 1, 1), None)]), "datemultirange", "{[2026-01-01,)}"),
    ([Range(Decimal(1), Decimal(2))], "numrange[]", '{"[1,2)"}'),
    (ipaddress.ip_address("10.0.0.1"), "inet", "10.0.0.1/32"),
    (ipaddress.ip_interface("10.0.0.1/8"), "inet", "10.0.0.1/8"),
    (ipaddress.ip_network("fe80::/10"), "cidr", "fe80::/10"),
]


@pytest.mark.parametrize(("value", "type_name", "text"), PARAMETERS, ids=lambda value: repr(value)[:40])
def test_a_parameter_has_the_type_that_psycopg_gives_it(
    value: object, type_name: str, text: str, session: session_broker.Session
) -> None:
    row = session.execute("SELECT pg_typeof($1)::text, $1::text", [value]).one()

    assert row == (type_name, text)


@pytest.mark.parametrize(
    ("value", "cast", "text"),
    [
        (None, "int4", None),
        ("5", "int4", "5"),
        ("a", "text", "a"),
        (["sad", None], "mood[]", "{sad,NULL}"),
        ([], "int4[]", "{}"),
        ([None], "int4[]", "{NULL}"),
        ([["a", "b"]], "text[]", "{{a,b}}"),
        ({"a": 1, "b": None}, "json", '{"a": 1, "b": null}'),
        ({"a": 1}, "jsonb", '{"a": 1}'),
        (Color.RED, "text", "RED"),
        (Loud.YES, "text", "yes!"),
        (Range(1, 5), "int4range", "[1,5)"),
        (Range(1, 2**40), "int8range", "[1,1099511627776)"),
        (Range(empty=True), "tsrange", "empty"),
        (Range[int](None, None), "int8range", "(,)"),
        (Range('a"b', "c\\d"), "text", '["a\\"b","c\\\\d")'),
        (Multirange([Range(1, 3), Range(5, 7)]), "int4multirange", "{[1,3),[5,7)}"),
        (Multirange[int](), "nummultirange", "{}"),
        ([Range(1, 5), None], "int4range[]", '{"[1,5)",NULL}'),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_has_no_type_takes_the_one_that_postgresql_infers(
    value: object, cast: str, text: str | None, session: session_broker.Session
) -> None:
    assert session.execute(f"SELECT ($1::{cast})::text", [value]).scalar() == text


@pytest.mark.parametrize(
    "value", [{1}, (1, 2), object(), 1j, [object()], Range(object(), None), [[{1}]]], ids=lambda value: repr(value)[:20]
)
def test_an_unsupported_type_is_refused_with_its_parameter(value: object, session: session_broker.Session) -> None:
    with pytest.raises(ProgrammingError, match=r"parameter \$2: values of type [\w.]+ cannot be sent"):
        session.execute("SELECT $1::int4, $2", [1, value])

    assert session.execute("SELECT 1").scalar() == 1


NESTED: list[object] = []
NESTED.append(NESTED)
CIRCLE: dict[str, object] = {}
CIRCLE["again"] = CIRCLE


@pytest.mark.parametrize(
    "value",
    [Json({1}), Jsonb({(1, 2): 3}), {"a": object()}, CIRCLE, Json(CIRCLE), NESTED, Range(b"a", b"b"), Range([1], [2])],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_that_cannot_be_written_is_refused_with_its_parameter(
    value: object, session: session_broker.Session
) -> None:
    with pytest.raises(ProgrammingError, match=r"parameter \$2: "):
        session.execute("SELECT $1::int4, $2", [1, value])

    assert session.execute("SELECT 1").scalar() == 1


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300])
def test_a_timeout_without_an_end_is_refused_by_its_name(value: float, session: session_broker.Session) -> None:
    with pytest.raises(ProgrammingError, match=r"timeout is .*: give a finite number of seconds"):
        session.execute("SELECT 1", timeout=value)

    assert session.execute("SELECT 1").scalar() == 1


@pytest.mark.parametrize(
    "value",
    [
        "secret\0",
        "secret\ud800",
        [1, "secret"],
        [1.5, Decimal(1)],
        ["secret\0"],
        10**5000,
        time(1, tzinfo=ZoneInfo("Europe/Berlin")),
    ],
    ids=["nul", "surrogate", "mixed", "numbers", "nul in list", "digits", "time of day in a zone"],
)
def test_a_value_that_postgresql_cannot_have_is_a_data_error_without_the_value(
    value: object, session: session_broker.Session
) -> None:
    with pytest.raises(DataError, match=r"parameter \$1: ") as caught:
        session.execute("SELECT $1", [value])

    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("expression", AS_PSYCOPG)
def test_what_was_read_can_be_written(expression: str, session: session_broker.Session) -> None:
    read = session.execute(f"SELECT {expression}").scalar()
    value = read
    if "json" in expression:
        value = [Jsonb(element) for element in read] if "ARRAY" in expression else Json(read)

    session.execute(f"CREATE TEMPORARY TABLE copies AS SELECT {expression} AS value")
    session.execute("INSERT INTO copies VALUES ($1)", [value])
    both = session.execute("SELECT value FROM copies").rows

    assert both == [(read,), (read,)]


def test_random_numbers_survive_both_ways(session: session_broker.Session) -> None:
    drawn = random.Random(4)
    numbers = []
    for _ in range(500):
        digits = "".join(drawn.choices("0123456789", weights=[6] + [1] * 9, k=drawn.randint(1, 60)))
        numbers.append(Decimal(f"{drawn.choice(['', '-'])}{digits}").scaleb(-drawn.randint(0, 40), None))
    found = session.execute("SELECT n, n::text FROM unnest($1::numeric[]) AS n", [numbers]).rows

    assert [number for number, _ in found] == [Decimal(text) for _, text in found]
    assert [str(number.as_tuple()) for number, _ in found] == [str(Decimal(text).as_tuple()) for _, text in found]


def test_loaders_read_a_types_text_alone_and_in_arrays(server: Server) -> None:
    loaders: dict[str, Callable[[str], Any]] = {
        "json": lambda text: ("json", text),
        "jsonb": lambda text: ("jsonb", text),
        "inet": str,
        "hstore": len,
    }
    sql = (
        "SELECT '[1]'::json, '[1]'::jsonb, ARRAY['[1]'::jsonb, NULL], '10.0.0.1'::inet, ARRAY['10.0.0.1'::inet], "
        "'a=>1'::hstore, NULL::json"
    )
    expected = (("json", "[1]"), ("jsonb", "[1]"), [("jsonb", "[1]"), None], "10.0.0.1", ["10.0.0.1"], 8, None)
    with session_broker.connect(server.target, loaders=loaders) as broker, broker.session() as session:
        assert session.execute(sql).one() == expected
        assert session.batch([(sql, ())])[0].one() == expected


def test_a_loader_of_what_is_no_text_is_refused() -> None:
    with pytest.raises(ProgrammingError, match="'numeric' does not travel as text"):
        values.check_loaders({"json": json.loads, "numeric": str})


def test_a_range_has_known_bounds() -> None:
    with pytest.raises(ProgrammingError, match="bounds"):
        Range(1, 2, bounds="][")  # type: ignore[arg-type]


def test_columns_tell_what_the_broker_tells(session: session_broker.Session) -> None:
    column = session.execute("SELECT 'x'::varchar(10) AS name").columns[0]

    assert (column.name, column.type_oid, column.type_name, column.type_modifier) == ("name", 1043, "varchar", 14)
    assert (column.table_oid, column.column_number) == (0, 0)
    assert values.Column.of(value_pb2.Column(name="n", table_oid=5, column_number=2))[4:] == (5, 2)
