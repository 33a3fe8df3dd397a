"""DB-API 2.0: the compliance suite, and what PEP 249 and psycopg's users expect beyond it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import date, datetime, time
from decimal import Decimal
from types import ModuleType
from typing import Any, ClassVar

import dbapi20
import psycopg
import pytest
from conftest import Server
from support import BrokerProcess, Postgres, configuration, wait_until

import session_broker
from session_broker import dbapi


class TestCompliance(dbapi20.DatabaseAPI20Test):  # type: ignore[misc]
    """dbapi-compliance, whose questions stand as they are but for three that it leaves to the driver."""

    driver: ClassVar[ModuleType] = dbapi

    @pytest.fixture(autouse=True)
    def _reach(self, target: str) -> None:
        self.connect_args = (target,)

    def test_nextset(self) -> None:
        connection = self._connect()
        try:
            assert connection.cursor().nextset() is None
        finally:
            connection.close()

    def test_setoutputsize(self) -> None:
        """There is nothing to see: values come whole."""

    def test_non_idempotent_close(self) -> None:
        """The suite says that reasonable persons differ; psycopg's connections close twice too."""
        connection = self._connect()
        connection.close()
        connection.close()
        assert connection.closed


@pytest.fixture
def connection(broker: session_broker.Broker) -> Iterator[dbapi.Connection]:
    made = dbapi.connect(broker)
    yield made
    made.close()


@pytest.fixture
def table(server: Server) -> Iterator[str]:
    """A table that everyone sees: items (id, name)."""
    with server.postgres.connect() as witness:
        witness.execute("CREATE TABLE items (id int8 PRIMARY KEY, name text); ALTER TABLE items OWNER TO broker")
        yield "items"
        witness.execute("DROP TABLE items")


@pytest.fixture
def adding(table: str, server: Server) -> Iterator[str]:
    """A view whose function, add, adds an item for each of its two rows."""
    with server.postgres.connect() as witness:
        add = "INSERT INTO items VALUES ($1) RETURNING id"
        witness.execute(f"CREATE FUNCTION add(int) RETURNS int8 LANGUAGE sql AS '{add}'".encode())
        witness.execute("CREATE VIEW adding AS SELECT add(i) AS id FROM generate_series(1, 2) AS i")
        witness.execute("GRANT SELECT ON adding TO broker")
        yield "adding"
        witness.execute("DROP VIEW adding; DROP FUNCTION add")


def count(server: Server) -> object:
    return server.postgres.value("SELECT count(*) FROM items")


def psycopg_says(server: Server, operation: str, parameters: Any) -> list[Any]:
    with psycopg.connect(server.postgres.url()) as connection:
        return connection.execute(operation.encode(), parameters).fetchall()


@pytest.mark.parametrize(
    ("operation", "parameters"),
    [
        ("SELECT %s, %s::text", (1, "a")),
        ("SELECT %s, %s::text", [1, "a"]),
        ("SELECT %(a)s, %(b)s::text, %(a)s", {"a": 1, "b": "x", "unused": 2}),
        ("SELECT 5 %% %s, '100%%'", (3,)),
        ("SELECT 5 %% 3, '%%s'", ()),
        ("SELECT 5 %% 3", {}),
        ("SELECT 5 % 3, '%s %%'", None),
        ("SELECT %s\n  , '%%' -- %%\n", (None,)),
        ("SELECT %(with space)s", {"with space": 1}),
    ],
)
def test_placeholders_are_psycopgs(
    operation: str, parameters: Any, connection: dbapi.Connection, server: Server
) -> None:
    assert connection.execute(operation, parameters).fetchall() == psycopg_says(server, operation, parameters)


