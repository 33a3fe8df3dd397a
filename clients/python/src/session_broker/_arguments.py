"""What a caller may ask for, as keywords, and the protocol's messages that it becomes.

Invariant: what is not understood is refused here, by its name; what the broker has to judge is passed on.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from google.protobuf.duration_pb2 import Duration

from session_broker._protocol import duration, seconds
from session_broker.errors import ProgrammingError
from sessionbroker.v1 import connect_pb2, session_pb2, transaction_pb2

if TYPE_CHECKING:
    from typing_extensions import Unpack

Enum = TypeVar("Enum", bound=enum.IntEnum)

Seconds = float | timedelta


class IsolationLevel(enum.IntEnum):
    """SQL's isolation levels. Wherever one is asked for its name will do: `"SERIALIZABLE"`, `"repeatable read"`."""

    READ_UNCOMMITTED = 1
    READ_COMMITTED = 2
    REPEATABLE_READ = 3
    SERIALIZABLE = 4


class _SslMode(enum.IntEnum):
    DISABLE = 1
    REQUIRE = 2
    VERIFY_CA = 3
    VERIFY_FULL = 4


class _TargetSessionAttrs(enum.IntEnum):
    ANY = 1
    READ_WRITE = 2
    READ_ONLY = 3
    PRIMARY = 4
    STANDBY = 5
    PREFER_STANDBY = 6


class _LoadBalanceHosts(enum.IntEnum):
    DISABLE = 1
    RANDOM = 2


class _ChannelBinding(enum.IntEnum):
    DISABLE = 1
    PREFER = 2
    REQUIRE = 3


class Keepalives(TypedDict, total=False):
    """TCP keepalive of the broker's connections to PostgreSQL."""

    disabled: bool
    idle: Seconds
    interval: Seconds
    retries: int


class ConnectOptions(TypedDict, total=False):
    """What the session's connections to PostgreSQL are to be; libpq's names. The engine says which may be set."""

    database: str
    user: str
    application_name: str
    connect_timeout: Seconds
    ssl_mode: str
    target_session_attrs: str
    load_balance_hosts: str
    channel_binding: str
    keepalives: Keepalives
    tcp_user_timeout: Seconds
    client_connection_check_interval: Seconds
    idle_in_transaction_session_timeout: Seconds
    search_path: Sequence[str]
    time_zone: str
    server_settings: Mapping[str, str]


class TransactionArguments(TypedDict, total=False):
    """How a transaction begins."""

    isolation_level: IsolationLevel | str
    read_only: bool
    deferrable: bool


class SessionOptions(TransactionArguments, total=False):
    """What a session does with each of its transactions, and how `Broker.run` does its one."""

    statement_timeout: Seconds
    lock_timeout: Seconds
    transaction_timeout: Seconds
    role: str
    settings: Mapping[str, str]


class RunArguments(SessionOptions, total=False):
    """What `Broker.run` may be given beside its statements."""

    engine: str
    profile: str
    connect_options: ConnectOptions


class SessionArguments(RunArguments, total=False):
    """What a session may be given: to `connect` for all sessions, to `Broker.session` for one."""

    lease_ttl: Seconds
    labels: Mapping[str, str]
    timeout: Seconds | None
    attach: bool
    loaders: Mapping[str, Callable[[str], object]]


@dataclass(frozen=True)
class Retry:
    """How often a call is made again by itself where that is safe, and how long in all.

    A call is repeated when the broker advises so, or when its answer was lost and `seq`, `request_id` or an idempotency
    key make sure that nothing runs twice. Whole transactions are repeated by `Broker.transaction` alone.
    """

    attempts_max: int = 5
    """How often a call is made in all. 1: never again."""
    time_max: float = 10.0
    """Seconds after the first failure in which new attempts begin."""


_OPTION_DURATIONS = ("statement_timeout", "lock_timeout", "transaction_timeout")
_CONNECT_TEXTS = ("database", "user", "application_name", "time_zone")
_CONNECT_DURATIONS = (
    "connect_timeout",
    "tcp_user_timeout",
    "client_connection_check_interval",
    "idle_in_transaction_session_timeout",
)
_CONNECT_ENUMS: dict[str, type[enum.IntEnum]] = {
    "ssl_mode": _SslMode,
    "target_session_attrs": _TargetSessionAttrs,
    "load_balance_hosts": _LoadBalanceHosts,
    "channel_binding": _ChannelBinding,
}


def check_names(arguments: Mapping[str, object], known: type, what: str) -> None:
    """Refuses keywords that are not `known`'s.

    Raises:
        TypeError: As Python does for an unknown keyword.
    """
    for name in arguments.keys() - known.__annotations__.keys():
        raise TypeError(f"{what} has no option {name!r}: there are {', '.join(sorted(known.__annotations__))}")


def isolation_level(value: IsolationLevel | str) -> IsolationLevel:
    """The isolation level of that name.

    Raises:
        ProgrammingError: There is none.
    """
    return named("isolation_level", IsolationLevel, value)


