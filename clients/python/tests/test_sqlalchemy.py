"""The SQLAlchemy dialects, beyond what SQLAlchemy's own suite asks: see tests/suite."""

from __future__ import annotations

import asyncio
import enum
import gc
import json
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import Server
from sqlalchemy import exc, orm, pool
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.dialects.postgresql.ranges import MultiRange
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from support import BrokerProcess, Postgres, configuration, wait_until

import session_broker
from session_broker.sqlalchemy._dialect import connect_arguments


@pytest.fixture(scope="module")
def url(server: Server) -> str:
    with server.postgres.connect() as superuser:
        superuser.execute("CREATE EXTENSION IF NOT EXISTS hstore; CREATE EXTENSION IF NOT EXISTS citext")
    return f"postgresql+sessionbroker://{server.target}/main"


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    made = sa.create_engine(url)
    yield made
    made.dispose()


@pytest.fixture
async def async_engine(url: str) -> AsyncIterator[AsyncEngine]:
    made = create_async_engine(url)
    yield made
    await made.dispose()


@pytest.fixture
def numbers(server: Server) -> Iterator[sa.Table]:
    """A table that everyone sees: numbers (id, name)."""
    with server.postgres.connect() as witness:
        witness.execute("CREATE TABLE numbers (id int8 PRIMARY KEY, name text); ALTER TABLE numbers OWNER TO broker")
        yield sa.Table(
            "numbers", sa.MetaData(), sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("name", sa.Text)
        )
        witness.execute("DROP TABLE numbers")


def count(server: Server) -> object:
    return server.postgres.value("SELECT count(*) FROM numbers")


class Mood(enum.Enum):
    SAD = "sad"
    HAPPY = "happy"


VALUES: dict[str, tuple[Any, Any]] = {
    "integer": (sa.Integer, 2**31 - 1),
    "bigint": (sa.BigInteger, -(2**63)),
    "numeric": (sa.Numeric(10, 3), Decimal("-12.500")),
    "numeric_as_float": (sa.Numeric(10, 3, asdecimal=False), 12.5),
    "float": (sa.Float(53), 0.1),
    "double_as_decimal": (sa.Double(asdecimal=True), Decimal("0.1000000000")),
    "text": (sa.Text, "né %s 🙂"),
    "boolean": (sa.Boolean, True),
    "bytes": (sa.LargeBinary, b"\0\xff"),
    "date": (sa.Date, date(2026, 11, 22)),
    "timestamp": (sa.DateTime, datetime(2026, 11, 22, 10, 0, 0, 5)),
    "timestamptz": (sa.DateTime(timezone=True), datetime(2026, 11, 22, 10, tzinfo=timezone.utc)),
    "interval": (sa.Interval, timedelta(days=-3, seconds=5, microseconds=7)),
    "uuid": (sa.Uuid, uuid.UUID(int=5)),
    "uuid_text": (sa.Uuid(as_uuid=False), str(uuid.UUID(int=5))),
    "json": (sa.JSON, {"a": [1, None, "é"]}),
    "json_text": (sa.JSON, "text"),
    "jsonb": (pg.JSONB, [1, {"b": 2.5}]),
    "enum": (sa.Enum(Mood, name="dialect_mood"), Mood.HAPPY),
    "array": (pg.ARRAY(sa.Integer), [1, None, 3]),
    "array_of_text": (pg.ARRAY(sa.Text), ["a", 'b"\\,{}', None, "NULL", ""]),
    "array_of_arrays": (pg.ARRAY(sa.Integer, dimensions=2), [[1, 2], [3, 4]]),
    "array_of_enums": (pg.ARRAY(sa.Enum(Mood, name="dialect_mood")), [Mood.SAD, Mood.HAPPY]),
    "array_of_numeric": (pg.ARRAY(sa.Numeric), [Decimal("1.5"), None]),
    "array_of_dates": (pg.ARRAY(sa.Date), [date(2026, 1, 1)]),
    "array_of_uuids": (pg.ARRAY(sa.Uuid), [uuid.UUID(int=1)]),
    "int4range": (pg.INT4RANGE, pg.Range(1, 5)),
    "empty_range": (pg.INT8RANGE, pg.Range(empty=True)),
    "numrange": (pg.NUMRANGE, pg.Range(Decimal("1.5"), None, bounds="(]")),
    "daterange": (pg.DATERANGE, pg.Range(date(2026, 1, 1), date(2026, 2, 1))),
    "tstzrange": (pg.TSTZRANGE, pg.Range(datetime(2026, 1, 1, tzinfo=timezone.utc), None)),
    "multirange": (pg.INT4MULTIRANGE, MultiRange([pg.Range(1, 3), pg.Range(5, 7)])),
    "array_of_ranges": (pg.ARRAY(pg.INT4RANGE), [pg.Range(1, 3)]),
    "inet": (pg.INET, "10.0.0.1"),
    "hstore": (pg.HSTORE, {"a": "1", "b": None}),
    "citext": (pg.CITEXT, "MiXed"),
    "bit": (pg.BIT(3), None),
}


