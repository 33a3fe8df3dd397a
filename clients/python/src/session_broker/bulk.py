"""COPY, notifications and operators' calls: their arguments and what comes of them."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, TypeAlias, TypedDict

from session_broker._arguments import Seconds, check_names, named, seconds_of
from session_broker.errors import ProgrammingError
from session_broker.results import Commit, TransactionState
from sessionbroker.v1 import admin_pb2, bulk_pb2
from sessionbroker.v1.error_pb2 import PgError

__all__ = ["Copied", "CopyOptions", "Missed", "Notification", "SessionFilters"]

# The largest piece that one message brings: few messages, and little held at a time.
PIECE_BYTES = 256 * 1024


class CopyOptions(TypedDict, total=False):
    """How the data of a COPY is written: PostgreSQL's names and defaults. `format` is "text", "csv" or "binary"."""

    format: str
    header: bool
    delimiter: str
    null: str
    quote: str
    escape: str


class SessionFilters(TypedDict, total=False):
    """Which sessions `Broker.sessions` lists: those that meet all that is given."""

    principal: str
    engine: str
    profile: str
    transaction_state: TransactionState
    labels: Mapping[str, str]
    idle_longer_than: Seconds
    transaction_longer_than: Seconds
    session_id: str


@dataclass(frozen=True)
class Copied:
    """What a COPY did."""

    row_count: int
    byte_count: int
    commit: Commit | None = None
    """What the commit did, when the call was to commit."""
    notices: Sequence[PgError] = field(default=(), repr=False)


@dataclass(frozen=True)
class Notification:
    """What NOTIFY sent."""

    channel: str
    payload: str = field(repr=False)
    backend_pid: int
    """The process id of the backend that sent it."""


@dataclass(frozen=True)
class Missed:
    """Notifications may have been missed: read again what depends on them."""


class _Format(enum.IntEnum):
    TEXT = 1
    CSV = 2
    BINARY = 3


CopyData: TypeAlias = "bytes | bytearray | memoryview | BinaryIO | Iterable[bytes]"
AsyncCopyData: TypeAlias = "CopyData | AsyncIterable[bytes]"


def pieces(data: CopyData) -> Iterable[bytes]:
    """The data, bit by bit.

    Raises:
        ProgrammingError: It is text, or not data at all.
    """
    if isinstance(data, bytes | bytearray | memoryview):
        yield bytes(data)
        return
    read = getattr(data, "read", None)
    if read is None and (isinstance(data, str) or not isinstance(data, Iterable)):
        raise _no_data(data)
    parts = data if read is None else iter(lambda: read(PIECE_BYTES), b"")
    for piece in parts:
        yield checked_piece(piece)


def checked_piece(piece: object) -> bytes:
    """A piece of the data.

    Raises:
        ProgrammingError: It is text, or not data at all.
    """
    if isinstance(piece, bytes):
        return piece
    if isinstance(piece, bytearray | memoryview):
        return bytes(piece)
    raise _no_data(piece)


def _no_data(value: object) -> ProgrammingError:
    return ProgrammingError(f"data: has a {type(value).__name__}: give bytes, a binary file or an iterable of bytes")


async def async_pieces(data: AsyncCopyData) -> AsyncIterator[bytes]:
    """The same, awaiting what has to be awaited."""
    if isinstance(data, AsyncIterable):
        async for piece in data:
            yield checked_piece(piece)
    else:
        for piece in pieces(data):
            yield piece


def copy_options(options: CopyOptions) -> bulk_pb2.CopyOptions:
    """How the data is written.

    Raises:
        TypeError: There is no such option.
        ProgrammingError: There is no such format.
    """
    check_names(options, CopyOptions, "COPY")
    made = bulk_pb2.CopyOptions(header=options.get("header", False))
    if "format" in options:
        setattr(made, "format", int(named("format", _Format, options["format"])))  # noqa: B010
    for name in ("delimiter", "null", "quote", "escape"):
        if name in options:
            setattr(made, name, options[name])
    return made


def list_request(filters: SessionFilters) -> admin_pb2.ListSessionsRequest:
    """Asks for sessions.

    Raises:
        TypeError: There is no such filter.
        ProgrammingError: A duration is none.
    """
    check_names(filters, SessionFilters, "sessions")
    made = admin_pb2.ListSessionsRequest(
        principal=filters.get("principal", ""),
        engine=filters.get("engine", ""),
        profile=filters.get("profile", ""),
        labels=filters.get("labels", {}),
        session_id=filters.get("session_id", ""),
        page_size=1000,
    )
    setattr(made, "transaction_state", int(filters.get("transaction_state", 0)))  # noqa: B010
    if "idle_longer_than" in filters:
        made.idle_longer_than.CopyFrom(seconds_of("idle_longer_than", filters["idle_longer_than"]))
    if "transaction_longer_than" in filters:
        made.transaction_longer_than.CopyFrom(seconds_of("transaction_longer_than", filters["transaction_longer_than"]))
    return made
