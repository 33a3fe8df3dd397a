"""The dialect over `session_broker.dbapi`.

An engine has one connection to the broker, which its sessions share; a SQLAlchemy connection is a session. Its pool is
`NullPool`: a session is granted without touching the database, and the connections are the broker's to pool.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from sqlalchemy import event, exc, pool, util
from sqlalchemy.dialects.postgresql.base import PGDialect, PGExecutionContext
from sqlalchemy.engine import URL, Connection, Engine

from session_broker import _sync, dbapi
from session_broker.errors import Advice, BrokerUnavailable, SessionEnded, SessionUnknown
from session_broker.sqlalchemy._types import COLSPECS

PORT = 50051

_LEVELS = ("AUTOCOMMIT", "READ COMMITTED", "READ UNCOMMITTED", "REPEATABLE READ", "SERIALIZABLE")

# What may stand behind the URL's "?", and how it is read.
_SESSION_ARGUMENTS: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("profile", "role", "isolation_level"), str),
    **dict.fromkeys(("lease_ttl", "statement_timeout", "lock_timeout", "transaction_timeout", "timeout"), float),
    **dict.fromkeys(("read_only", "deferrable", "attach", "tls", "follow_owner"), util.asbool),
    "plaintext_beyond_loopback": util.asbool,
}
_CONNECT_OPTIONS: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("user", "application_name", "time_zone", "ssl_mode", "target_session_attrs"), str),
    **dict.fromkeys(("load_balance_hosts", "channel_binding"), str),
    **dict.fromkeys(("connect_timeout", "tcp_user_timeout", "client_connection_check_interval"), float),
    "idle_in_transaction_session_timeout": float,
    "search_path": lambda text: [schema.strip() for schema in text.split(",")],
}


def connect_arguments(url: URL) -> dict[str, Any]:
    """What a URL says: the target, and the keywords of `session_broker.connect`.

    Raises:
        ArgumentError: It says something that there is not.
    """
    if url.username:
        raise exc.ArgumentError(
            "the URL has a username: it is the broker that logs in to PostgreSQL. Leave it out; a bearer token goes in "
            "the place of the password, postgresql+sessionbroker://:TOKEN@HOST:PORT/ENGINE"
        )
    host = url.host or "localhost"
    made: dict[str, Any] = {"target": f"{f'[{host}]' if ':' in host else host}:{url.port or PORT}"}
    if url.database:
        made["engine"] = url.database
    if url.password:
        made["credentials"] = str(url.password)
    options: dict[str, object] = {}
    for name, value in url.query.items():
        known, place = (_CONNECT_OPTIONS, options) if name in _CONNECT_OPTIONS else (_SESSION_ARGUMENTS, made)
        if name not in known:
            choices = ", ".join(sorted(_SESSION_ARGUMENTS | _CONNECT_OPTIONS))
            raise exc.ArgumentError(
                f"the URL has no option {name!r}: there are {choices}; connect_args takes the others"
            )
        try:
            place[name] = known[name](value if isinstance(value, str) else value[-1])
        except ValueError as error:
            raise exc.ArgumentError(f"the URL's option {name} is wrong: {error}") from None
    if options:
        made["connect_options"] = options
    return made


class _ExecutionContext(PGExecutionContext):
    def create_server_side_cursor(self) -> Any:
        # INSERT, UPDATE and DELETE without RETURNING, on a connection that streams its results, have none.
        compiled: Any = self.compiled
        if self.is_crud and compiled and not compiled.effective_returning:
            self._is_server_side = False
        return self._dbapi_connection.cursor(stream=self._is_server_side)


@dataclass
class Shared:
    """A connection to the broker, and who uses it."""

    broker: Any
    arguments: Mapping[str, Any] = field(repr=False)
    place: tuple[int, object]
    """The process and the event loop that it belongs to."""
    users: int = 0
    is_retired: bool = False


class SessionBrokerDialect(PGDialect):
    """``postgresql+sessionbroker``."""

    driver = "sessionbroker"
    default_paramstyle = "pyformat"
    supports_statement_cache = True
    supports_server_side_cursors = True
    supports_sane_multi_rowcount = True
    execution_ctx_cls = _ExecutionContext
    colspecs = COLSPECS

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._shared: Shared | None = None

    @classmethod
    def import_dbapi(cls) -> ModuleType:
        """The DB-API module."""
        return dbapi

    @classmethod
    def get_pool_class(cls, url: URL) -> type[pool.Pool]:
        """None: the broker pools."""
        return pool.NullPool

    @classmethod
    def get_async_dialect_cls(cls, url: URL) -> type[Any]:
        """What `create_async_engine` takes instead."""
        from session_broker.sqlalchemy._asyncio import SessionBrokerAsyncDialect

        return SessionBrokerAsyncDialect

    @classmethod
    def engine_created(cls, engine: Engine) -> None:
        """Lets go of the connection to the broker when the engine is disposed of."""
        event.listen(engine, "engine_disposed", lambda engine: engine.dialect._retire())

    def create_connect_args(self, url: URL) -> tuple[list[str], dict[str, Any]]:
        """What `connect` is called with."""
        return [], connect_arguments(url)

    def connect(self, *_: Any, **arguments: Any) -> Any:
        """A session, on the connection that the engine's sessions share."""
        autocommit = arguments.pop("autocommit", False)
        loaders: dict[str, Callable[[str], Any]] = {}
        if self._json_deserializer:
            loaders |= dict.fromkeys(("json", "jsonb"), self._json_deserializer)
        if self._native_inet_types is False:
            loaders |= dict.fromkeys(("inet", "cidr"), str)
        arguments["loaders"] = {**loaders, **arguments.get("loaders", {})}
        with self._lock:
            shared = self._shared
            if not shared or (shared.arguments, shared.place) != (arguments, self._place()):
                unused = self._unused(shared)
                shared = self._shared = Shared(self._open(**arguments), arguments, self._place())
            else:
                unused = None
            shared.users += 1
        self._close(unused)
        return self._connection(shared, autocommit)

    def _place(self) -> tuple[int, object]:
        return os.getpid(), None

    def _open(self, **arguments: Any) -> Any:
        return _sync.connect(**arguments)

    def _connection(self, shared: Shared, autocommit: bool) -> Any:
        session = shared.broker.session()
        return dbapi.Connection(session, autocommit=autocommit, on_close=lambda: self._release(shared))

    def _release(self, shared: Shared) -> None:
        with self._lock:
            shared.users -= 1
            unused = shared if shared.is_retired and not shared.users else None
        self._close(unused)

    def _retire(self) -> None:
        with self._lock:
            unused = self._unused(self._shared)
            self._shared = None
        self._close(unused)

    def _unused(self, shared: Shared | None) -> Shared | None:
        """Marks it as not to be used by others any more; itself, if nobody uses it now."""
        if not shared:
            return None
        shared.is_retired = True
        return None if shared.users else shared

    def _close(self, shared: Shared | None) -> None:
        # Another process's, or another event loop's, is not ours to end.
        if shared and shared.place == self._place():
            self._close_broker(shared.broker)

    def _close_broker(self, broker: Any) -> None:
        broker.close()

    def is_disconnect(self, e: BaseException, connection: Any, cursor: Any) -> bool:
        """Whether the session is gone, or must be left."""
        if isinstance(e, SessionEnded | SessionUnknown | BrokerUnavailable):
            return True
        if isinstance(e, dbapi.Error) and e.advice is Advice.SESSION:
            return True
        return connection is not None and bool(connection.closed)

    def do_ping(self, dbapi_connection: Any) -> bool:
        """Asks the broker whether the session lives; the database is its own concern."""
        dbapi_connection.ping()
        return True

    def get_isolation_level_values(self, dbapi_connection: Any) -> tuple[Any, ...]:
        """The levels there are."""
        return _LEVELS

    def get_isolation_level(self, dbapi_connection: Any) -> Any:
        """The level in force."""
        was_in_transaction = dbapi_connection.in_transaction
        level = super().get_isolation_level(dbapi_connection)  # type: ignore[no-untyped-call]
        if not was_in_transaction:
            dbapi_connection.rollback()
        return level

    def set_isolation_level(self, dbapi_connection: Any, level: str) -> None:
        """Sets it for the transactions to come."""
        dbapi_connection.autocommit = level == "AUTOCOMMIT"
        dbapi_connection.isolation_level = None if level == "AUTOCOMMIT" else level

    def detect_autocommit_setting(self, dbapi_conn: Any) -> bool:
        """Whether each statement is a transaction of its own."""
        return bool(dbapi_conn.autocommit)

    def set_readonly(self, connection: Any, value: bool) -> None:
        """``postgresql_readonly``."""
        connection.read_only = value

    def get_readonly(self, connection: Any) -> Any:
        """``postgresql_readonly``."""
        return connection.read_only

    def set_deferrable(self, connection: Any, value: bool) -> None:
        """``postgresql_deferrable``."""
        connection.deferrable = value

    def get_deferrable(self, connection: Any) -> Any:
        """``postgresql_deferrable``."""
        return connection.deferrable

    def do_begin_twophase(self, connection: Connection, xid: Any) -> None:
        """Refused.

        Raises:
            NotSupportedError: Always.
        """
        connection.connection.tpc_begin(xid)
