"""A commit whose answer is lost, and how to know what became of it.

`commit` itself asks, for ten seconds. When nobody answers so long it raises `CommitUnknown`, whose token any broker
with the same engine and key opens, then or much later.
"""

from __future__ import annotations

import time
from decimal import Decimal

from database import HOST, PORT, SessionLocal
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import session_broker
from session_broker import Advice, BrokerUnavailable, CommitUnknown, Error, Outcome


def commit(session: Session) -> Outcome:
    """Commits; where the answer is lost, asks until somebody knows.

    Raises:
        DBAPIError: The commit failed, and nothing of it is there.
        CommitUnknown: There is no token to ask with.
    """
    try:
        session.commit()
    except DBAPIError as error:
        if not isinstance(error.orig, CommitUnknown):
            raise
        if error.orig.commit_token is None:
            raise error.orig from None
        return resolve(error.orig.commit_token)
    return Outcome.COMMITTED


def resolve(commit_token: str) -> Outcome:
    """Asks what became of a commit, while the broker or its PostgreSQL is away too."""
    with session_broker.connect(f"{HOST}:{PORT}") as broker:
        while True:
            try:
                outcome = broker.resolve_commit(commit_token)
            except Error as error:
                if not isinstance(error, BrokerUnavailable) and error.advice is not Advice.CALL:
                    raise
                time.sleep(0.5)
                continue
            if outcome is not Outcome.IN_PROGRESS:
                return outcome


def main() -> None:
    """Pays Ada, and says for certain whether it happened."""
    with SessionLocal() as session:
        session.execute(
            text("UPDATE accounts SET balance = balance + :amount WHERE id = 1"), {"amount": Decimal("12.50")}
        )
        print(commit(session).name)


if __name__ == "__main__":
    main()
