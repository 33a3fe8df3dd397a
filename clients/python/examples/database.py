"""An engine from a dict, sessions made by `sessionmaker`, and two ways to lend them: the notes' code on the broker.

What differs from the same file on psycopg is the dict: the broker's address instead of PostgreSQL's, and no password of
the database. `database` is the name of an engine in the broker's configuration; without it, the broker's default.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, create_engine
from sqlalchemy.orm import Session, sessionmaker

HOST, _, PORT = os.environ.get("SESSION_BROKER_ADDRESS", "localhost:50051").rpartition(":")

DATABASE: dict[str, Any] = {
    "drivername": "postgresql+sessionbroker",
    "host": HOST,
    "port": int(PORT),
    "database": os.environ.get("SESSION_BROKER_ENGINE"),
    "query": {"profile": "default"},
}

engine = create_engine(URL.create(**DATABASE))
SessionLocal = sessionmaker(engine)


def get_session() -> Iterator[Session]:
    """For FastAPI's `Depends`: a session for one request, closed after it. What it does not commit is rolled back."""
    with SessionLocal() as session:
        yield session


@contextmanager
def session_scope() -> Iterator[Session]:
    """A transaction: committed at the end of the block, rolled back on an error."""
    session = SessionLocal()
    try:
        yield session
        session.commit()
    except BaseException:
        session.rollback()
        raise
    finally:
        session.close()
