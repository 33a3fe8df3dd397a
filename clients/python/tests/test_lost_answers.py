"""Answers that do not come: what ran once runs once, and what became of a commit is told."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
from conftest import Server
from support import BrokerProcess, Link, Postgres, configuration, link, wait_until

import session_broker
from session_broker import (
    Advice,
    Broker,
    BrokerUnavailable,
    CommitRolledBack,
    CommitUnknown,
    Outcome,
    ProgrammingError,
    Retry,
    SessionUnknown,
)
from session_broker._retry import Attempts


@pytest.fixture(autouse=True)
def _table(server: Server) -> None:
    with server.postgres.connect() as witness:
        witness.execute("DROP TABLE IF EXISTS losses; CREATE TABLE losses (id int)")
        witness.execute("ALTER TABLE losses OWNER TO broker")


@pytest.fixture
def cable(target: str) -> Iterator[Link]:
    """What connects the client with the broker."""
    with link(target) as made:
        yield made


@pytest.fixture
def cut_broker(cable: Link) -> Iterator[Broker]:
    """A connection by the cable."""
    with session_broker.connect(cable.target, follow_owner=False) as broker:
        yield broker


def rows(server: Server) -> object:
    return server.postgres.value("SELECT count(*) FROM losses")


def losing(cable: Link, call: Callable[[], object], *, restored: bool = True) -> None:
    """Makes a call, drops its answer, and then cuts the connection; new ones are refused unless it is restored."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    cable.drop_answers()
    thread = threading.Thread(target=work)
    thread.start()
    assert cable.dropped.wait(10), "no answer came"
    cable.refuse(not restored)
    cable.cut()
    thread.join(30)
    assert not thread.is_alive()
    if failures:
        raise failures[0]


def test_a_statement_whose_answer_is_lost_runs_once(cable: Link, cut_broker: Broker, server: Server) -> None:
    with cut_broker.session() as session:
        session.execute("INSERT INTO losses VALUES (1)")
        losing(cable, lambda: session.execute("INSERT INTO losses VALUES (2)"))
        assert session.execute("SELECT count(*) FROM losses").scalar() == 2
    assert rows(server) == 2


def test_a_batch_whose_answer_is_lost_runs_once(cable: Link, cut_broker: Broker, server: Server) -> None:
    with cut_broker.session() as session:
        session.execute("SELECT 1")
        losing(cable, lambda: session.batch(["INSERT INTO losses VALUES (1)"] * 3, commit=True))
        assert rows(server) == 3


def test_a_session_whose_grant_is_lost_is_granted_once(
    cable: Link, cut_broker: Broker, server: Server, admin: str
) -> None:
    cut_broker.run(["SELECT 1"])
    session = cut_broker.session(labels={"test": "granted once"})
    losing(cable, session.info)
    with session_broker.connect(server.target, credentials=admin) as operations:
        found = operations.sessions(labels={"test": "granted once"})
        assert [overview.session_id for overview in found] == [session.id]
    session.close()


def test_a_commit_whose_answer_is_lost_is_told(cable: Link, cut_broker: Broker, server: Server) -> None:
    with cut_broker.session() as session:
        session.execute("INSERT INTO losses VALUES (1)")
        told: list[session_broker.Commit] = []
        losing(cable, lambda: told.append(session.commit()))
        assert told[0].outcome is Outcome.COMMITTED
        assert session.commit() == told[0]
    assert rows(server) == 1


def test_a_commit_that_nobody_answers_is_unknown_and_told_when_asked_again(
    cable: Link, server: Server, target: str
) -> None:
    with session_broker.connect(cable.target, follow_owner=False) as broker:
        session = broker.session()
        session.execute("INSERT INTO losses VALUES (1)")
        with pytest.raises(CommitUnknown) as caught:
            losing(cable, session.commit, restored=False)
        assert caught.value.advice is Advice.RESOLVE_COMMIT
        assert caught.value.commit_token
        with pytest.raises(ProgrammingError, match="commit"):
            session.execute("SELECT 1")
        with session_broker.connect(target) as elsewhere:
            assert elsewhere.resolve_commit(caught.value.commit_token) is Outcome.COMMITTED
        cable.refuse(False)
        assert session.commit().outcome is Outcome.COMMITTED
        assert rows(server) == 1
        assert session.execute("SELECT count(*) FROM losses").scalar() == 1
        session.close()


@pytest.mark.parametrize("arrives", [True, False])
def test_a_commit_with_a_statement_that_nobody_answers_is_told_when_asked_again(
    cable: Link, cut_broker: Broker, server: Server, arrives: bool
) -> None:
    session = cut_broker.session()
    session.execute("INSERT INTO losses VALUES (1)")
    if not arrives:
        cable.drop_requests()
    with pytest.raises(CommitUnknown) as caught:
        losing(cable, lambda: session.execute("INSERT INTO losses VALUES (2)", commit=True), restored=False)
    assert caught.value.commit_token
    cable.refuse(False)
    if arrives:
        assert session.commit().outcome is Outcome.COMMITTED
    else:
        with pytest.raises(CommitRolledBack):
            session.commit()
    assert rows(server) == (2 if arrives else 0)
    assert session.execute("SELECT count(*) FROM losses").scalar() == rows(server)
    session.close()