@pytest.mark.parametrize(
    ("operation", "parameters", "message"),
    [
        ("SELECT %s", (), "1 placeholders, and there are 0"),
        ("SELECT %s", (1, 2), "1 placeholders, and there are 2"),
        ("SELECT 1", (1,), "0 placeholders, and there are 1"),
        ("SELECT %s", {"a": 1}, "give a sequence"),
        ("SELECT %(a)s", (1,), "give a mapping"),
        ("SELECT %(a)s", {"b": 1}, "'%\\(a\\)s'"),
        ("SELECT %(a)s, %s", (1,), "mixes"),
        ("SELECT %d", (1,), "'%d' is no placeholder"),
        ("SELECT 100%", (1,), "'%' is no placeholder"),
        ("SELECT %(a)d", {"a": 1}, "'%\\(a\\)d' is no placeholder"),
        ("SELECT %s", "a", "the parameters are a str"),
        ("SELECT %s", {1}, "the parameters are a set"),
        ("SELECT %s", ({1},), "parameter \\$1"),
    ],
)
def test_what_does_not_fit_is_a_programming_error_and_nothing_runs(
    operation: str, parameters: Any, message: str, connection: dbapi.Connection
) -> None:
    with pytest.raises(dbapi.ProgrammingError, match=message):
        connection.execute(operation, parameters)

    assert not connection.in_transaction
    assert connection.execute("SELECT 1").fetchone() == (1,)


def test_description_tells_types_as_psycopg_does(connection: dbapi.Connection, server: Server) -> None:
    sql = "SELECT 1 AS a, 'x'::varchar(5) AS b, 1.5::numeric(9, 2), 2.5::numeric AS d, now(), '\\x00'::bytea, 1::oid"
    cursor = connection.execute(sql)
    with psycopg.connect(server.postgres.url()) as witness:
        expected = witness.execute(sql.encode()).description

    assert cursor.description is not None
    assert expected is not None
    assert [column[:2] for column in cursor.description] == [column[:2] for column in expected]
    assert [column[4:6] for column in cursor.description] == [column[4:6] for column in expected]
    kinds = [dbapi.NUMBER, dbapi.STRING, dbapi.NUMBER, dbapi.NUMBER, dbapi.DATETIME, dbapi.BINARY, dbapi.ROWID]
    assert [column[1] for column in cursor.description] == kinds
    assert cursor.description[0][1] != dbapi.STRING
    assert len({dbapi.STRING, dbapi.NUMBER, dbapi.STRING}) == 2


@pytest.mark.parametrize(
    "operation",
    [
        "CREATE TEMPORARY TABLE t (i int)",
        "INSERT INTO items SELECT generate_series(10, 12), 'x'",
        "UPDATE items SET name = 'y'",
        "DELETE FROM items WHERE id = 1",
        "DELETE FROM items RETURNING id",
        "SELECT * FROM items",
        "SELECT * FROM items WHERE false",
        "SHOW search_path",
        "VALUES (1), (2)",
        "DO 'BEGIN END'",
    ],
)
def test_rowcount_is_psycopgs(operation: str, table: str, connection: dbapi.Connection, server: Server) -> None:
    with psycopg.connect(server.postgres.url("main", "postgres"), autocommit=True) as witness:
        witness.execute("INSERT INTO items VALUES (1, 'a'), (2, 'b')")
    cursor = connection.execute(operation)
    with psycopg.connect(server.postgres.url()) as other:
        connection.rollback()
        expected = other.execute(operation.encode())
        other.rollback()

    assert cursor.rowcount == expected.rowcount
    assert (cursor.description is None) == (expected.description is None)


def test_fetching_without_a_result_is_a_programming_error(connection: dbapi.Connection) -> None:
    cursor = connection.cursor()
    for fetch in (cursor.fetchone, cursor.fetchmany, cursor.fetchall):
        with pytest.raises(dbapi.ProgrammingError, match="no rows to fetch"):
            fetch()
    cursor.execute("CREATE TEMPORARY TABLE t ()")
    with pytest.raises(dbapi.ProgrammingError, match="no rows to fetch"):
        cursor.fetchall()


def test_what_is_closed_is_an_interface_error(connection: dbapi.Connection) -> None:
    cursor = connection.execute("SELECT 1")
    cursor.close()
    cursor.close()
    uses: list[Callable[[], object]] = [cursor.fetchone, lambda: cursor.execute("SELECT 1"), cursor.nextset]
    for use in uses:
        with pytest.raises(dbapi.InterfaceError, match="the cursor is closed"):
            use()
    other = connection.cursor()
    connection.close()
    uses = [connection.cursor, connection.commit, connection.rollback, connection.ping]
    uses += [connection.cancel, connection.__enter__, lambda: connection.create_savepoint("a")]
    for use in uses:
        with pytest.raises(dbapi.InterfaceError, match="the connection is closed"):
            use()
    with pytest.raises(dbapi.InterfaceError, match="the connection is closed"):
        other.execute("SELECT 1")


