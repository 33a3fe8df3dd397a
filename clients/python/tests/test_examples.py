"""The examples, run as they are, against a real broker."""

from __future__ import annotations

import functools
import importlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import Server
from fastapi.testclient import TestClient
from sqlalchemy import text
from support import BrokerProcess, Postgres, configuration, link

import session_broker

EXAMPLES = Path(__file__).parent.parent / "examples"

Load = Callable[[str, str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports an example as a program that reaches the broker at an address."""
    names = {path.stem for path in EXAMPLES.glob("*.py")}

    def example(name: str, target: str) -> ModuleType:
        monkeypatch.setenv("SESSION_BROKER_ADDRESS", target)
        monkeypatch.syspath_prepend(EXAMPLES)
        for loaded in names & sys.modules.keys():
            monkeypatch.delitem(sys.modules, loaded)
        return importlib.import_module(name)

    yield example
    if "database" in sys.modules:
        sys.modules["database"].engine.dispose()
    for loaded in names & sys.modules.keys():
        del sys.modules[loaded]


@pytest.fixture(autouse=True)
def balances(server: Server) -> Iterator[Callable[[], object]]:
    """What Ada and Grace have, which is set back."""
    yield lambda: server.postgres.value("SELECT array_agg(balance ORDER BY id) FROM accounts")
    with server.postgres.connect() as witness:
        witness.execute("UPDATE accounts SET balance = CASE id WHEN 1 THEN 100 ELSE 50 END")


def test_the_route_reads_and_transfers(load: Load, target: str, balances: Callable[[], object]) -> None:
    client = TestClient(load("app", target).app)

    assert client.get("/accounts/1").json() == {"id": 1, "owner": "Ada", "balance": "100.00"}
    assert client.get("/accounts/3").status_code == 404
    moved = client.post("/transfers", json={"source": 1, "target": 2, "amount": "12.50"})
    assert [account["balance"] for account in moved.json()] == ["87.50", "62.50"]
    assert balances() == [Decimal("87.50"), Decimal("62.50")]
    assert client.post("/transfers", json={"source": 1, "target": 2, "amount": "1000"}).status_code == 409
    assert client.post("/transfers", json={"source": 1, "target": 7, "amount": "1"}).status_code == 404
    assert client.post("/transfers", json={"source": 1, "target": 2, "amount": "-1"}).status_code == 422
    assert balances() == [Decimal("87.50"), Decimal("62.50")]


def test_session_scope_commits_or_rolls_back(load: Load, target: str, balances: Callable[[], object]) -> None:
    database = load("database", target)
    take = text("UPDATE accounts SET balance = balance - 1")
    with database.session_scope() as session:
        session.execute(take)

    def fail() -> None:
        with database.session_scope() as session:
            session.execute(take)
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    assert balances() == [Decimal(99), Decimal(49)]


def test_get_bind_tells_what_is_behind(load: Load, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    load("bound_to", server.target).main()

    first, second = capsys.readouterr().out.splitlines()
    assert (
        first
        == f"bound to postgresql+sessionbroker://{server.target}?profile=default, dialect postgresql+sessionbroker"
    )
    version = server.postgres.value("SHOW server_version")
    assert second == f"engine main: database main as broker, PostgreSQL {version}"


def test_an_idle_session_is_ended_and_survived(
    load: Load,
    start_broker: Callable[[str], BrokerProcess],
    postgres: Postgres,
    balances: Callable[[], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    broker = start_broker(configuration(postgres, profile='idle_in_transaction_timeout = "1s"'))
    load("idle_session", broker.target).main(1.5)

    first, second = capsys.readouterr().out.splitlines()
    assert first == "ended: IDLE_TIMEOUT, and what it had not committed is rolled back"
    assert second == "and on with another: 100.00"
    assert balances() == [Decimal(100), Decimal(50)]


def test_a_commit_torn_in_the_middle_is_resolved(
    load: Load, target: str, balances: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:

    with link(target) as cable:
        database = load("database", cable.target)
        torn = load("torn_commit", cable.target)
        impatient = {"retry": session_broker.Retry(attempts_max=2, time_max=1.0), "follow_owner": False}
        engine = database.create_engine(database.engine.url, connect_args=impatient)
        outcomes: list[object] = []
        asks = threading.Event()
        resolve = torn.resolve

        def noticed(token: str) -> object:
            asks.set()
            return resolve(token)

        monkeypatch.setattr(torn, "resolve", noticed)
        with database.SessionLocal(bind=engine) as session:
            session.execute(text("UPDATE accounts SET balance = balance + 12.50 WHERE id = 1"))
            cable.drop_answers()
            asking = threading.Thread(target=lambda: outcomes.append(torn.commit(session)))
            asking.start()
            assert cable.dropped.wait(10)
            cable.refuse()
            cable.cut()
            assert asks.wait(30)
            assert balances() == [Decimal("112.50"), Decimal(50)]
            assert not outcomes
            cable.refuse(False)
            asking.join(60)
        engine.dispose()

    assert [str(outcome) for outcome in outcomes] == [str(session_broker.Outcome.COMMITTED)]


def test_a_commit_is_resolved_once_postgresql_takes_connections_again(
    load: Load, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = load("torn_commit", server.target)
    outcomes: list[object] = []
    refused, goes_on = threading.Event(), threading.Event()

    def pause(_: float) -> None:
        refused.set()
        goes_on.wait(10)

    once = functools.partial(session_broker.connect, server.target, retry=session_broker.Retry(attempts_max=1))
    with once() as broker, broker.session() as session:
        session.execute("UPDATE accounts SET balance = balance + 1 WHERE id = 1")
        token = session.commit().commit_token
    monkeypatch.setattr(torn, "time", SimpleNamespace(sleep=pause))
    monkeypatch.setattr(torn, "session_broker", SimpleNamespace(connect=lambda _: once()))
    asking = threading.Thread(target=lambda: outcomes.append(torn.resolve(token)))
    with server.postgres.connect() as witness:
        witness.execute("ALTER ROLE broker CONNECTION LIMIT 0")
        witness.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'broker'")
        try:
            asking.start()
            assert refused.wait(30)
        finally:
            witness.execute("ALTER ROLE broker CONNECTION LIMIT -1")
            goes_on.set()
    asking.join(60)

    assert outcomes == [session_broker.Outcome.COMMITTED]


def test_the_examples_are_all_here() -> None:
    tested = set(re.findall(r'load\("(\w+)"', Path(__file__).read_text()))

    assert tested == {path.stem for path in EXAMPLES.glob("*.py")}
