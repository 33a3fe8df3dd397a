"""The asyncio API against a real broker: what is its own. What it shares with the blocking one is tested there."""

from __future__ import annotations

import asyncio
import gc
import time
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest
from conftest import Server
from support import Link, link, wait_until

import session_broker
from session_broker import (
    BrokerUnavailable,
    InterfaceError,
    Outcome,
    ProgrammingError,
    SessionEnded,
    Statement,
    StatementCancelled,
    aio,
)


@pytest.fixture
async def connected(target: str) -> AsyncIterator[aio.Broker]:
    """A connection to the run's broker."""
    async with aio.connect(target) as broker:
        yield broker


@pytest.fixture(autouse=True)
def _table(server: Server) -> None:
    with server.postgres.connect() as witness:
        witness.execute("DROP TABLE IF EXISTS tasks; CREATE TABLE tasks (id int PRIMARY KEY, text text)")
        witness.execute("ALTER TABLE tasks OWNER TO broker")


def count(server: Server) -> object:
    return server.postgres.value("SELECT count(*) FROM tasks")


async def until(promise: object) -> None:
    await asyncio.to_thread(wait_until, promise)  # type: ignore[arg-type]


async def test_a_block_commits_or_rolls_back(connected: aio.Broker, server: Server) -> None:
    async with connected.session() as session:
        await session.execute("INSERT INTO tasks VALUES ($1, $2)", [1, "one"])
    assert count(server) == 1
    with pytest.raises(session_broker.IntegrityError):
        async with connected.session() as session:
            await session.batch(["INSERT INTO tasks VALUES (2, 'two')", "INSERT INTO tasks VALUES (1, 'one')"])
    assert count(server) == 1
    assert session.closed


async def test_all_calls_are_there(connected: aio.Broker, server: Server) -> None:
    async with connected.session() as session:
        assert (await session.get_bind()).database == "main"
        assert (await session.info()).session_id == session.id
        session.begin(isolation_level="serializable")
        assert (await session.execute("SHOW transaction_isolation")).scalar() == "serializable"
        results = await session.batch([Statement("SELECT $1::int", parameter_sets=[[1], [2]])])
        assert [result.scalar() for result in results] == [1, 2]
        with pytest.raises(session_broker.DataError):
            async with session.savepoint():
                await session.execute("SELECT 1 / 0")
        await session.create_savepoint("a")
        await session.release_savepoint("a")
        assert await session.cancel() is False
        async with await session.stream("SELECT generate_series(1, 20000)") as stream:
            assert await stream.fetchmany(2) == [(1,), (2,)]
            assert sum([n async for (n,) in stream]) == 20_000 * 20_001 // 2 - 3
            assert (stream.row_count, stream.command_tag) == (20_000, "SELECT 20000")
        copied = await session.copy_in("tasks", b"1\tone\n2\ttwo\n")
        assert (copied.row_count, copied.byte_count) == (2, 12)
        async with await session.copy_out("tasks", format="csv") as copy:
            assert b"".join([piece async for piece in copy]) == b"1,one\n2,two\n"
        commit = await session.commit()
        assert await connected.resolve_commit(commit.commit_token) is Outcome.COMMITTED
        await session.rollback()
    (result,) = await connected.run(["SELECT count(*) FROM tasks"])
    assert result.scalar() == 2


async def test_transactions_are_repeated(connected: aio.Broker, server: Server) -> None:
    await connected.run(["INSERT INTO tasks VALUES (1, '0')"])
    attempts = 0
    both = asyncio.Event()

    async def increment(session: aio.Session) -> None:
        nonlocal attempts
        text = (await session.execute("SELECT text FROM tasks")).scalar()
        attempts += 1
        if attempts == 2:
            both.set()
        await both.wait()
        await session.execute("UPDATE tasks SET text = $1", [str(int(text) + 1)])

    await asyncio.gather(*(connected.transaction(increment, isolation_level="serializable") for _ in range(2)))
    assert server.postgres.value("SELECT text FROM tasks") == "2"
    assert attempts == 3


async def test_many_tasks_share_a_connection(connected: aio.Broker, server: Server) -> None:
    async def insert(number: int) -> None:
        async with connected.session() as session:
            await session.execute("INSERT INTO tasks VALUES ($1, '')", [number])

    await asyncio.gather(*(insert(number) for number in range(50)))
    assert count(server) == 50