def test_a_connection_commits_as_a_context_and_closes(table: str, target: str, server: Server) -> None:
    with dbapi.connect(target) as connection:
        connection.execute("INSERT INTO items VALUES (1, 'a')")

    assert connection.closed
    assert count(server) == 1


def test_a_connection_rolls_back_on_an_error_and_closes(table: str, target: str, server: Server) -> None:
    connection = dbapi.connect(target)

    def fail() -> None:
        with connection:
            connection.execute("INSERT INTO items VALUES (1, 'a')")
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    assert connection.closed
    assert count(server) == 0


def test_a_shared_broker_stays_open(broker: session_broker.Broker) -> None:
    with dbapi.connect(broker) as connection:
        connection.execute("SELECT 1")

    with dbapi.connect(broker, labels={"app": "test"}) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_autocommit_keeps_each_statement(table: str, broker: session_broker.Broker, server: Server) -> None:
    with dbapi.connect(broker, autocommit=True) as connection:
        connection.execute("INSERT INTO items VALUES (1, 'a')")
        assert count(server) == 1
        connection.rollback()
        assert count(server) == 1
        with pytest.raises(dbapi.IntegrityError):
            connection.execute("INSERT INTO items VALUES (1, 'a')")
        connection.execute("INSERT INTO items VALUES (2, 'a')")
        assert count(server) == 2


def test_autocommit_changes_between_transactions_only(connection: dbapi.Connection) -> None:
    connection.execute("SELECT 1")
    with pytest.raises(dbapi.ProgrammingError, match="commit or roll back first"):
        connection.autocommit = True
    connection.autocommit = False
    connection.rollback()
    connection.autocommit = True

    assert connection.autocommit
    connection.execute("SELECT 1")
    assert not connection.in_transaction


@pytest.mark.parametrize("autocommit", [False, True])
def test_executemany_runs_each_set_and_counts(
    autocommit: bool, table: str, broker: session_broker.Broker, server: Server
) -> None:
    with dbapi.connect(broker, autocommit=autocommit) as connection:
        cursor = connection.cursor()
        sets: list[dict[str, object]] = [
            {"id": number * 40, "name": None if number % 3 else str(number)} for number in range(2_500)
        ]
        cursor.executemany("INSERT INTO items (name, id) VALUES (%(name)s, %(id)s)", sets)
        assert cursor.rowcount == 2_500
        assert cursor.description is None
        cursor.executemany("UPDATE items SET name = %s WHERE id < %s", [("x", 40), (None, 400), ("y", -1)])
        assert cursor.rowcount == 11
        cursor.executemany("DELETE FROM items WHERE id = %s", [])
        assert cursor.rowcount == 0

    assert (
        server.postgres.value(
            "SELECT array_agg(id ORDER BY id) = array_agg(n ORDER BY n) FROM items, LATERAL (SELECT id AS n) AS same"
        )
        is True
    )
    assert server.postgres.value("SELECT (count(*), sum(id), count(name))::text FROM items") == "(2500,124950000,830)"


@pytest.mark.parametrize("autocommit", [False, True])
def test_executemany_leaves_nothing_of_a_set_that_fails(
    autocommit: bool, table: str, broker: session_broker.Broker, server: Server
) -> None:
    with dbapi.connect(broker, autocommit=autocommit) as connection:
        sets = [(number, "x") for number in range(1_500)] + [(7, "again")]
        with pytest.raises(dbapi.IntegrityError) as caught:
            connection.cursor().executemany("INSERT INTO items VALUES (%s, %s)", sets)
        connection.rollback()

    assert caught.value.sqlstate == "23505"
    assert count(server) == 0


