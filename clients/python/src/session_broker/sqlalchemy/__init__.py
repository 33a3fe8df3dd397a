"""SQLAlchemy dialects: ``postgresql+sessionbroker://HOST:PORT/ENGINE``, for engines of both kinds."""

from session_broker.sqlalchemy._asyncio import SessionBrokerAsyncDialect
from session_broker.sqlalchemy._dialect import SessionBrokerDialect

__all__ = ["SessionBrokerAsyncDialect", "SessionBrokerDialect"]