async def test_a_cancelled_call_has_its_statement_stopped_and_rollback_goes_on(
    connected: aio.Broker, server: Server
) -> None:
    async with connected.session() as session:
        await session.execute("INSERT INTO tasks VALUES (1, 'one')")
        backend = (await session.info()).backend_pid
        active = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {backend} AND state = 'active'"
        task = asyncio.create_task(session.execute("SELECT pg_sleep(30)"))
        await until(lambda: server.postgres.value(active) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: server.postgres.value(active) == 0)
        with pytest.raises(ProgrammingError, match="rollback"):
            await session.execute("SELECT 1")
        await session.rollback()
        assert (await session.execute("SELECT count(*) FROM tasks")).scalar() == 0


async def test_a_task_that_is_cancelled_in_its_block_leaves_nothing(connected: aio.Broker, server: Server) -> None:
    begun = asyncio.Event()

    async def work() -> None:
        async with connected.session(labels={"test": "cancelled task"}) as session:
            await session.execute("INSERT INTO tasks VALUES (1, 'one')")
            begun.set()
            await session.execute("SELECT pg_sleep(30)")

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    held = "SELECT count(*) FROM pg_locks JOIN pg_class ON pg_class.oid = relation WHERE relname = 'tasks'"
    await until(lambda: server.postgres.value(held) == 0)
    assert count(server) == 0


async def test_a_block_that_is_cancelled_again_and_again_is_closed(connected: aio.Broker, server: Server) -> None:
    begun = asyncio.Event()

    async def work() -> None:
        async with connected.session() as session:
            await session.execute("INSERT INTO tasks VALUES (1, 'one')")
            begun.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await begun.wait()
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    held = "SELECT count(*) FROM pg_locks JOIN pg_class ON pg_class.oid = relation WHERE relname = 'tasks'"
    await until(lambda: server.postgres.value(held) == 0)


async def test_a_connection_that_is_closed_is_told_to_its_calls(target: str, server: Server) -> None:
    async with aio.connect(target) as broker:
        streaming, sleeping = broker.session(), broker.session()
        stream = await streaming.stream("SELECT CASE n WHEN 9000 THEN pg_sleep(30) END FROM generate_series(1, 9000) n")
        reading = asyncio.create_task(stream.fetchmany(9000))
        calling = asyncio.create_task(sleeping.execute("SELECT pg_sleep(30)"))
        asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        await until(lambda: server.postgres.value(asleep) == 2)
    for task in (reading, calling):
        with pytest.raises(InterfaceError, match="connection to the broker is closed"):
            await task
    for session in (streaming, sleeping):
        session.abandon()
    await until(lambda: server.postgres.value(asleep) == 0)


async def test_a_timeout_of_asyncio_ends_a_call(connected: aio.Broker) -> None:
    async with connected.session() as session:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(session.execute("SELECT pg_sleep(30)"), 0.2)
        await session.rollback()
        assert (await session.execute("SELECT 1")).scalar() == 1


async def test_cancel_stops_another_tasks_statement(connected: aio.Broker, server: Server) -> None:
    async with connected.session() as session:
        await session.execute("SELECT 1")
        backend = (await session.info()).backend_pid
        task = asyncio.create_task(session.execute("SELECT pg_sleep(30)"))
        active = f"SELECT count(*) FROM pg_stat_activity WHERE pid = {backend} AND state = 'active'"
        await until(lambda: server.postgres.value(active) == 1)
        with pytest.raises(InterfaceError, match="task"):
            await session.execute("SELECT 1")
        assert await session.cancel() is True
        with pytest.raises(StatementCancelled):
            await task
        await session.rollback()


async def test_another_event_loop_is_told(connected: aio.Broker) -> None:
    async def elsewhere() -> None:
        async with connected.session() as session:
            await session.execute("SELECT 1")

    await connected.run(["SELECT 1"])
    with pytest.raises(InterfaceError, match="event loop"):
        await asyncio.to_thread(asyncio.run, elsewhere())


async def test_a_closed_connection_says_so(target: str) -> None:
    broker = aio.connect(target)
    session = broker.session()
    await session.execute("SELECT 1")
    await broker.close()
    with pytest.raises(InterfaceError, match="connect"):
        await session.execute("SELECT 1")
    await session.close()