def test_callproc_calls_a_function_by_its_name(server: Server, connection: dbapi.Connection) -> None:
    with server.postgres.connect() as witness:
        witness.execute(
            "CREATE FUNCTION \"twice 100%\"(int) RETURNS SETOF int LANGUAGE sql AS 'SELECT $1 UNION ALL SELECT $1'"
        )
    cursor = connection.cursor()

    assert cursor.callproc("public.twice 100%", [5]) == [5]
    assert cursor.fetchall() == [(5,), (5,)]
    cursor.callproc("pg_catalog.pi")
    assert cursor.fetchone() == (3.141592653589793,)


def test_savepoints_by_method_and_in_sql(table: str, connection: dbapi.Connection, server: Server) -> None:
    connection.execute("INSERT INTO items VALUES (1, 'a')")
    connection.create_savepoint('Odd "name"')
    with pytest.raises(dbapi.IntegrityError):
        connection.execute("INSERT INTO items VALUES (1, 'a')")
    connection.rollback_to_savepoint('Odd "name"')
    connection.release_savepoint('Odd "name"')
    connection.execute("SAVEPOINT Inner")
    connection.execute("INSERT INTO items VALUES (2, 'a')")
    connection.execute('rollback to "inner";', ())
    connection.execute("INSERT INTO items VALUES (3, 'a')")
    connection.execute(" RELEASE SAVEPOINT inner ", {})
    connection.commit()

    assert server.postgres.value("SELECT array_agg(id ORDER BY id) FROM items") == [1, 3]


def test_transactions_begin_as_asked(connection: dbapi.Connection) -> None:
    connection.isolation_level = "serializable"
    connection.read_only = True
    connection.deferrable = True
    sql = "SELECT " + ", ".join(
        f"current_setting('transaction_{name}')" for name in ("isolation", "read_only", "deferrable")
    )
    assert connection.execute(sql).fetchone() == ("serializable", "on", "on")
    connection.rollback()
    connection.isolation_level, connection.read_only, connection.deferrable = None, False, None

    assert connection.execute(sql).fetchone() == ("read committed", "off", "off")


def test_how_a_transaction_was_to_begin_does_not_outlive_a_statement_that_was_refused(
    connection: dbapi.Connection,
) -> None:
    connection.isolation_level = "SERIALIZABLE"
    with pytest.raises(dbapi.ProgrammingError):
        connection.execute("SELECT 1; SELECT 2")
    connection.rollback()
    with pytest.raises(dbapi.ProgrammingError, match="parameter"):
        connection.execute("SELECT %s", ({1},))
    assert not connection.in_transaction
    connection.isolation_level = None

    assert connection.execute("SHOW transaction_isolation").fetchone() == ("read committed",)


def test_in_autocommit_nothing_holds_a_savepoint(table: str, broker: session_broker.Broker, server: Server) -> None:
    with dbapi.connect(broker, autocommit=True) as connection:
        for set_savepoint in (lambda: connection.create_savepoint("a"), lambda: connection.execute("SAVEPOINT a")):
            with pytest.raises(dbapi.ProgrammingError, match="in autocommit"):
                set_savepoint()
        for use in (connection.release_savepoint, connection.rollback_to_savepoint):
            with pytest.raises(dbapi.Error):
                use("a")
        assert not connection.in_transaction
        connection.execute("INSERT INTO items VALUES (1, 'a')")
        assert count(server) == 1


def test_a_savepoint_that_is_not_there_is_not_released(connection: dbapi.Connection) -> None:
    connection.isolation_level = "SERIALIZABLE"
    with pytest.raises(dbapi.ProgrammingError, match="no transaction is open"):
        connection.release_savepoint("a")

    assert connection.execute("SHOW transaction_isolation").fetchone() == ("serializable",)


def test_commit_of_a_failed_transaction_says_so(connection: dbapi.Connection) -> None:
    with pytest.raises(dbapi.ProgrammingError) as caught:
        connection.execute("SELECT nope")
    with pytest.raises(session_broker.CommitRolledBack):
        connection.commit()

    assert caught.value.sqlstate == "42703"
    connection.rollback()
    assert connection.execute("SELECT 1").fetchone() == (1,)


