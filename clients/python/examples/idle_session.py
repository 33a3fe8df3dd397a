"""A session that its program left idle for too long: seen, and survived.

    python idle_session.py SECONDS

With a transaction open the broker ends it after a minute, unless its profile says otherwise.
"""

from __future__ import annotations

import sys
import time

from database import SessionLocal
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

import session_broker


def balance(session: Session) -> object:
    """What Ada has."""
    return session.scalar(text("SELECT balance FROM accounts WHERE id = 1"))


def main(seconds: float) -> None:
    """Holds a transaction, does nothing, and goes on."""
    with SessionLocal() as session:
        session.execute(text("UPDATE accounts SET balance = balance + 1 WHERE id = 1"))
        time.sleep(seconds)
        try:
            print(f"still there, with {balance(session)}")
        except OperationalError as error:
            if not isinstance(error.orig, session_broker.SessionEnded):
                raise
            print(f"ended: {error.orig.end_reason.name}, and what it had not committed is rolled back")
            session.rollback()
            print(f"and on with another: {balance(session)}")


if __name__ == "__main__":
    main(float(sys.argv[1]))