@pytest.mark.parametrize("dialect", ["sync", "async"])
async def test_every_type_both_ways_with_null(url: str, dialect: str) -> None:
    metadata = sa.MetaData()
    columns = [sa.Column(name, kind) for name, (kind, _) in VALUES.items()]
    table = sa.Table("kinds", metadata, sa.Column("id", sa.Integer, primary_key=True), *columns)
    row = {name: value for name, (_, value) in VALUES.items()}
    nothing = {**dict.fromkeys(VALUES), "json": sa.null(), "json_text": sa.null(), "jsonb": sa.null()}

    def work(connection: sa.Connection) -> None:
        metadata.create_all(connection)
        connection.execute(table.insert(), [{"id": 1, **row}])
        connection.execute(table.insert().values(id=2, **nothing))
        first, second = connection.execute(table.select().order_by(table.c.id)).mappings().all()
        found = {name: str(value) if name == "inet" else value for name, value in first.items()}
        assert found == {"id": 1, **row}
        assert set(second.values()) == {2, None}
        for column in table.c:
            if column.name not in ("json", "json_text", "id", "bit"):
                same = sa.select(sa.func.count()).where(column == row[column.name])
                assert connection.execute(same).scalar() == 1, column.name

    if dialect == "sync":
        with sa.create_engine(url).connect() as connection:
            work(connection)
    else:
        async with create_async_engine(url).connect() as asynchronous:
            await asynchronous.run_sync(work)