def test_two_phase_commit_is_refused(connection: dbapi.Connection) -> None:
    calls: list[Callable[[], object]] = [lambda: connection.xid(0, "a", "b"), lambda: connection.tpc_begin("a")]
    calls += [connection.tpc_prepare, connection.tpc_commit, connection.tpc_rollback, connection.tpc_recover]
    for call in calls:
        with pytest.raises(dbapi.NotSupportedError, match="no two-phase commit"):
            call()


def test_notices_are_told(connection: dbapi.Connection) -> None:
    cursor = connection.execute("DO $$BEGIN RAISE WARNING 'mind the gap'; END$$")

    assert [(notice.severity, notice.message) for notice in cursor.notices] == [("WARNING", "mind the gap")]


def test_cancel_stops_the_running_statement(connection: dbapi.Connection, server: Server) -> None:
    assert not connection.cancel()
    caught: list[BaseException] = []

    def sleep() -> None:
        try:
            connection.execute("SELECT pg_sleep(30) AS to_be_cancelled")
        except session_broker.Error as error:
            caught.append(error)

    thread = threading.Thread(target=sleep)
    thread.start()
    running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%to_be_cancelled' AND state = 'active'"
    wait_until(lambda: server.postgres.value(running) == 1)

    assert connection.cancel()
    thread.join(10)
    assert [type(error) for error in caught] == [session_broker.StatementCancelled]


def test_an_ended_session_is_told_by_ping_and_left_by_rollback(
    broker: session_broker.Broker, target: str, admin: str, connection: dbapi.Connection
) -> None:
    connection.ping()
    connection.execute("SELECT 1")
    connection.ping()
    with session_broker.connect(target, credentials=admin) as operator:
        operator.terminate(connection.session.info().session_id, "for the test")

    with pytest.raises(session_broker.SessionEnded) as caught:
        connection.ping()
    with pytest.raises(session_broker.SessionEnded):
        connection.execute("SELECT 1")

    assert caught.value.end_reason is session_broker.EndReason.TERMINATED
    connection.rollback()
    assert connection.execute("SELECT 1").fetchone() == (1,)


