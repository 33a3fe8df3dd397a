"""How a broker is reached: encryption, credentials, the channel's settings, and what goes beside each call.

Invariant: a credential leaves this machine encrypted, or because the caller said so.
"""

from __future__ import annotations

import heapq
import itertools
import operator
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from session_broker._arguments import Retry, SessionArguments
from session_broker._protocol import Method
from session_broker._session import SessionCore
from session_broker.errors import Error, InterfaceError, OperationalError, ProgrammingError

if TYPE_CHECKING:
    from session_broker._tracing import Span

try:
    from session_broker._tracing import start_span
except ImportError:
    start_span = None  # type: ignore[assignment]

Pem: TypeAlias = "bytes | str | Path"
Credentials: TypeAlias = "str | Callable[[], str | Awaitable[str]]"
Metadata: TypeAlias = "list[tuple[str, str]]"

# How long a session's owner may take to answer before its calls go to the first target instead.
PROBE_TIMEOUT = 2.0

# How long a session is at most not looked at.
LOOK_TIME = 60.0

serialize = operator.methodcaller("SerializeToString")

# A broker that vanished is noticed within both times while a call waits for it. What a result may have is the broker's
# to bound. Connections are tried again soon: a broker that restarts is back within a second or two.
_OPTIONS: dict[str, str | int] = {
    "grpc.keepalive_time_ms": 20_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.http2.max_pings_without_data": 0,
    "grpc.max_receive_message_length": -1,
    "grpc.max_metadata_size": 64 * 1024,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 5_000,
    "grpc.primary_user_agent": "session-broker-python",
}


@dataclass(frozen=True)
class TLS:
    """Encryption. Without arguments it believes gRPC's own list of authorities."""

    ca: Pem | None = None
    """The authorities that vouch for the broker: PEM, as bytes or the path of a file."""
    certificate: Pem | None = None
    """A client certificate, with those above it."""
    key: Pem | None = field(default=None, repr=False)
    """Its key."""
    server_name: str | None = None
    """The name expected in the broker's certificate, instead of the address's host."""


class ConnectArguments(SessionArguments, total=False):
    """What `connect` may be given beside the target."""

    credentials: Credentials | None
    tls: bool | TLS
    retry: Retry | None
    follow_owner: bool
    plaintext_beyond_loopback: bool
    channel_options: Sequence[tuple[str, str | int]]


class Route:
    """How to open channels to a broker, and what to send along."""

    def __init__(
        self,
        target: str,
        credentials: Credentials | None,
        tls: bool | TLS,
        plaintext_beyond_loopback: bool,
        options: Sequence[tuple[str, str | int]],
    ) -> None:
        if not isinstance(target, str) or not target:
            raise ProgrammingError(f"target is {target!r}: give HOST:PORT or unix:/PATH")
        self._tls = TLS() if tls is True else tls or None
        self._credentials = credentials
        self._may_send_plainly = plaintext_beyond_loopback
        self._options = {**_OPTIONS, **dict(options)}
        if target.startswith("unix:"):
            # gRPC would send the path, which is no name of a host.
            self._options.setdefault("grpc.default_authority", "localhost")
        if self._tls and self._tls.server_name:
            self._options["grpc.ssl_target_name_override"] = self._tls.server_name
        self.channel_credentials = _channel_credentials(self._tls) if self._tls else None
        if not self.may_call(target):
            raise ProgrammingError(
                f"credentials would go to {target} in plain text: give tls=True, or plaintext_beyond_loopback=True "
                "where something else encrypts"
            )

    @property
    def options(self) -> list[tuple[str, str | int]]:
        """The channel's settings."""
        return list(self._options.items())

    def may_call(self, endpoint: str) -> bool:
        """Whether what is sent along may go there."""
        plainly = self._credentials is not None and self._tls is None
        return not plainly or self._may_send_plainly or _is_on_this_machine(endpoint)

    def credential(self) -> str | Awaitable[str] | None:
        """The bearer token for the next call.

        Raises:
            OperationalError: The program's function for it failed.
        """
        try:
            return self._credentials() if callable(self._credentials) else self._credentials
        except Exception as error:
            raise no_credentials(error) from error


def no_credentials(error: Exception) -> Error:
    """The error of a function for credentials that failed. What it said may hold secrets."""
    if isinstance(error, Error):
        return error
    return OperationalError(f"the function given as credentials raised {type(error).__name__}")


def bearer(token: str | None) -> Metadata:
    """The header that shows a token."""
    return [] if token is None else [("authorization", f"Bearer {token}")]


def traced(method: Method[Any], endpoint: str, metadata: Metadata) -> Span | None:
    """Begins a span for a call and adds its context to what is sent; nothing where OpenTelemetry is not installed."""
    return start_span(method, endpoint, metadata) if start_span is not None else None


class Schedule:
    """The sessions that are to be kept, by when. It keeps none of them alive in memory."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, weakref.ref[SessionCore]]] = []
        self._numbers: weakref.WeakKeyDictionary[SessionCore, int] = weakref.WeakKeyDictionary()
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, session: SessionCore, again: bool = False) -> bool:
        """Has a session kept, and attached at once where it is to be. True when it is the next one now."""
        at = time.monotonic() if session.attaches and not again else session.renew_at
        number = self._push(at, session)
        return self._heap[0][1] == number

    @property
    def wait(self) -> float | None:
        """In how many seconds to look next; `None` while there is nothing to look after."""
        return min(max(self._heap[0][0] - time.monotonic(), 0.0), LOOK_TIME) if self._heap else None

    def _push(self, at: float, session: SessionCore) -> int:
        """Looks at a session then, and not when it was to be looked at before."""
        number = self._numbers[session] = next(self._count)
        heapq.heappush(self._heap, (at, number, weakref.ref(session)))
        return number

    def due(self) -> Iterable[SessionCore]:
        """Those whose time has come and who are not in a call."""
        now = time.monotonic()
        while self._heap and self._heap[0][0] <= now:
            _, number, reference = heapq.heappop(self._heap)
            session = reference()
            if session is None or self._numbers.get(session) != number:
                continue
            if session.busy and not session.attaches:
                self._push(now + session.retry_after, session)
            elif session.renewal() is None:
                del self._numbers[session]
            elif session.renew_at <= now or session.attaches:
                # Whatever comes of it, it is looked at again.
                self._push(now + session.retry_after, session)
                yield session
            else:
                self._push(session.renew_at, session)


def closed() -> InterfaceError:
    """The error of using a broker's connection after its end."""
    return InterfaceError("the connection to the broker is closed: call session_broker.connect() for another")


def _channel_credentials(tls: TLS) -> grpc.ChannelCredentials:
    if (tls.certificate is None) != (tls.key is None):
        raise ProgrammingError("tls.certificate and tls.key go together: give both")
    return grpc.ssl_channel_credentials(_pem("ca", tls.ca), _pem("key", tls.key), _pem("certificate", tls.certificate))


def _pem(name: str, value: Pem | None) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    try:
        return Path(value).read_bytes()
    except OSError as error:
        raise ProgrammingError(f"tls.{name} cannot be read: {error}") from error


def _is_on_this_machine(endpoint: str) -> bool:
    host = endpoint.rpartition(":")[0].strip("[]")
    return endpoint.startswith("unix:") or host in ("localhost", "::1") or host.startswith("127.")