def test_what_has_no_table_takes_its_type_from_the_value(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        row = connection.execute(
            sa.text("SELECT :a, :b, :c, :d"), {"a": 5, "b": "x", "c": Decimal("1.5"), "d": [1, 2]}
        ).one()

    assert row == (5, "x", Decimal("1.5"), [1, 2])


def test_percent_signs_and_drivers_own_sql(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT 'a%' LIKE '%\\%%', :x % 3"), {"x": 5}).one() == (True, 2)
        assert connection.exec_driver_sql("SELECT 5 %% %s", (3,)).scalar() == 2
        assert connection.exec_driver_sql("SELECT %(a)s", {"a": 1}).scalar() == 1


def test_serializers_and_deserializers_of_ones_own(url: str) -> None:
    engine = sa.create_engine(
        url,
        json_serializer=lambda value: json.dumps({"wrapped": value}),
        json_deserializer=lambda text: ("loaded", json.loads(text)),
        native_inet_types=False,
    )
    with engine.connect() as connection:
        value = sa.bindparam("value", {"a": 1}, type_=pg.JSONB)
        sql = sa.select(sa.cast(value, pg.JSONB), sa.cast(sa.literal("10.0.0.1"), pg.INET))
        assert connection.execute(sql).one() == (("loaded", {"wrapped": {"a": 1}}), "10.0.0.1")


def test_many_rows_are_inserted_and_returned_in_order(engine: sa.Engine, numbers: sa.Table, server: Server) -> None:
    rows = [{"id": number * 3, "name": None if number % 7 else str(number)} for number in range(3_000)]
    with engine.begin() as connection:
        inserted = connection.execute(numbers.insert().returning(numbers.c.id, sort_by_parameter_order=True), rows)
        assert inserted.scalars().all() == [row["id"] for row in rows]
        updated = connection.execute(
            numbers.update().where(numbers.c.id == sa.bindparam("key")).values(name=sa.bindparam("new")),
            [{"key": 3, "new": "x"}, {"key": 6, "new": None}, {"key": -1, "new": "y"}],
        )
        assert updated.rowcount == 2

    assert count(server) == 3_000


def test_results_stream(engine: sa.Engine, numbers: sa.Table, server: Server) -> None:
    many = sa.select(sa.func.generate_series(1, 30_000))
    with engine.connect() as connection:
        assert sum(connection.execution_options(yield_per=1_000).scalars(many)) == 450_015_000
        result = connection.execution_options(stream_results=True).execute(many)
        assert len(result.fetchmany(10)) == 10
        connection.execute(numbers.insert(), {"id": 1})
        result.close()
        connection.commit()

    assert count(server) == 1


def test_savepoints_nest(engine: sa.Engine, numbers: sa.Table, server: Server) -> None:
    with engine.begin() as connection:
        connection.execute(numbers.insert(), {"id": 1})
        with pytest.raises(exc.IntegrityError), connection.begin_nested():
            connection.execute(numbers.insert(), {"id": 1})
        with connection.begin_nested():
            connection.execute(numbers.insert(), {"id": 2})
            with connection.begin_nested() as inner:
                connection.execute(numbers.insert(), {"id": 3})
                inner.rollback()

    assert server.postgres.value("SELECT array_agg(id ORDER BY id) FROM numbers") == [1, 2]


@pytest.mark.parametrize("level", ["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_isolation_levels_of_connections_and_engines(level: str, url: str, engine: sa.Engine) -> None:
    with engine.connect().execution_options(isolation_level=level) as connection:
        assert connection.exec_driver_sql("SHOW transaction_isolation").scalar() == level.lower()
        assert connection.get_isolation_level() == level
    with sa.create_engine(url, isolation_level=level).connect() as connection:
        assert connection.exec_driver_sql("SHOW transaction_isolation").scalar() == level.lower()
    with engine.connect() as connection:
        assert connection.get_isolation_level() == connection.default_isolation_level == "READ COMMITTED"


def test_autocommit_keeps_each_statement(engine: sa.Engine, numbers: sa.Table, server: Server) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(numbers.insert(), {"id": 1})
        assert count(server) == 1
        with pytest.raises(exc.IntegrityError):
            connection.execute(numbers.insert(), {"id": 1})
        connection.execute(numbers.insert(), {"id": 2})
    assert count(server) == 2
    with engine.connect() as connection:
        connection.execute(numbers.insert(), {"id": 3})
    assert count(server) == 2


def test_read_only_and_deferrable(engine: sa.Engine, numbers: sa.Table) -> None:
    options = {"isolation_level": "SERIALIZABLE", "postgresql_readonly": True, "postgresql_deferrable": True}
    with engine.connect().execution_options(**options) as connection:
        assert connection.exec_driver_sql("SHOW transaction_deferrable").scalar() == "on"
        with pytest.raises(exc.InternalError, match="read-only transaction"):
            connection.execute(numbers.insert(), {"id": 1})
    with engine.begin() as connection:
        connection.execute(numbers.insert(), {"id": 1})


def test_two_phase_transactions_are_refused(engine: sa.Engine) -> None:
    with engine.connect() as connection, pytest.raises(exc.NotSupportedError, match="no two-phase commit"):
        connection.begin_twophase()


@pytest.mark.parametrize(
    ("sql", "kind", "sqlstate"),
    [
        ("SELECT nope", exc.ProgrammingError, "42703"),
        ("SELECT 1/0", exc.DataError, "22012"),
        ("INSERT INTO accounts VALUES (1, 'x', 1)", exc.IntegrityError, "23505"),
        ("SET LOCAL statement_timeout = 1; SELECT 1", exc.ProgrammingError, "42601"),
        ("DO $$BEGIN RAISE SQLSTATE '40001'; END$$", exc.OperationalError, "40001"),
    ],
)
def test_errors_are_sqlalchemys_and_keep_what_postgresql_said(
    sql: str, kind: type[exc.DBAPIError], sqlstate: str, engine: sa.Engine
) -> None:
    with engine.connect() as connection, pytest.raises(kind) as caught:
        connection.exec_driver_sql(sql)

    assert isinstance(caught.value.orig, session_broker.Error)
    assert caught.value.orig.sqlstate == sqlstate
    assert not caught.value.connection_invalidated


def terminate(target: str, admin: str, connection: sa.Connection) -> None:
    """Ends the session of a connection, as its idle limit would."""
    with session_broker.connect(target, credentials=admin) as operator:
        operator.terminate(connection.connection.dbapi_connection.session.info().session_id, "for the test")  # type: ignore[union-attr]


def test_a_session_that_ended_is_a_disconnect(engine: sa.Engine, target: str, admin: str) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        terminate(target, admin, connection)
        with pytest.raises(exc.OperationalError) as caught:
            connection.exec_driver_sql("SELECT 1")
        assert caught.value.connection_invalidated
        assert isinstance(caught.value.orig, session_broker.SessionEnded)
        connection.rollback()
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1


def test_pre_ping_replaces_a_session_that_ended(url: str, target: str, admin: str) -> None:
    engine = sa.create_engine(url, poolclass=pool.QueuePool, pool_size=1, pool_pre_ping=True)
    with engine.connect() as connection:
        first = connection.connection.dbapi_connection
        connection.exec_driver_sql("SELECT 1")
        connection.rollback()
        terminate(target, admin, connection)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
        assert connection.connection.dbapi_connection is not first
        second = connection.connection.dbapi_connection
    with engine.connect() as connection:
        assert connection.connection.dbapi_connection is second
    engine.dispose()


def test_a_broker_that_is_away_is_an_operational_error_and_comes_back(
    start_broker: Callable[[str], BrokerProcess], postgres: Postgres
) -> None:
    broker = start_broker(configuration(postgres))
    engine = sa.create_engine(
        f"postgresql+sessionbroker://{broker.target}", connect_args={"retry": session_broker.Retry(1)}
    )
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        broker.kill()
        with pytest.raises(exc.OperationalError) as caught:
            connection.exec_driver_sql("SELECT 1")
        assert caught.value.connection_invalidated
    with pytest.raises(exc.OperationalError, match="no answer from the broker"):
        engine.connect().exec_driver_sql("SELECT 1")


def test_sessions_share_one_connection_to_the_broker_and_end_with_their_connections(
    engine: sa.Engine, target: str, admin: str
) -> None:
    with session_broker.connect(target, credentials=admin) as operator:
        with engine.connect() as one, engine.connect() as other:
            assert isinstance(engine.pool, pool.NullPool)
            sessions = [connection.connection.dbapi_connection.session for connection in (one, other)]  # type: ignore[union-attr]
            for connection in (one, other):
                connection.exec_driver_sql("SELECT 1")
            ids = {session.info().session_id for session in sessions}
            assert len(ids) == 2
            assert ids <= {session.session_id for session in operator.sessions()}
            engine.dispose()
            assert one.exec_driver_sql("SELECT 1").scalar() == 1
        assert not ids & {session.session_id for session in operator.sessions()}


def test_what_is_shared_shows_no_credential(target: str, admin: str) -> None:
    engine = sa.create_engine(f"postgresql+sessionbroker://:{admin}@{target}/main")
    with engine.connect():
        shared = engine.dialect._shared  # type: ignore[attr-defined]
        assert shared is not None
        assert shared.users == 1
        assert admin not in repr(shared)
    engine.dispose()


FORKS = """
import os, sys
import sqlalchemy as sa

engine = sa.create_engine(sys.argv[1])


def ask():
    with engine.connect() as connection:
        return connection.execute(sa.text("SELECT 7")).scalar()


assert ask() == 7
child = os.fork()
if not child:
    os._exit(ask())
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert ask() == 7
"""


def test_a_forked_process_makes_a_connection_of_its_own(url: str) -> None:
    ended = subprocess.run([sys.executable, "-c", FORKS, url], timeout=60, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("://", {"target": "localhost:50051"}),
        ("://h:5/e", {"target": "h:5", "engine": "e"}),
        ("://[::1]:5/e", {"target": "[::1]:5", "engine": "e"}),
        ("://:t%40ken@h", {"target": "h:50051", "credentials": "t@ken"}),
        (
            "://h?profile=p&read_only=true&lease_ttl=2.5&tls=yes",
            {"target": "h:50051", "profile": "p", "read_only": True, "lease_ttl": 2.5, "tls": True},
        ),
        (
            "://h?application_name=a&search_path=x,%20y&connect_timeout=3",
            {
                "target": "h:50051",
                "connect_options": {"application_name": "a", "search_path": ["x", "y"], "connect_timeout": 3.0},
            },
        ),
    ],
)
def test_urls_say(text: str, expected: dict[str, object]) -> None:
    assert connect_arguments(sa.make_url(f"postgresql+sessionbroker{text}")) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("://user:token@h", "has a username"),
        ("://h?nope=1", "no option 'nope'"),
        ("://h?lease_ttl=soon", "lease_ttl is wrong"),
        ("://h?read_only=perhaps", "read_only is wrong"),
    ],
)
def test_urls_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(exc.ArgumentError, match=message) as caught:
        sa.create_engine(f"postgresql+sessionbroker{text}").connect()

    assert "token" not in str(caught.value).replace(":TOKEN", "").replace("bearer token", "")


def test_connect_args_are_typed_and_reach_the_session(url: str, start_broker: Any, postgres: Postgres) -> None:
    broker = start_broker(configuration(postgres, engine='overridable = ["search_path", "application_name"]'))
    engine = sa.create_engine(
        f"postgresql+sessionbroker://{broker.target}/main?application_name=web",
        connect_args={"isolation_level": "repeatable read", "labels": {"app": "web"}, "autocommit": True},
    )
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW application_name").scalar() == "web"
        assert connection.exec_driver_sql("SHOW transaction_isolation").scalar() == "repeatable read"
    with pytest.raises(TypeError, match="no option 'nope'"):
        sa.create_engine(url, connect_args={"nope": 1}).connect()


def test_reflection_finds_what_is_there(engine: sa.Engine) -> None:
    table = sa.Table("accounts", sa.MetaData(), autoload_with=engine)

    assert {column.name: str(column.type) for column in table.c} == {
        "id": "INTEGER",
        "owner": "TEXT",
        "balance": "NUMERIC(12, 2)",
    }
    assert [check["name"] for check in sa.inspect(engine).get_check_constraints("accounts")] == [
        "accounts_balance_check"
    ]


class TestAsyncio:
    """What is different where calls are awaited."""

    async def test_results_stream(self, async_engine: AsyncEngine, numbers: sa.Table, server: Server) -> None:
        async with async_engine.connect() as connection:
            result = await connection.stream_scalars(sa.select(sa.func.generate_series(1, 30_000)))
            assert sum([number async for number in result]) == 450_015_000
            result = await connection.stream_scalars(sa.select(sa.func.generate_series(1, 30_000)))
            assert len(await result.fetchmany(10)) == 10
            await connection.execute(numbers.insert(), {"id": 1})
            await result.close()
            await connection.commit()

        assert count(server) == 1

    async def test_a_session_of_the_orm_with_savepoints(
        self, async_engine: AsyncEngine, numbers: sa.Table, server: Server
    ) -> None:
        async with async_engine.begin() as connection:
            await connection.execute(numbers.insert(), {"id": 1})
            with pytest.raises(exc.IntegrityError):
                async with connection.begin_nested():
                    await connection.execute(numbers.insert(), {"id": 1})

        assert count(server) == 1

    async def test_many_at_once_share_one_connection_to_the_broker(self, async_engine: AsyncEngine) -> None:
        async def ask(number: int) -> object:
            async with async_engine.connect() as connection:
                return (await connection.execute(sa.text("SELECT :number"), {"number": number})).scalar()

        assert await asyncio.gather(*map(ask, range(20))) == list(range(20))

    async def test_a_task_that_is_cancelled_leaves_nothing_behind(
        self, async_engine: AsyncEngine, server: Server
    ) -> None:
        async def sleep() -> None:
            async with async_engine.connect() as connection:
                await connection.execute(sa.text("SELECT pg_sleep(30) AS left_by_its_task"))

        running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%left_by_its_task' AND state = 'active'"
        task = asyncio.create_task(sleep())
        await asyncio.to_thread(wait_until, lambda: server.postgres.value(running) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        await asyncio.to_thread(wait_until, lambda: server.postgres.value(running) == 0)
        async with async_engine.connect() as connection:
            assert (await connection.execute(sa.text("SELECT 1"))).scalar() == 1

    async def test_pre_ping_replaces_a_session_that_ended(self, url: str, target: str, admin: str) -> None:
        engine = create_async_engine(url, poolclass=pool.AsyncAdaptedQueuePool, pool_size=1, pool_pre_ping=True)
        async with engine.connect() as connection:
            await connection.execute(sa.text("SELECT 1"))
            raw = await connection.get_raw_connection()
            first = raw.driver_connection
            assert isinstance(first, session_broker.aio.Session)
            await connection.rollback()
            with session_broker.connect(target, credentials=admin) as operator:
                operator.terminate(first.id, "for the test")
        async with engine.connect() as connection:
            assert (await connection.execute(sa.text("SELECT 1"))).scalar() == 1
            assert (await connection.get_raw_connection()).driver_connection is not first
        await engine.dispose()

    def test_an_engine_serves_one_event_loop_after_another(self, url: str) -> None:
        engine = create_async_engine(url)

        async def ask() -> object:
            async with engine.connect() as connection:
                return (await connection.execute(sa.text("SELECT 1"))).scalar()

        assert [asyncio.run(ask()) for _ in range(2)] == [1, 1]

    async def test_one_that_is_ended_where_nothing_can_be_awaited_uses_nothing_shared(
        self, async_engine: AsyncEngine
    ) -> None:
        connection = await async_engine.connect()
        await connection.execute(sa.text("SELECT 1"))
        shared = async_engine.dialect._shared  # type: ignore[attr-defined]
        assert shared.users == 1
        ended = (await connection.get_raw_connection()).dbapi_connection

        for _ in range(2):
            async_engine.dialect.do_terminate(ended)  # type: ignore[arg-type]

        assert shared.users == 0
        await connection.invalidate()
        assert shared.users == 0

    def test_one_that_is_not_closed_is_let_go(self, url: str, target: str, admin: str) -> None:
        async def forget() -> str:
            engine = create_async_engine(url, connect_args={"lease_ttl": 1})
            connection = await engine.connect()
            await connection.execute(sa.text("SELECT 1"))
            raw = await connection.get_raw_connection()
            return raw.driver_connection.id  # type: ignore[union-attr,no-any-return]

        def run() -> str:
            made = asyncio.run(forget())
            gc.collect()
            return made

        with pytest.warns(exc.SAWarning, match="garbage collector"):
            forgotten = run()

        with session_broker.connect(target, credentials=admin) as operator:
            wait_until(lambda: forgotten not in {session.session_id for session in operator.sessions()})


class Base(orm.DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "authors"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str]
    books: orm.Mapped[list[Book]] = orm.relationship(back_populates="author", cascade="all, delete-orphan")


class Book(Base):
    __tablename__ = "books"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    title: orm.Mapped[str]
    facts: orm.Mapped[dict[str, Any]] = orm.mapped_column(pg.JSONB)
    author_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("authors.id"))
    author: orm.Mapped[Author] = orm.relationship(back_populates="books")


def test_the_orm_works_as_ever(engine: sa.Engine) -> None:
    Base.metadata.create_all(engine)
    try:
        with orm.Session(engine) as session:
            session.add(Author(name="Ada", books=[Book(title=f"Notes {n}", facts={"n": n}) for n in range(3)]))
            session.commit()
            author = session.scalars(sa.select(Author).options(orm.selectinload(Author.books))).one()
            assert [book.facts for book in author.books] == [{"n": 0}, {"n": 1}, {"n": 2}]
            found = sa.select(Book.title).where(Book.facts["n"].as_integer() > 0).order_by(Book.id)
            assert session.scalars(found).all() == ["Notes 1", "Notes 2"]
            del author.books[0]
            session.commit()
            assert session.scalar(sa.select(sa.func.count()).select_from(Book)) == 2
    finally:
        Base.metadata.drop_all(engine)