class TestStream:
    """Cursors that read their rows as they come."""

    @pytest.fixture
    def cursor(self, connection: dbapi.Connection) -> dbapi.Cursor:
        return connection.cursor(stream=True)

    def test_it_reads_more_than_a_whole_result_may_have(
        self, connection: dbapi.Connection, cursor: dbapi.Cursor
    ) -> None:
        with pytest.raises(dbapi.OperationalError) as caught:
            connection.execute("SELECT generate_series(1, 50000)")
        connection.rollback()
        assert caught.value.reason == "RESULT_TOO_LARGE"

        cursor.execute("SELECT generate_series(1, 50000), %s", ("x",))
        assert cursor.rowcount == -1
        assert cursor.server_side
        assert cursor.description is not None
        assert cursor.fetchone() == (1, "x")
        assert cursor.fetchmany() == [(2, "x")]
        assert [row[0] for row in cursor.fetchmany(3_000)] == list(range(3, 3_003))
        assert next(cursor) == (3_003, "x")
        assert [row[0] for row in cursor] == list(range(3_004, 50_001))
        assert cursor.fetchone() is None
        assert cursor.fetchmany(5) == cursor.fetchall() == []
        assert cursor.rowcount == 50_000

    def test_another_statement_takes_what_is_left_into_memory(
        self, connection: dbapi.Connection, cursor: dbapi.Cursor
    ) -> None:
        cursor.execute("SELECT generate_series(1, 5000)")
        assert cursor.fetchone() == (1,)

        assert connection.execute("SELECT 'between'").fetchone() == ("between",)
        other = connection.cursor(stream=True).execute("SELECT generate_series(1, 3000)")
        assert other.fetchone() == (1,)
        connection.create_savepoint("a")
        assert len(cursor.fetchall()) == 4_999
        assert len(other.fetchall()) == 2_999

    def test_closed_early_the_transaction_goes_on(
        self, table: str, connection: dbapi.Connection, cursor: dbapi.Cursor, server: Server
    ) -> None:
        connection.execute("INSERT INTO items VALUES (1, 'a')")
        cursor.execute("SELECT generate_series(1, 1000000)")
        cursor.fetchmany(10)
        cursor.close()
        connection.execute("INSERT INTO items VALUES (2, 'a')")
        connection.commit()

        assert count(server) == 2

    def test_of_a_cursor_that_is_gone_nothing_is_taken_into_memory(self, connection: dbapi.Connection) -> None:
        assert connection.cursor(stream=True).execute("SELECT generate_series(1, 1000000000)").fetchone() == (1,)

        assert connection.execute("SELECT 1").fetchone() == (1,)

    def test_left_open_at_commit_the_transaction_commits(
        self, table: str, connection: dbapi.Connection, cursor: dbapi.Cursor, server: Server
    ) -> None:
        connection.execute("INSERT INTO items VALUES (1, 'a')")
        cursor.execute("SELECT generate_series(1, 1000000)")
        cursor.fetchmany(10)
        connection.commit()

        assert count(server) == 1
        with pytest.raises(dbapi.ProgrammingError, match="did not run to its end"):
            cursor.fetchall()

    def test_left_open_at_rollback_nothing_is_left(
        self, table: str, connection: dbapi.Connection, cursor: dbapi.Cursor, server: Server
    ) -> None:
        connection.create_savepoint("a")
        cursor.execute("INSERT INTO items SELECT generate_series(1, 20000), 'a' RETURNING id")
        cursor.fetchmany(10)
        connection.rollback_to_savepoint("a")
        assert connection.execute("SELECT count(*) FROM items").fetchone() == (0,)
        cursor.execute("INSERT INTO items SELECT generate_series(1, 20000), 'a' RETURNING id")
        connection.rollback()

        assert count(server) == 0

    def test_a_statement_that_may_write_runs_to_its_end(
        self, table: str, connection: dbapi.Connection, cursor: dbapi.Cursor, server: Server
    ) -> None:
        cursor.execute("INSERT INTO items SELECT generate_series(1, 20000), 'a' RETURNING id")
        assert cursor.fetchone() == (1,)
        cursor.close()
        connection.commit()

        assert count(server) == 20_000

    @pytest.mark.parametrize("autocommit", [False, True])
    def test_read_to_its_last_row_what_a_function_wrote_stays(
        self, autocommit: bool, adding: str, broker: session_broker.Broker, server: Server
    ) -> None:
        with dbapi.connect(broker, autocommit=autocommit) as connection:
            cursor = connection.cursor(stream=True).execute(f"SELECT id FROM {adding}")
            assert [cursor.fetchone(), cursor.fetchone()] == [(1,), (2,)]
            connection.commit()

            assert count(server) == 2
            assert cursor.fetchone() is None
            assert cursor.rowcount == 2

    def test_a_function_that_may_write_runs_to_its_end(
        self, adding: str, connection: dbapi.Connection, cursor: dbapi.Cursor, server: Server
    ) -> None:
        cursor.execute("SELECT add(i) FROM generate_series(3, 5000) AS i")
        assert cursor.fetchone() == (3,)
        cursor.close()
        connection.commit()

        assert count(server) == 4_998

    def test_closed_early_rows_stay_locked(
        self, table: str, connection: dbapi.Connection, cursor: dbapi.Cursor, server: Server
    ) -> None:
        with server.postgres.connect() as witness:
            witness.execute("INSERT INTO items SELECT generate_series(1, 5000)")
        cursor.execute("SELECT id FROM items FOR KEY SHARE")
        cursor.fetchone()
        cursor.close()

        assert connection.in_transaction
        assert server.postgres.value("SELECT count(*) FROM (SELECT FROM items FOR UPDATE SKIP LOCKED) AS free") == 0

    @pytest.mark.parametrize("failing", ["1 / (2 - i)", "CASE i WHEN 2 THEN 'infinity'::date END"])
    def test_an_error_after_the_rows_that_were_wanted_is_not_raised(
        self, failing: str, connection: dbapi.Connection, cursor: dbapi.Cursor
    ) -> None:
        cursor.execute(f"SELECT repeat('x', 1000000), {failing} FROM generate_series(1, 2) AS i")
        row = cursor.fetchone()
        assert row is not None
        assert row[0] == "x" * 1_000_000
        cursor.close()

        assert connection.execute("SELECT 1").fetchone() == (1,)
        connection.commit()

    @pytest.mark.parametrize("autocommit", [False, True])
    def test_after_a_value_that_python_cannot_hold_nothing_more_is_read(
        self, autocommit: bool, broker: session_broker.Broker
    ) -> None:
        sql = "SELECT CASE i WHEN 3 THEN 'infinity'::date ELSE '2026-01-01' END FROM generate_series(1, 5000) AS i"
        with dbapi.connect(broker, autocommit=autocommit) as connection:
            cursor = connection.cursor(stream=True).execute(sql)
            with pytest.raises(dbapi.DataError, match="cast it to text"):
                cursor.fetchall()
            with pytest.raises(dbapi.ProgrammingError, match="did not run to its end"):
                cursor.fetchone()
            if not autocommit:
                with pytest.raises(dbapi.ProgrammingError, match="rollback"):
                    connection.commit()
                connection.rollback()
            assert connection.execute("SELECT 1").fetchone() == (1,)

    def test_autocommit_commits_what_was_read_to_its_end(
        self, table: str, broker: session_broker.Broker, server: Server
    ) -> None:
        with dbapi.connect(broker, autocommit=True) as connection:
            cursor = connection.cursor(stream=True)
            cursor.execute("INSERT INTO items SELECT generate_series(1, 2000), 'a' RETURNING id")
            assert len(cursor.fetchall()) == 2_000
            assert count(server) == 2_000
            cursor.execute("SELECT generate_series(1, 1000000)")
            cursor.fetchone()
            cursor.close()
            assert connection.execute("SELECT 1").fetchone() == (1,)

    def test_a_statement_without_rows_runs_at_once(
        self, table: str, connection: dbapi.Connection, cursor: dbapi.Cursor
    ) -> None:
        cursor.execute("INSERT INTO items VALUES (1, 'a')")

        assert cursor.description is None
        with pytest.raises(dbapi.ProgrammingError, match="no rows to fetch"):
            cursor.fetchone()
        assert connection.execute("SELECT count(*) FROM items").fetchone() == (1,)

    @pytest.mark.parametrize("autocommit", [False, True])
    def test_an_error_after_rows_is_raised_and_the_connection_goes_on(
        self, autocommit: bool, broker: session_broker.Broker
    ) -> None:
        with dbapi.connect(broker, autocommit=autocommit) as connection:
            cursor = connection.cursor(stream=True)
            cursor.execute("SELECT 1 / (50000 - i) FROM generate_series(1, 60000) AS i")
            with pytest.raises(dbapi.DataError) as caught:
                cursor.fetchall()
            assert caught.value.sqlstate == "22012"
            if not autocommit:
                connection.rollback()
            assert connection.execute("SELECT 1").fetchone() == (1,)

    def test_an_error_at_once_is_raised(self, cursor: dbapi.Cursor, connection: dbapi.Connection) -> None:
        with pytest.raises(dbapi.ProgrammingError):
            cursor.execute("SELECT nope")
        connection.rollback()
        assert cursor.execute("SELECT 1").fetchall() == [(1,)]


def test_constructors_make_what_is_sent(connection: dbapi.Connection) -> None:
    made = (
        dbapi.Date(2026, 1, 2),
        dbapi.Time(3, 4, 5),
        dbapi.Timestamp(2026, 1, 2, 3, 4, 5),
        dbapi.Binary(b"\0"),
        dbapi.DateFromTicks(0),
        dbapi.TimeFromTicks(0),
        dbapi.TimestampFromTicks(0),
        Decimal("1.5"),
    )

    assert connection.execute("SELECT %s, %s, %s, %s, %s, %s, %s, %s", made).fetchone() == made
    assert [type(value) for value in made[4:7]] == [date, time, datetime]


def test_a_result_is_told_to_be_too_large_by_the_profiles_limit(
    start_broker: Callable[[str], BrokerProcess], postgres: Postgres
) -> None:
    broker = start_broker(configuration(postgres, profile="result_rows_max = 3"))
    with (
        pytest.raises(dbapi.OperationalError, match="RESULT_TOO_LARGE"),
        dbapi.connect(broker.target) as connection,
    ):
        connection.execute("SELECT generate_series(1, 4)")
