"""COPY and notifications."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from conftest import Server

import session_broker
from session_broker import Broker, DataError, Notification, Outcome, ProgrammingError, aio


@pytest.fixture(autouse=True)
def _table(server: Server) -> None:
    with server.postgres.connect() as witness:
        witness.execute("DROP TABLE IF EXISTS goods; CREATE TABLE goods (id int PRIMARY KEY, name text)")
        witness.execute("ALTER TABLE goods OWNER TO broker")


@pytest.mark.parametrize(
    "data", [b"1,a\n2,b\n", bytearray(b"1,a\n2,b\n"), io.BytesIO(b"1,a\n2,b\n"), [b"1,", b"a\n2,b\n"]]
)
def test_copy_in_takes_bytes_files_and_iterables(broker: Broker, server: Server, data: object) -> None:
    with broker.session() as session:
        copied = session.copy_in("goods", data, columns=["id", "name"], format="csv", commit=True)  # type: ignore[arg-type]
        assert (copied.row_count, copied.byte_count) == (2, 8)
        assert copied.commit is not None
        assert copied.commit.outcome is Outcome.COMMITTED
    assert server.postgres.value("SELECT string_agg(name, '' ORDER BY id) FROM goods") == "ab"


@pytest.mark.parametrize("data", ["1,a\n", io.StringIO("1,a\n"), [b"1,", "a\n"], 5])
def test_copy_in_of_what_is_no_bytes_is_refused(broker: Broker, data: object, server: Server) -> None:
    with pytest.raises(ProgrammingError, match=r"data: has a (str|int): give bytes"), broker.session() as session:
        session.copy_in("goods", data, format="csv")  # type: ignore[arg-type]
    assert server.postgres.value("SELECT count(*) FROM goods") == 0


def test_more_than_a_message_goes_both_ways(broker: Broker) -> None:
    lines = b"".join(b"%d\t%s\n" % (number, b"x" * 100) for number in range(20_000))
    with broker.session() as session:
        assert session.copy_in("goods", lines).byte_count == len(lines)
        with session.copy_out("goods") as copy:
            assert b"".join(copy) == lines
            assert (copy.row_count, copy.byte_count) == (20_000, len(lines))
        with session.copy_out(query="SELECT count(*) FROM goods", format="csv", header=True) as copy:
            assert b"".join(copy) == b"count\n20000\n"


def test_wrong_data_is_told_with_its_line(broker: Broker, server: Server) -> None:
    with pytest.raises(DataError) as caught, broker.session() as session:
        session.copy_in("goods", b"1\ta\nx\tb\n")
    assert caught.value.pg is not None
    assert "line 2" in caught.value.pg.where
    assert server.postgres.value("SELECT count(*) FROM goods") == 0


def test_data_that_fails_is_not_copied(broker: Broker, server: Server) -> None:
    def data() -> Iterator[bytes]:
        yield b"1\ta\n"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), broker.session() as session:
        session.copy_in("goods", data(), commit=True)
    assert server.postgres.value("SELECT count(*) FROM goods") == 0


def test_wrong_options_are_named(broker: Broker) -> None:
    with broker.session() as session:
        with pytest.raises(ProgrammingError, match="format"):
            session.copy_in("goods", b"", format="xml")
        with pytest.raises(TypeError, match="separator"):
            session.copy_in("goods", b"", separator=";")  # type: ignore[call-arg]
        session.begin(read_only=False)
        with pytest.raises(ProgrammingError, match="COPY"):
            session.copy_in("goods", b"")


def test_notifications_come_in_order(broker: Broker) -> None:
    with broker.listen("goods", "Orders") as listener:
        with broker.session() as session:
            session.execute("NOTIFY goods, 'one'")
            session.execute("SELECT pg_notify($1, $2)", ["Orders", "two"])
        told = iter(listener)
        first, second = next(told), next(told)
    assert isinstance(first, Notification)
    assert isinstance(second, Notification)
    assert (first.channel, first.payload) == ("goods", "one")
    assert (second.channel, second.payload) == ("Orders", "two")
    assert first.backend_pid > 0


async def test_notifications_come_to_tasks_too(target: str) -> None:
    async with aio.connect(target) as broker, await broker.listen("goods") as listener:
        await broker.run(["NOTIFY goods, 'one'"])
        async for told in listener:
            assert isinstance(told, Notification)
            assert told.payload == "one"
            break


def test_a_wrong_channel_is_told(broker: Broker) -> None:
    with pytest.raises(session_broker.ProgrammingError) as caught:
        broker.listen("")
    assert caught.value.reason == "INVALID_REQUEST"
