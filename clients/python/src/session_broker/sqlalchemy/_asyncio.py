"""The dialect over `session_broker.aio`: the same DB-API, with each call of the session awaited in its greenlet."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import URL, AdaptedConnection
from sqlalchemy.util import await_only, concurrency

from session_broker import aio, dbapi
from session_broker.errors import Error
from session_broker.sqlalchemy._dialect import SessionBrokerDialect, Shared

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from session_broker._arguments import TransactionArguments
    from session_broker.results import Result, Row, Statement
    from session_broker.values import Column
    from sessionbroker.v1.session_pb2 import GetSessionResponse, SessionState


class _Stream:
    """An asynchronous stream as `dbapi.Stream`."""

    def __init__(self, stream: aio.Stream) -> None:
        self._stream = stream

    @property
    def columns(self) -> Sequence[Column]:
        return self._stream.columns

    def fetchmany(self, size: int) -> list[Row]:
        return await_only(self._stream.fetchmany(size))

    def close(self) -> None:
        await_only(self._stream.close())


class _Session:
    """An asynchronous session as `dbapi.Session`."""

    def __init__(self, session: aio.Session) -> None:
        self._session = session

    @property
    def state(self) -> SessionState | None:
        return self._session.state

    def execute(self, sql: str, params: Sequence[object], *, commit: bool) -> Result:
        return await_only(self._session.execute(sql, params, commit=commit))

    def stream(self, sql: str, params: Sequence[object], *, commit: bool) -> _Stream:
        return _Stream(await_only(self._session.stream(sql, params, commit=commit)))

    def batch(self, statements: Sequence[Statement], *, commit: bool) -> list[Result]:
        return await_only(self._session.batch(statements, commit=commit))

    def begin(self, **options: Unpack[TransactionArguments]) -> None:
        self._session.begin(**options)

    def commit(self) -> object:
        return await_only(self._session.commit())

    def rollback(self, savepoint: str | None = None) -> None:
        await_only(self._session.rollback(savepoint))

    def create_savepoint(self, name: str) -> None:
        await_only(self._session.create_savepoint(name))

    def release_savepoint(self, name: str) -> None:
        await_only(self._session.release_savepoint(name))

    def cancel(self) -> bool:
        return await_only(self._session.cancel())

    def info(self) -> GetSessionResponse:
        return await_only(self._session.info())

    def close(self) -> None:
        await_only(self._session.close())


class _Cursor(dbapi.Cursor):
    async def _async_soft_close(self) -> None:
        """What SQLAlchemy awaits of a cursor whose rows are all here."""


class _Connection(AdaptedConnection, dbapi.Connection):
    _cursor_class = _Cursor

    def __init__(self, session: aio.Session, **arguments: Any) -> None:
        dbapi.Connection.__init__(self, _Session(session), **arguments)
        self._connection: Any = session

    def terminate(self) -> None:
        """Ends the session, or lets it go to its lease's end where nothing can be awaited."""
        if concurrency.in_greenlet():
            with suppress(Error):
                self.close()
        elif not self._closed:
            self._closed = True
            self._connection.abandon()
            if self._on_close:
                self._on_close()


class SessionBrokerAsyncDialect(SessionBrokerDialect):
    """``postgresql+sessionbroker_async``."""

    driver = "sessionbroker_async"
    is_async = True
    has_terminate = True
    supports_statement_cache = True

    @classmethod
    def import_dbapi(cls) -> ModuleType:
        """The DB-API module."""
        return dbapi

    @classmethod
    def get_async_dialect_cls(cls, url: URL) -> type[Any]:
        """Itself."""
        return cls

    def _place(self) -> tuple[int, object]:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        return os.getpid(), loop

    def _open(self, **arguments: Any) -> Any:
        return aio.connect(**arguments)

    def _connection(self, shared: Shared, autocommit: bool) -> Any:
        session = shared.broker.session()
        return _Connection(session, autocommit=autocommit, on_close=lambda: self._release(shared))

    def _close_broker(self, broker: Any) -> None:
        if concurrency.in_greenlet():
            await_only(broker.close())

    def do_terminate(self, dbapi_connection: Any) -> None:
        """Ends a connection that cannot be used any more."""
        dbapi_connection.terminate()

    def get_driver_connection(self, connection: Any) -> Any:
        """The `aio.Session`."""
        return connection.driver_connection
