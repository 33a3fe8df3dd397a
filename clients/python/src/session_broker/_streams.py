"""Results that come bit by bit: what a part of one holds, and what its end means for the session.

Invariant: a result without its trailer is never taken for a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from session_broker.errors import BrokerUnavailable, Error, InterfaceError
from session_broker.results import Commit, Row
from session_broker.values import Column, Loaders, row_decoder
from sessionbroker.v1 import bulk_pb2, session_pb2
from sessionbroker.v1.error_pb2 import PgError
from sessionbroker.v1.session_pb2 import SessionState

T = TypeVar("T")
AnyError = TypeVar("AnyError", Error, None)


class StreamOwner(Protocol):
    """The session whose turn a stream has."""

    loaders: Loaders

    def note(self, state: SessionState) -> None:
        """Takes note of where it stands."""

    def committed(self, answer: Any) -> Commit | None:
        """Takes note of a commit."""

    def end_stream(self, error: AnyError, commits: bool) -> AnyError:
        """Takes its turn back; gives what the caller is to be told."""

    def leave_stream(self, complete: bool, commits: bool) -> None:
        """Takes its turn back from a stream that is closed."""


class StreamCore(Generic[T]):
    """A result on its way. Its session's turn is its own until it ends."""

    def __init__(self, session: StreamOwner, commits: bool) -> None:
        self._session = session
        self._commits = commits
        self._first: Sequence[T] = ()
        self.row_count: int | None = None
        self.commit: Commit | None = None
        self.notices: list[PgError] = []
        self.open = True

    def begin(self, first: Any) -> None:
        """Takes the first part."""
        self._first = self.feed(first)

    def begun(self) -> Sequence[T]:
        """What the first part held."""
        return self._first

    def feed(self, part: Any) -> Sequence[T]:
        """What a part holds."""
        raise NotImplementedError

    def _close(self, trailer: Any) -> None:
        self.row_count = trailer.row_count
        self.notices += trailer.notices
        self.commit = self._session.committed(trailer)
        self._session.note(trailer.state)

    @property
    def complete(self) -> bool:
        """Whether the trailer has come."""
        return self.row_count is not None

    def failed(self, error: Error) -> Error:
        """Ends it with an error: gives what the caller is to be told."""
        return self._end(error)

    def ended(self) -> None:
        """Ends it.

        Raises:
            BrokerUnavailable: The call ended without its trailer: the result is not complete.
            CommitUnknown: As before, and it was to commit.
        """
        if self.complete:
            self._end(None)
        else:
            raise self._end(BrokerUnavailable("the stream ended before its trailer: the result is not complete"))

    def left(self) -> None:
        """Ends it wherever it is. Before its trailer the broker stops the statement, and its transaction has failed."""
        if self.open:
            self.open = False
            self._session.leave_stream(self.complete, self._commits)

    def check_complete(self) -> None:
        """Refuses to take what was read for all.

        Raises:
            InterfaceError: It has failed, or was closed, before its end.
        """
        if not self.complete:
            raise InterfaceError("the stream failed or was closed before its end: its result is not complete")

    def _end(self, error: AnyError) -> AnyError:
        if not self.open:
            return error
        self.open = False
        return self._session.end_stream(error, self._commits)


class RowStream(StreamCore[Row]):
    """The rows of a statement."""

    columns: Sequence[Column] = ()
    command_tag: str | None = None
    _decode: Callable[[bytes], list[Row]] | None = None

    def feed(self, part: session_pb2.ExecuteStreamResponse) -> Sequence[Row]:
        """The rows of a part."""
        if part.HasField("chunk"):
            self.notices += part.chunk.notices
            return self._decode(part.chunk.packed_rows) if self._decode and part.chunk.row_count else ()
        if part.HasField("trailer"):
            self.command_tag = part.trailer.command_tag
            self._close(part.trailer)
        elif part.header.columns:
            columns = list(part.header.columns)
            self.columns = [Column.of(column) for column in columns]
            self._decode = row_decoder(columns, True, self._session.loaders)
        return ()


class CopyStream(StreamCore[bytes]):
    """The data of a COPY."""

    byte_count: int | None = None

    def feed(self, part: bulk_pb2.CopyOutResponse) -> Sequence[bytes]:
        """The data of a part."""
        if part.HasField("data"):
            return (part.data,)
        if part.HasField("trailer"):
            self.byte_count = part.trailer.byte_count
            self._close(part.trailer)
        return ()
