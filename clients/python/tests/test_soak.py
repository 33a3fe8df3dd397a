"""Many threads while links are cut, backends killed and the broker crashes: nobody hears a falsehood, nobody is stuck.

    SOAK_SECONDS=600 SOAK_THREADS=32 python -m pytest -m soak

A short run of the same is among the other tests.
"""

from __future__ import annotations

import collections
import itertools
import os
import random
import threading
import time
from collections.abc import Callable

import pytest
from support import ADMIN_TOKEN, BrokerProcess, Link, Postgres, configuration, link, wait_until

import session_broker
from session_broker import Broker, CommitUnknown, EndReason, Error, Outcome, SessionEnded, Statement

# A session that nobody ends outlives every wait of this test.
PROFILE = 'lease_ttl = "3m"\nstatement_timeout = "10s"'

# The lease of sessions that are left idle for longer.
IDLE_LEASE = 3.0


class Ledger:
    """What each transaction was told became of it."""

    def __init__(self) -> None:
        self.committed: set[int] = set()
        self.failed: dict[int, str] = {}
        self.unknown: dict[int, str | None] = {}
        self.wrong: list[str] = []
        self.count = itertools.count()

    def worker(self, broker: Broker, stop: threading.Event) -> None:
        """Writes one number after another, each way there is."""
        self._write(broker, stop, self.in_steps, self.in_one_call, self.as_batch, self.by_run, self.by_transaction)

    def idler(self, broker: Broker, stop: threading.Event) -> None:
        """Writes one number after another, and does nothing for long before each."""
        self._write(broker, stop, self.after_a_while)

    def _write(self, broker: Broker, stop: threading.Event, *ways: Callable[[Broker, int], None]) -> None:
        way = itertools.cycle(ways)
        while not stop.is_set():
            number = next(self.count)
            try:
                next(way)(broker, number)
                self.committed.add(number)
            except CommitUnknown as error:
                self.unknown[number] = error.commit_token
            except Error as error:
                self.failed[number] = repr(error)
            except Exception as error:
                self.wrong.append(repr(error))

    def in_steps(self, broker: Broker, number: int) -> None:
        with broker.session() as session:
            session.execute("INSERT INTO ledger VALUES ($1, 0)", [number])
            session.execute("UPDATE ledger SET steps = steps + 1 WHERE id = $1", [number])
            with session.stream("SELECT generate_series(1, 1000)") as stream:
                rows = list(stream)
            if rows != [(n,) for n in range(1, 1001)]:
                self.wrong.append(f"{len(rows)} rows")
            session.execute("UPDATE ledger SET steps = steps + 1 WHERE id = $1", [number])

    def in_one_call(self, broker: Broker, number: int) -> None:
        with broker.session() as session:
            session.execute("INSERT INTO ledger VALUES ($1, 2)", [number], commit=True)

    def as_batch(self, broker: Broker, number: int) -> None:
        add = Statement("UPDATE ledger SET steps = steps + 1 WHERE id = $1", parameter_sets=[[number]] * 2)
        with broker.session() as session:
            session.batch([("INSERT INTO ledger VALUES ($1, 0)", [number]), add])

    def after_a_while(self, broker: Broker, number: int) -> None:
        with broker.session(lease_ttl=IDLE_LEASE) as session:
            session.execute("SELECT 1", commit=True)
            time.sleep(1.3 * IDLE_LEASE)
            try:
                session.execute("INSERT INTO ledger VALUES ($1, 2)", [number], commit=True)
            except SessionEnded as error:
                if error.end_reason is EndReason.LEASE_EXPIRED:
                    self.wrong.append("an idle session was not kept")
                raise

    def by_run(self, broker: Broker, number: int) -> None:
        key = f"soak {number}"
        broker.run(
            [Statement("INSERT INTO ledger VALUES ($1, 2)", [number], expect=1)], idempotency_key=key, timeout=20
        )

    def by_transaction(self, broker: Broker, number: int) -> None:
        def work(session: session_broker.Session) -> None:
            session.execute("INSERT INTO ledger VALUES ($1, 1)", [number])
            session.execute("UPDATE ledger SET steps = steps + 1 WHERE id = $1", [number])

        broker.transaction(work)


