"""The blocking API against a real broker."""

from __future__ import annotations

import threading
from collections.abc import Callable
from decimal import Decimal

import pytest
from conftest import Server
from support import BrokerProcess, Postgres, configuration, wait_until

import session_broker
from session_broker import (
    AtLeast,
    Broker,
    CommitRolledBack,
    CommitUnknown,
    DataError,
    ExpectationFailed,
    IntegrityError,
    InterfaceError,
    InternalError,
    IsolationLevel,
    NotSupportedError,
    OperationalError,
    Outcome,
    ProgrammingError,
    SessionEnded,
    Statement,
    StatementCancelled,
    StatementTimeout,
    TransactionState,
)


@pytest.fixture
def table(server: Server) -> str:
    """An empty table for each test."""
    with server.postgres.connect() as witness:
        witness.execute("DROP TABLE IF EXISTS notes; CREATE TABLE notes (id int PRIMARY KEY, text text)")
        witness.execute("ALTER TABLE notes OWNER TO broker")
    return "notes"


def count(server: Server) -> object:
    return server.postgres.value("SELECT count(*) FROM notes")


@pytest.mark.usefixtures("table")
class TestTransactions:
    def test_a_block_that_ends_well_commits(self, broker: Broker, server: Server) -> None:
        with broker.session() as session:
            session.execute("INSERT INTO notes VALUES ($1, $2)", [1, "one"])
            assert count(server) == 0
        assert count(server) == 1
        assert session.closed

    def test_a_block_that_raises_rolls_back(self, broker: Broker, server: Server) -> None:
        session = broker.session()
        with pytest.raises(ZeroDivisionError), session:
            assert session.execute("INSERT INTO notes VALUES (1, 'one') RETURNING id").scalar() == 1 / 0
        assert count(server) == 0
        assert session.closed

    def test_commit_tells_what_it_did(self, broker: Broker, server: Server) -> None:
        with broker.session() as session:
            assert session.commit().outcome is Outcome.NOTHING_WRITTEN
            session.execute("INSERT INTO notes VALUES (1, 'one')")
            commit = session.commit()
            assert commit.outcome is Outcome.COMMITTED
            assert commit.transaction_id > 0
            assert session.commit() == commit
            assert broker.resolve_commit(commit.commit_token) is Outcome.COMMITTED
            session.execute("SELECT 1")
            assert session.commit().outcome is Outcome.NOTHING_WRITTEN
        assert count(server) == 1

    def test_execute_can_commit_in_the_same_call(self, broker: Broker, server: Server) -> None:
        with broker.session() as session:
            result = session.execute("INSERT INTO notes VALUES (1, 'one')", commit=True)
            assert result.commit is not None
            assert result.commit.outcome is Outcome.COMMITTED
            assert session.commit() == result.commit
            assert count(server) == 1

    def test_rollback_to_a_savepoint_keeps_what_was_before(self, broker: Broker, server: Server) -> None:
        with broker.session() as session:
            session.execute("INSERT INTO notes VALUES (1, 'one')")
            with pytest.raises(IntegrityError), session.savepoint():
                session.batch(["INSERT INTO notes VALUES (2, 'two')", "INSERT INTO notes VALUES (1, 'one again')"])
            with session.savepoint("kept"):
                session.execute("INSERT INTO notes VALUES (3, 'three')")
            with pytest.raises(ProgrammingError):
                session.rollback("kept")
        assert server.postgres.value("SELECT array_agg(id ORDER BY id) FROM notes") == [1, 3]

    def test_a_failed_transaction_commits_as_rolled_back(self, broker: Broker) -> None:
        with broker.session() as session:
            with pytest.raises(ProgrammingError):
                session.execute("SELECT nothing")
            with pytest.raises(CommitRolledBack) as caught:
                session.commit()
            assert caught.value.advice is session_broker.Advice.TRANSACTION
            assert session.execute("SELECT 1").scalar() == 1

    def test_begin_says_how_the_next_transaction_is(self, broker: Broker) -> None:
        with broker.session(isolation_level="repeatable read") as session:
            session.begin(isolation_level=IsolationLevel.SERIALIZABLE, read_only=True)
            assert session.execute("SHOW transaction_isolation").scalar() == "serializable"
            with pytest.raises(ProgrammingError, match="is open"):
                session.begin(read_only=False)
            with pytest.raises(InternalError) as caught:
                session.execute("INSERT INTO notes VALUES (1, 'one')")
            assert caught.value.sqlstate == "25006"
            session.rollback()
            assert session.execute("SHOW transaction_isolation").scalar() == "repeatable read"

    def test_transaction_repeats_what_the_broker_advises_to_repeat(self, broker: Broker, server: Server) -> None:
        with broker.session() as session:
            session.execute("INSERT INTO notes VALUES (1, '0')")
        begun = threading.Barrier(2, timeout=10)
        attempts: list[int] = []

        def increment(session: session_broker.Session) -> None:
            text = session.execute("SELECT text FROM notes").scalar()
            attempts.append(1)
            if len(attempts) <= 2:
                begun.wait()
            session.execute("UPDATE notes SET text = $1", [str(int(text) + 1)])

        work = [
            threading.Thread(target=broker.transaction, args=[increment], kwargs={"isolation_level": "serializable"})
            for _ in range(2)
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join(20)
        assert server.postgres.value("SELECT text FROM notes") == "2"
        assert len(attempts) == 3


class TestStatements:
    def test_a_result_says_what_there_is_to_say(self, broker: Broker) -> None:
        with broker.session() as session:
            result = session.execute(
                "SELECT $1::int AS a, $2::numeric AS b UNION ALL SELECT 2, NULL", [1, Decimal("1.50")]
            )
            assert result.rows == [(1, Decimal("1.50")), (2, None)]
            assert list(result) == result.rows
            assert [column.name for column in result.columns] == ["a", "b"]
            assert (result.row_count, result.command_tag) == (2, "SELECT 2")
            with pytest.raises(ProgrammingError, match="2 rows"):
                result.one()
            assert session.execute("SELECT 1 WHERE false").rows == []
            notice = session.execute("DO $$ BEGIN RAISE NOTICE 'look'; END $$").notices[0]
            assert notice.message == "look"

    def test_batch_runs_all_in_order(self, broker: Broker) -> None:
        with broker.session() as session:
            results = session.batch(
                [
                    "CREATE TEMPORARY TABLE t (a int) ON COMMIT DROP",
                    Statement("INSERT INTO t VALUES ($1)", parameter_sets=[[1], [2], [70_000]]),
                    ("SELECT sum(a) FROM t WHERE a > $1", [1]),
                ]
            )
            assert [result.command_tag for result in results[1:]] == ["INSERT 0 1"] * 3 + ["SELECT 1"]
            assert results[-1].scalar() == 70_002

    def test_a_batch_that_fails_says_where(self, broker: Broker) -> None:
        with broker.session() as session:
            with pytest.raises(session_broker.DataError) as caught:
                session.batch(["SELECT 1", Statement("SELECT 1 / $1::int", parameter_sets=[[1], [0]])])
            assert caught.value.metadata["statement_index"] == "1"
            assert caught.value.metadata["parameter_set_index"] == "1"
            assert session.transaction_state is TransactionState.FAILED
            session.rollback()

    def test_a_statement_that_takes_too_long_is_stopped(self, broker: Broker) -> None:
        with broker.session() as session:
            with pytest.raises(StatementTimeout) as caught:
                session.execute("SELECT pg_sleep(20)", timeout=0.5)
            assert caught.value.advice in (session_broker.Advice.TRANSACTION, session_broker.Advice.SESSION)
            session.rollback()
            assert session.execute("SELECT 1").scalar() == 1

    def test_cancel_stops_a_statement_from_another_thread(self, broker: Broker, server: Server) -> None:
        with broker.session() as session:
            session.execute("SELECT 1")
            assert session.cancel() is False
            backend = session.info().backend_pid
            caught: list[BaseException] = []

            def sleep() -> None:
                try:
                    session.execute("SELECT pg_sleep(20)")
                except StatementCancelled as error:
                    caught.append(error)

            thread = threading.Thread(target=sleep)
            thread.start()
            wait_until(lambda: server.postgres.value(ACTIVE.format(backend)) == 1)
            assert session.cancel() is True
            thread.join(10)
            assert len(caught) == 1
            session.rollback()

    def test_max_rows_bounds_a_result(self, broker: Broker) -> None:
        with pytest.raises(OperationalError) as caught, broker.session() as session:
            session.execute("SELECT generate_series(1, 3)", max_rows=2)
        assert caught.value.reason == "RESULT_TOO_LARGE"

    def test_engine_tells_what_is_behind_a_session(self, broker: Broker) -> None:
        with broker.session(labels={"test": "yes"}) as session:
            assert (session.engine.name, session.engine.database, session.engine.user) == ("main", "main", "broker")
            assert session.get_bind() is session.engine
            assert session.info().labels["test"] == "yes"


ACTIVE = "SELECT count(*) FROM pg_stat_activity WHERE pid = {} AND state = 'active'"


class TestStreams:
    def test_rows_come_in_any_number(self, broker: Broker) -> None:
        with broker.session() as session:
            with session.stream("SELECT n, repeat('x', 100) FROM generate_series(1, $1::int) n", [20_000]) as stream:
                assert [column.name for column in stream.columns] == ["n", "repeat"]
                first = stream.fetchmany(3)
                assert [n for n, _ in first] == [1, 2, 3]
                assert sum(n for n, _ in stream) == 20_000 * 20_001 // 2 - 6
                assert stream.fetchmany(1) == []
                assert (stream.row_count, stream.command_tag) == (20_000, "SELECT 20000")
            assert session.execute("SELECT 1").scalar() == 1

    def test_an_error_after_rows_is_raised(self, broker: Broker) -> None:
        with broker.session() as session:
            stream = session.stream("SELECT 1 / (5000 - n) FROM generate_series(1, 9000) n")
            with pytest.raises(session_broker.DataError) as caught:
                list(stream)
            assert caught.value.sqlstate == "22012"
            session.rollback()

    def test_the_session_waits_for_its_stream(self, broker: Broker) -> None:
        with broker.session() as session:
            stream = session.stream("SELECT generate_series(1, 100000)")
            with pytest.raises(InterfaceError, match="stream"):
                session.execute("SELECT 1")
            with pytest.raises(InterfaceError, match="stream"):
                session.commit()
            assert len(stream.fetchmany(100_001)) == 100_000
            assert session.execute("SELECT 1").scalar() == 1

    def test_a_stream_closed_early_fails_its_transaction(self, broker: Broker) -> None:
        with broker.session() as session:
            with session.stream("SELECT repeat('x', 10000) FROM generate_series(1, 100000)") as stream:
                assert len(stream.fetchmany(1)) == 1
            with pytest.raises(ProgrammingError, match="rollback"):
                session.execute("SELECT 1")
            name = session.id
            session.rollback()
            assert session.execute("SELECT 1").scalar() == 1
            assert session.id == name

    @pytest.mark.usefixtures("table")
    def test_a_savepoint_survives_a_stream_closed_early(self, broker: Broker, server: Server) -> None:
        with broker.session() as session:
            session.execute("INSERT INTO notes VALUES (1, 'one')")
            session.create_savepoint("before")
            session.stream("SELECT repeat('x', 10000) FROM generate_series(1, 100000)").close()
            session.rollback("before")
        assert count(server) == 1

    @pytest.mark.usefixtures("table")
    def test_a_stream_can_commit(self, broker: Broker, server: Server) -> None:
        with broker.session() as session:
            stream = session.stream("INSERT INTO notes VALUES (1, 'one') RETURNING id", commit=True)
            assert list(stream) == [(1,)]
            assert stream.commit is not None
            assert stream.commit.outcome is Outcome.COMMITTED
            assert count(server) == 1

    def test_a_value_that_cannot_be_read_ends_it(self, broker: Broker) -> None:
        dates = "SELECT CASE n WHEN 5000 THEN 'infinity'::date ELSE '2000-01-01' END FROM generate_series(1, 90000) n"
        with broker.session() as session:
            stream = session.stream(dates)
            with pytest.raises(DataError):
                list(stream)
            with pytest.raises(InterfaceError, match="not complete"):
                stream.fetchmany(1)
            with pytest.raises(ProgrammingError, match="rollback"):
                session.commit()
            session.rollback()
            assert session.execute("SELECT 1").scalar() == 1

    def test_another_threads_stream_is_not_closed(self, broker: Broker) -> None:
        with broker.session() as session:
            stream = session.stream("SELECT CASE n WHEN 9000 THEN pg_sleep(1) END FROM generate_series(1, 9000) n")
            rows: list[object] = []
            thread = threading.Thread(target=lambda: rows.extend(stream))
            thread.start()
            wait_until(lambda: stream._reading)
            for call in (session.rollback, session.close):
                with pytest.raises(InterfaceError, match="another thread"):
                    call()
            thread.join(10)
            assert len(rows) == 9000

    @pytest.mark.usefixtures("table")
    def test_a_stream_that_was_to_commit_and_is_closed_early_is_asked_about(
        self, broker: Broker, server: Server
    ) -> None:
        session = broker.session()
        session.execute("INSERT INTO notes VALUES (1, 'one')")
        session.stream("INSERT INTO notes VALUES (2, 'two') RETURNING id", commit=True).close()
        with pytest.raises(ProgrammingError, match="outcome is not known"):
            session.execute("SELECT 1")
        try:
            session.commit()
        except CommitRolledBack:
            assert count(server) == 0
        else:
            assert count(server) == 2
        session.close()


@pytest.mark.usefixtures("table")
class TestUnreadable:
    SQL = "INSERT INTO notes VALUES (1, 'one') RETURNING 'infinity'::date"

    def test_what_is_committed_is_told_with_its_result_that_cannot_be_read(
        self, broker: Broker, server: Server
    ) -> None:
        with broker.session() as session, pytest.raises(DataError, match="is committed") as caught:
            session.execute(self.SQL, commit=True)
        assert caught.value.commit is not None
        assert Outcome(caught.value.commit.outcome) is Outcome.COMMITTED
        assert count(server) == 1

    def test_so_it_is_after_a_run(self, broker: Broker, server: Server) -> None:
        with pytest.raises(DataError, match="is committed") as caught:
            broker.run([self.SQL])
        assert caught.value.commit is not None
        assert Outcome(caught.value.commit.outcome) is Outcome.COMMITTED
        assert count(server) == 1


class TestLargeRequests:
    LARGE = "x" * (17 * 1024 * 1024)

    def test_one_that_no_broker_takes_is_refused(self, broker: Broker) -> None:
        with broker.session() as session:
            with pytest.raises(DataError, match=r"16 MiB.*copy_in"):
                session.execute("SELECT length($1)", [self.LARGE])
            assert session.execute("SELECT 1").scalar() == 1

    def test_one_that_the_broker_refuses_was_not_lost(self, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("session_broker._broker.REQUEST_BYTES_MAX", 1 << 30)
        with broker.session() as session:
            session.execute("SELECT 1")
            with pytest.raises(OperationalError) as caught:
                session.execute("SELECT length($1)", [self.LARGE], commit=True)
            assert not isinstance(caught.value, CommitUnknown)
            assert caught.value.advice is session_broker.Advice.NOTHING
            assert session.execute("SELECT 1").scalar() == 1


@pytest.mark.usefixtures("table")
class TestRun:
    def test_a_whole_transaction_in_one_call(self, broker: Broker, server: Server) -> None:
        results = broker.run(
            [
                Statement("INSERT INTO notes VALUES ($1, $2)", parameter_sets=[[1, "one"], [2, "two"]], expect=1),
                Statement("SELECT id FROM notes ORDER BY id", expect=AtLeast(2)),
            ]
        )
        assert results[-1].rows == [(1,), (2,)]
        assert results[-1].commit is not None
        assert results[-1].commit.outcome is Outcome.COMMITTED
        assert count(server) == 2

    def test_what_is_not_as_expected_is_not_done(self, broker: Broker, server: Server) -> None:
        with pytest.raises(ExpectationFailed) as caught:
            broker.run(["INSERT INTO notes VALUES (1, 'one')", Statement("UPDATE notes SET text = 'x'", expect=2)])
        assert caught.value.metadata["row_count"] == "1"
        assert count(server) == 0

    def test_an_idempotency_key_runs_once(self, broker: Broker, server: Server) -> None:
        for _ in range(2):
            broker.run(["INSERT INTO notes VALUES (1, 'one')"], idempotency_key="once")
        assert count(server) == 1

    def test_options_are_those_of_the_connection_or_its_own(self, target: str) -> None:
        with session_broker.connect(target, read_only=True, isolation_level="serializable") as broker:
            (result,) = broker.run(["SHOW transaction_isolation"])
            assert result.scalar() == "serializable"
            with pytest.raises(InternalError):
                broker.run(["INSERT INTO notes VALUES (1, 'one')"])
            broker.run(["INSERT INTO notes VALUES (1, 'one')"], read_only=False)


class TestMisuse:
    def test_a_closed_session_says_so(self, broker: Broker) -> None:
        session = broker.session()
        session.execute("SELECT 1")
        session.close()
        session.close()
        with pytest.raises(InterfaceError, match="closed"):
            session.execute("SELECT 1")
        with pytest.raises(InterfaceError, match="closed"):
            session.commit()

    def test_a_closed_connection_says_so(self, target: str) -> None:
        broker = session_broker.connect(target)
        session = broker.session()
        session.execute("SELECT 1")
        broker.close()
        broker.close()
        with pytest.raises(InterfaceError, match="connect"):
            session.execute("SELECT 1")
        session.close()

    def test_two_threads_on_one_session_are_told(self, broker: Broker, server: Server) -> None:
        with broker.session() as session:
            session.execute("SELECT 1")
            backend = session.info().backend_pid
            thread = threading.Thread(target=session.execute, args=["SELECT pg_sleep(1)"])
            thread.start()
            wait_until(lambda: server.postgres.value(ACTIVE.format(backend)) == 1)
            with pytest.raises(InterfaceError, match="another thread"):
                session.execute("SELECT 1")
            thread.join(10)
            assert session.execute("SELECT 2").scalar() == 2

    def test_wrong_arguments_are_named(self, target: str, broker: Broker) -> None:
        with pytest.raises(TypeError, match="engin"):
            session_broker.connect(target, engin="main")  # type: ignore[call-arg]
        with pytest.raises(ProgrammingError, match="isolation_level"):
            broker.session(isolation_level="strict")
        with pytest.raises(ProgrammingError, match="lease_ttl"):
            broker.session(lease_ttl="30s")  # type: ignore[arg-type]
        with pytest.raises(ProgrammingError, match="ssl_mode"):
            broker.session(connect_options={"ssl_mode": "maybe"})
        with pytest.raises(TypeError, match="hostname"):
            broker.session(connect_options={"hostname": "x"})  # type: ignore[typeddict-unknown-key]
        with broker.session(engine="other") as session, pytest.raises(ProgrammingError) as caught:
            session.execute("SELECT 1")
        assert caught.value.reason == "INVALID_REQUEST"
        with pytest.raises(ProgrammingError, match="expect"), broker.session() as session:
            session.batch([Statement("SELECT 1", expect=1)])

    def test_transaction_control_has_calls_of_its_own(self, broker: Broker) -> None:
        with broker.session() as session, pytest.raises((ProgrammingError, NotSupportedError)) as caught:
            session.execute("COMMIT")
        assert "Commit" in str(caught.value)


class TestErrors:
    def test_postgresqls_words_are_all_there(self, broker: Broker) -> None:
        with pytest.raises(IntegrityError) as caught, broker.session() as session:
            session.execute("INSERT INTO accounts VALUES (1, $1, 0)", ["a secret"])
        error = caught.value
        assert (error.reason, error.sqlstate) == ("DATABASE_ERROR", "23505")
        assert error.code is not None
        assert error.code.name == "ALREADY_EXISTS"
        assert error.pg is not None
        assert (error.pg.table, error.pg.constraint) == ("accounts", "accounts_pkey")
        assert error.state is not None
        assert TransactionState(error.state.transaction_state) is TransactionState.FAILED
        assert error.advice is session_broker.Advice.NOTHING
        assert "a secret" not in str(error)

    def test_no_representation_holds_a_token(self, broker: Broker) -> None:
        with broker.session() as session:
            session.execute("UPDATE accounts SET balance = balance")
            commit = session.commit()
            assert session._core.grant is not None
            for shown in (repr(session), repr(broker), repr(commit)):
                assert session._core.grant.token not in shown
                assert commit.commit_token not in shown

    def test_a_session_that_ended_is_told_and_rollback_begins_another(
        self, start_broker: Callable[[str], BrokerProcess], postgres: Postgres
    ) -> None:
        process = start_broker(configuration(postgres, profile='session_age_max = "1s"'))
        with session_broker.connect(process.target) as broker, broker.session() as session:
            session.execute("SELECT 1")
            first = session.id
            wait_until(lambda: session.info().end_reason != 0)
            for _ in range(2):
                with pytest.raises(SessionEnded) as caught:
                    session.execute("SELECT 1")
                assert caught.value.end_reason is session_broker.EndReason.MAX_AGE
                assert caught.value.advice is session_broker.Advice.SESSION
            session.rollback()
            assert session.execute("SELECT 1").scalar() == 1
            assert session.id != first
