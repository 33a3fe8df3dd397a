"""Fixtures: a PostgreSQL and a broker for the run, and brokers with configurations of their own.

The broker's program is $SESSION_BROKER, or `session-broker` on the PATH.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from support import ADMIN_TOKEN, BrokerProcess, Postgres, configuration

import session_broker


@dataclass(frozen=True)
class Server:
    """A broker and the PostgreSQL behind it: engine "main" is the database "main"."""

    postgres: Postgres
    broker: BrokerProcess

    @property
    def target(self) -> str:
        """HOST:PORT of the broker."""
        return self.broker.target


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One PostgreSQL for the run."""
    made = Postgres()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def server(postgres: Postgres) -> Iterator[Server]:
    """One broker for the run: everyone may do everything, and the token of `admin` has the admin right."""
    profile = 'statement_timeout = "30s"\nlease_ttl = "30s"'
    broker = BrokerProcess(configuration(postgres, profile=profile))
    yield Server(postgres, broker)
    broker.stop()


@pytest.fixture(scope="session")
def target(server: Server) -> str:
    """HOST:PORT of the run's broker."""
    return server.target


@pytest.fixture(scope="session")
def admin() -> str:
    """The bearer token of the principal with the admin right, on every broker of the tests."""
    return ADMIN_TOKEN


@pytest.fixture
def start_broker(postgres: Postgres) -> Iterator[Callable[[str], BrokerProcess]]:
    """Starts a broker with a configuration of its own, `support.configuration(...)`; it ends with the test."""
    started: list[BrokerProcess] = []

    def start(text: str) -> BrokerProcess:
        started.append(BrokerProcess(text))
        return started[-1]

    yield start
    for broker in started:
        broker.stop()


@pytest.fixture
def broker(target: str) -> Iterator[session_broker.Broker]:
    """A connection to the run's broker."""
    with session_broker.connect(target) as connected:
        yield connected