class Chaos:
    """What goes wrong, at random, with a known seed."""

    def __init__(self, postgres: Postgres, cable: Link, text: str) -> None:
        self._postgres = postgres
        self._cable = cable
        self._text = text
        self._random = random.Random(9)
        self.broker = BrokerProcess(text)
        self.done: collections.Counter[str] = collections.Counter()
        cable.lead_to(self.broker.target)

    def work(self, stop: threading.Event) -> None:
        """Goes on until it is stopped."""
        crash_at = time.monotonic() + 5
        while not stop.wait(self._random.uniform(0.05, 0.5)):
            if time.monotonic() > crash_at:
                self._crash()
                crash_at = time.monotonic() + 20
            elif self._random.random() < 0.5:
                self._cable.cut()
                self.done["cut"] += 1
            else:
                self._kill_backend()

    def _kill_backend(self) -> None:
        with self._postgres.connect("soak") as witness:
            found = witness.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'broker' AND datname = 'soak' "
                "ORDER BY random() LIMIT 1"
            ).fetchone()
        self.done["backend"] += bool(found)

    def _crash(self) -> None:
        self.broker.kill()
        self.broker.stop()
        self.broker = BrokerProcess(self._text)
        self._cable.lead_to(self.broker.target)
        self._cable.cut()
        self.done["crash"] += 1


def soak(postgres: Postgres, seconds: float, threads: int) -> None:
    """Lets them work, and compares what they were told with what is there."""
    with postgres.connect("postgres") as superuser:
        superuser.execute("DROP DATABASE IF EXISTS soak WITH (FORCE)")
    postgres.create_database("soak")
    with postgres.connect("soak") as witness:
        witness.execute("CREATE TABLE ledger (id int PRIMARY KEY, steps int); ALTER TABLE ledger OWNER TO broker")
        witness.execute(
            "CREATE TABLE idempotency (principal text, key text, request bytea NOT NULL, answer bytea, "
            "transaction_id xid8 NOT NULL DEFAULT pg_current_xact_id(), created_at timestamptz NOT NULL DEFAULT now(), "
            "PRIMARY KEY (principal, key)); ALTER TABLE idempotency OWNER TO broker"
        )
    text = configuration(postgres, profile=PROFILE, engine='idempotency_table = "idempotency"')
    text = text.replace(postgres.url(), postgres.url("soak"))
    ledger, stop = Ledger(), threading.Event()
    with link("127.0.0.1:1") as cable:
        chaos = Chaos(postgres, cable, text)
        try:
            with (
                session_broker.connect(cable.target, follow_owner=False) as broker,
                session_broker.connect(cable.target) as following,
            ):
                brokers = itertools.cycle((broker, following))
                work = [ledger.worker] * threads + [ledger.idler] * (threads // 2)
                workers = [threading.Thread(target=each, args=[next(brokers), stop]) for each in work]
                breaking = threading.Thread(target=chaos.work, args=[stop])
                for thread in (*workers, breaking):
                    thread.start()
                time.sleep(seconds)
                stop.set()
                for thread in (breaking, *workers):
                    thread.join(60)
                    assert not thread.is_alive(), "a thread is stuck"
                check(ledger, postgres, broker)
                with session_broker.connect(chaos.broker.target, credentials=ADMIN_TOKEN) as operations:
                    wait_until(lambda: operations.sessions() == [])
        finally:
            chaos.broker.stop()
    print(
        f"{len(ledger.committed)} committed, {len(ledger.failed)} failed, {len(ledger.unknown)} unknown; {chaos.done}"
    )


def check(ledger: Ledger, postgres: Postgres, broker: Broker) -> None:
    """Nobody was told a falsehood."""
    assert ledger.wrong == []
    outcomes = {number: broker.resolve_commit(token, 5) for number, token in ledger.unknown.items() if token}
    with postgres.connect("soak") as witness:
        there = {
            int(number): int(steps) for number, steps in witness.execute("SELECT id, steps FROM ledger").fetchall()
        }
    assert ledger.committed - there.keys() == set(), "told committed, and not there"
    assert ledger.failed.keys() & there.keys() == set(), "told failed, and there"
    assert {
        number for number, outcome in outcomes.items() if (outcome is Outcome.COMMITTED) != (number in there)
    } == set()
    assert {number for number, steps in there.items() if steps != 2} == set(), "a statement ran twice, or not at all"
    assert len(ledger.committed) > len(ledger.unknown)


def test_nobody_is_told_a_falsehood(postgres: Postgres) -> None:
    soak(postgres, seconds=6, threads=8)


@pytest.mark.soak
def test_nobody_is_told_a_falsehood_for_long(postgres: Postgres) -> None:
    soak(postgres, float(os.environ.get("SOAK_SECONDS", "600")), int(os.environ.get("SOAK_THREADS", "32")))