def test_an_answer_that_was_too_large_to_keep_is_lost(cable: Link, cut_broker: Broker, server: Server) -> None:
    with cut_broker.session() as session:
        session.execute("SELECT 1")
        with pytest.raises(session_broker.OperationalError) as caught:
            losing(cable, lambda: session.execute("INSERT INTO losses VALUES (1) RETURNING repeat('x', 1000000)"))
        assert (caught.value.reason, caught.value.advice) == ("SEQ_ANSWER_GONE", Advice.SESSION)
        with pytest.raises(ProgrammingError, match="rollback"):
            session.commit()
        session.rollback()
    assert rows(server) == 0


def test_a_broker_that_dies_before_the_commit_arrives_has_rolled_back(
    start_broker: Callable[[str], BrokerProcess], postgres: Postgres, server: Server
) -> None:
    first = start_broker(configuration(postgres))
    with session_broker.connect(first.target, retry=Retry(attempts_max=1)) as broker:
        session = broker.session()
        session.execute("INSERT INTO losses VALUES (1)")
        first.kill()
        with pytest.raises((BrokerUnavailable, CommitUnknown)):
            session.commit()
        session.close()
    assert rows(server) == 0


def test_a_commit_lost_with_its_broker_is_resolved_by_another(
    start_broker: Callable[[str], BrokerProcess], postgres: Postgres, server: Server, target: str
) -> None:
    doomed = start_broker(configuration(postgres))
    with link(doomed.target) as cable, session_broker.connect(cable.target, follow_owner=False) as broker:
        session = broker.session()
        session.execute("INSERT INTO losses VALUES (1)")
        told: list[session_broker.Commit] = []
        cable.drop_answers()
        thread = threading.Thread(target=lambda: told.append(session.commit()))
        thread.start()
        assert cable.dropped.wait(10)
        doomed.kill()
        cable.lead_to(target)
        cable.cut()
        thread.join(30)
        assert told[0].outcome is Outcome.COMMITTED
        assert rows(server) == 1
        assert session.execute("SELECT 1").scalar() == 1
        session.close()


def test_a_commit_that_another_broker_knows_nothing_of_is_told_as_it_is(
    start_broker: Callable[[str], BrokerProcess], postgres: Postgres, server: Server, target: str
) -> None:
    doomed = start_broker(configuration(postgres))
    with link(doomed.target) as cable, session_broker.connect(cable.target, follow_owner=False) as broker:
        session = broker.session()
        session.execute("INSERT INTO losses VALUES (1)")
        doomed.kill()
        cable.lead_to(target)
        cable.cut()
        with pytest.raises((SessionUnknown, CommitRolledBack)) as caught:
            session.commit()
        assert caught.value.advice is Advice.SESSION
        session.rollback()
        assert session.execute("SELECT count(*) FROM losses").scalar() == 0
        session.close()


def test_a_statement_that_nobody_answers_has_its_transaction_rolled_back(
    cable: Link, server: Server, target: str
) -> None:
    with session_broker.connect(cable.target, follow_owner=False) as broker:
        session = broker.session()
        session.execute("INSERT INTO losses VALUES (1)")
        name = session.id
        with pytest.raises(BrokerUnavailable) as caught:
            losing(cable, lambda: session.execute("INSERT INTO losses VALUES (2)"), restored=False)
        assert caught.value.advice is Advice.SESSION
        cable.refuse(False)
        with pytest.raises(ProgrammingError, match="rollback"):
            session.commit()
        session.rollback()
        session.execute("INSERT INTO losses VALUES (3)")
        assert session.id != name
        session.commit()
        session.close()
    assert server.postgres.value("SELECT array_agg(id) FROM losses") == [3]


def test_a_run_with_a_key_runs_once_and_one_without_is_unknown(cable: Link, cut_broker: Broker, server: Server) -> None:
    cut_broker.run(["SELECT 1"])
    losing(cable, lambda: cut_broker.run(["INSERT INTO losses VALUES (1)"], idempotency_key="lost answer"))
    assert rows(server) == 1
    with pytest.raises(CommitUnknown, match="idempotency_key"):
        losing(cable, lambda: cut_broker.run(["INSERT INTO losses VALUES (2)"]))
    wait_until(lambda: rows(server) == 2)


def test_a_stream_that_is_cut_is_not_complete(cable: Link, cut_broker: Broker) -> None:
    with cut_broker.session() as session:
        stream = session.stream("SELECT repeat('x', 10000) FROM generate_series(1, 100000)")
        assert len(stream.fetchmany(1)) == 1
        cable.cut()
        with pytest.raises(BrokerUnavailable):
            for _ in stream:
                pass
        with pytest.raises(ProgrammingError, match="rollback"):
            session.execute("SELECT 1")
        session.rollback()
        assert session.execute("SELECT 1").scalar() == 1


def test_savepoints_are_not_repeated(cable: Link, cut_broker: Broker) -> None:
    with cut_broker.session() as session:
        session.execute("INSERT INTO losses VALUES (1)")
        with pytest.raises(BrokerUnavailable):
            losing(cable, lambda: session.create_savepoint("here"))
        session.rollback()


def test_the_time_for_repeats_begins_with_the_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.chain([0.0, 100.0, 104.0], itertools.repeat(111.0))
    monkeypatch.setattr("session_broker._retry.time.monotonic", lambda: next(clock))
    attempts = Attempts(Retry(attempts_max=9, time_max=10.0))
    lost = BrokerUnavailable("no answer")
    pauses = [attempts.pause_after(lost, safe=True, unchanged=True) for _ in range(3)]
    assert [pause is not None for pause in pauses] == [True, True, False]