def named(field: str, kind: type[Enum], value: object) -> Enum:
    """The member of that name, in upper or lower case.

    Raises:
        ProgrammingError: There is none.
    """
    if isinstance(value, kind):
        return value
    name = value.upper().replace(" ", "_").replace("-", "_") if isinstance(value, str) else ""
    if name not in kind.__members__:
        choices = ", ".join(member.name.lower() for member in kind)
        raise ProgrammingError(f"{field} is {value!r}: give one of {choices}")
    return kind[name]


def seconds_of(field: str, value: Seconds) -> Duration:
    """So many seconds.

    Raises:
        ProgrammingError: It is neither a finite number nor a timedelta.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | timedelta):
        raise ProgrammingError(f"{field} is a {type(value).__name__}: give seconds as a number, or a timedelta")
    try:
        return duration(value)
    except (OverflowError, ValueError):
        raise ProgrammingError(f"{field} is {value}: give a finite number of seconds, or leave it out") from None


def session_options(arguments: SessionOptions) -> session_pb2.SessionOptions:
    """The options of each of a session's transactions.

    Raises:
        ProgrammingError: One of them is of a wrong kind.
    """
    made = session_pb2.SessionOptions(
        read_only=arguments.get("read_only", False),
        deferrable=arguments.get("deferrable", False),
        role=arguments.get("role", ""),
        settings=arguments.get("settings", {}),
    )
    if "isolation_level" in arguments:
        made.isolation_level = _wire(isolation_level(arguments["isolation_level"]))
    for name in _OPTION_DURATIONS:
        if name in arguments:
            getattr(made, name).CopyFrom(seconds_of(name, arguments[name]))  # type: ignore[literal-required]
    return made


def _wire(level: IsolationLevel) -> Any:
    return int(level)


def transaction_options(**arguments: Unpack[TransactionArguments]) -> transaction_pb2.TransactionOptions:
    """How one transaction begins.

    Raises:
        ProgrammingError: There is no such isolation level.
    """
    made = transaction_pb2.TransactionOptions()
    if "isolation_level" in arguments:
        made.isolation_level = _wire(isolation_level(arguments["isolation_level"]))
    if "read_only" in arguments:
        made.read_only = arguments["read_only"]
    if "deferrable" in arguments:
        made.deferrable = arguments["deferrable"]
    return made


def connect_options(options: ConnectOptions) -> connect_pb2.ConnectOptions:
    """What connections are to be.

    Raises:
        TypeError: There is no such option.
        ProgrammingError: One of them is of a wrong kind.
    """
    check_names(options, ConnectOptions, "connect_options")
    made = connect_pb2.ConnectOptions(
        search_path=options.get("search_path", ()), server_settings=options.get("server_settings", {})
    )
    values: Mapping[str, Any] = options
    for name in _CONNECT_TEXTS:
        if name in values:
            setattr(made, name, values[name])
    for name in _CONNECT_DURATIONS:
        if name in values:
            getattr(made, name).CopyFrom(seconds_of(f"connect_options[{name!r}]", values[name]))
    for name, kind in _CONNECT_ENUMS.items():
        if name in values:
            setattr(made, name, int(named(f"connect_options[{name!r}]", kind, values[name])))
    if "keepalives" in options:
        made.keepalives.CopyFrom(_keepalives(options["keepalives"]))
    return made


def _keepalives(options: Keepalives) -> connect_pb2.Keepalives:
    check_names(options, Keepalives, "connect_options['keepalives']")
    made = connect_pb2.Keepalives(disabled=options.get("disabled", False), retries=options.get("retries", 0))
    if "idle" in options:
        made.idle.CopyFrom(seconds_of("connect_options['keepalives']['idle']", options["idle"]))
    if "interval" in options:
        made.interval.CopyFrom(seconds_of("connect_options['keepalives']['interval']", options["interval"]))
    return made


def begin_request(arguments: SessionArguments) -> session_pb2.BeginSessionRequest:
    """The request that begins a session.

    Raises:
        TypeError: There is no such option.
        ProgrammingError: One of them is of a wrong kind.
    """
    check_names(arguments, SessionArguments, "a session")
    made = session_pb2.BeginSessionRequest(
        engine=arguments.get("engine", ""),
        profile=arguments.get("profile", ""),
        options=session_options(arguments),
        labels=arguments.get("labels", {}),
    )
    if "lease_ttl" in arguments:
        made.lease_ttl.CopyFrom(seconds_of("lease_ttl", arguments["lease_ttl"]))
    if "connect_options" in arguments:
        made.connect_options.CopyFrom(connect_options(arguments["connect_options"]))
    return made


def timeout_seconds(value: Seconds | None) -> float | None:
    """A timeout in seconds.

    Raises:
        ProgrammingError: It is none.
    """
    if value is None:
        return None
    return seconds(seconds_of("timeout", value))
