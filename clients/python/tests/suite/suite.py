"""SQLAlchemy's suite for dialects, as it comes but for one question that it has for SQLAlchemy's own drivers only."""

import sqlalchemy.dialects.postgresql.provision  # noqa: F401
from sqlalchemy.testing.suite import *
from sqlalchemy.testing.suite import ServerSideCursorsTest as _ServerSideCursorsTest


class ServerSideCursorsTest(_ServerSideCursorsTest):
    def _is_server_side(self, cursor):
        return getattr(cursor, "server_side", False) or super()._is_server_side(cursor)