async def test_credentials_may_be_a_coroutine(target: str, admin: str) -> None:
    async def token() -> str:
        return admin

    async with aio.connect(target, credentials=token) as broker:
        assert isinstance(await broker.sessions(), list)


async def test_idle_sessions_are_kept_and_dropped_ones_are_let_go(
    connected: aio.Broker, target: str, admin: str
) -> None:
    labels = {"test": "asyncio keeper"}

    def alive() -> int:
        with session_broker.connect(target, credentials=admin) as operations:
            return len(operations.sessions(labels=labels))

    kept = connected.session(lease_ttl=1, labels=labels)
    dropped = connected.session(lease_ttl=1, labels=labels)
    await kept.execute("CREATE TEMPORARY TABLE kept (a int)")
    await dropped.execute("SELECT 1")
    quiet_until = time.monotonic() + 2.5
    await until(lambda: time.monotonic() > quiet_until)
    assert alive() == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del dropped
        gc.collect()
    await until(lambda: alive() == 1)
    assert (await kept.execute("SELECT count(*) FROM kept")).scalar() == 0
    await kept.close()


async def test_an_abandoned_session_is_let_go(connected: aio.Broker, target: str, admin: str) -> None:
    session = connected.session(lease_ttl=1)
    await session.execute("SELECT 1")
    name = session.id
    session.abandon()
    async with aio.connect(target, credentials=admin) as operations:
        live = [True]
        while live:
            live = [bool(found) for found in await operations.sessions(session_id=name)]
    with pytest.raises(InterfaceError):
        await session.execute("SELECT 1")


async def test_a_session_that_ended_is_told(connected: aio.Broker, target: str, admin: str) -> None:
    async with connected.session() as session, aio.connect(target, credentials=admin) as operations:
        await session.execute("SELECT 1")
        await operations.terminate(session.id, "a test")
        with pytest.raises(SessionEnded):
            await session.execute("SELECT 1")
        await session.rollback()
        assert (await session.execute("SELECT 1")).scalar() == 1


class TestLostAnswers:
    async def losing(self, cable: Link, task: asyncio.Task[object]) -> object:
        assert await asyncio.to_thread(cable.dropped.wait, 10)
        cable.cut()
        return await task

    async def test_a_statement_runs_once_and_a_commit_is_told(self, target: str, server: Server) -> None:
        with link(target) as cable:
            async with aio.connect(cable.target, follow_owner=False) as broker, broker.session() as session:
                await session.execute("SELECT 1")
                cable.drop_answers()
                await self.losing(cable, asyncio.create_task(session.execute("INSERT INTO tasks VALUES (1, 'one')")))
                cable.drop_answers()
                commit = await self.losing(cable, asyncio.create_task(session.commit()))
                assert isinstance(commit, session_broker.Commit)
                assert commit.outcome is Outcome.COMMITTED
        assert count(server) == 1

    @pytest.mark.parametrize(
        "commit",
        [
            pytest.param(lambda session: session.commit(), id="commit"),
            pytest.param(lambda session: session.execute("SELECT 1", commit=True), id="a statement that commits"),
        ],
    )
    async def test_a_commit_that_is_cancelled_is_told_when_asked_again(
        self, target: str, server: Server, commit: Callable[[aio.Session], Coroutine[None, None, object]]
    ) -> None:
        with link(target) as cable:
            async with aio.connect(cable.target, follow_owner=False) as broker, broker.session() as session:
                await session.execute("INSERT INTO tasks VALUES (1, 'one')")
                cable.drop_answers()
                task = asyncio.create_task(commit(session))
                assert await asyncio.to_thread(cable.dropped.wait, 10)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                cable.cut()
                assert (await session.commit()).outcome is Outcome.COMMITTED
        assert count(server) == 1

    async def test_a_stream_that_is_cut_is_not_complete(self, target: str) -> None:
        with link(target) as cable:
            async with aio.connect(cable.target, follow_owner=False) as broker, broker.session() as session:
                stream = await session.stream("SELECT repeat('x', 10000) FROM generate_series(1, 100000)")
                assert len(await stream.fetchmany(1)) == 1
                cable.cut()
                with pytest.raises(BrokerUnavailable):
                    async for _ in stream:
                        pass
                await session.rollback()
