from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SslMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SSL_MODE_UNSPECIFIED: _ClassVar[SslMode]
    SSL_MODE_DISABLE: _ClassVar[SslMode]
    SSL_MODE_REQUIRE: _ClassVar[SslMode]
    SSL_MODE_VERIFY_CA: _ClassVar[SslMode]
    SSL_MODE_VERIFY_FULL: _ClassVar[SslMode]

class TargetSessionAttrs(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TARGET_SESSION_ATTRS_UNSPECIFIED: _ClassVar[TargetSessionAttrs]
    TARGET_SESSION_ATTRS_ANY: _ClassVar[TargetSessionAttrs]
    TARGET_SESSION_ATTRS_READ_WRITE: _ClassVar[TargetSessionAttrs]
    TARGET_SESSION_ATTRS_READ_ONLY: _ClassVar[TargetSessionAttrs]
    TARGET_SESSION_ATTRS_PRIMARY: _ClassVar[TargetSessionAttrs]
    TARGET_SESSION_ATTRS_STANDBY: _ClassVar[TargetSessionAttrs]
    TARGET_SESSION_ATTRS_PREFER_STANDBY: _ClassVar[TargetSessionAttrs]

class LoadBalanceHosts(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOAD_BALANCE_HOSTS_UNSPECIFIED: _ClassVar[LoadBalanceHosts]
    LOAD_BALANCE_HOSTS_DISABLE: _ClassVar[LoadBalanceHosts]
    LOAD_BALANCE_HOSTS_RANDOM: _ClassVar[LoadBalanceHosts]

class ChannelBinding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHANNEL_BINDING_UNSPECIFIED: _ClassVar[ChannelBinding]
    CHANNEL_BINDING_DISABLE: _ClassVar[ChannelBinding]
    CHANNEL_BINDING_PREFER: _ClassVar[ChannelBinding]
    CHANNEL_BINDING_REQUIRE: _ClassVar[ChannelBinding]
SSL_MODE_UNSPECIFIED: SslMode
SSL_MODE_DISABLE: SslMode
SSL_MODE_REQUIRE: SslMode
SSL_MODE_VERIFY_CA: SslMode
SSL_MODE_VERIFY_FULL: SslMode
TARGET_SESSION_ATTRS_UNSPECIFIED: TargetSessionAttrs
TARGET_SESSION_ATTRS_ANY: TargetSessionAttrs
TARGET_SESSION_ATTRS_READ_WRITE: TargetSessionAttrs
TARGET_SESSION_ATTRS_READ_ONLY: TargetSessionAttrs
TARGET_SESSION_ATTRS_PRIMARY: TargetSessionAttrs
TARGET_SESSION_ATTRS_STANDBY: TargetSessionAttrs
TARGET_SESSION_ATTRS_PREFER_STANDBY: TargetSessionAttrs
LOAD_BALANCE_HOSTS_UNSPECIFIED: LoadBalanceHosts
LOAD_BALANCE_HOSTS_DISABLE: LoadBalanceHosts
LOAD_BALANCE_HOSTS_RANDOM: LoadBalanceHosts
CHANNEL_BINDING_UNSPECIFIED: ChannelBinding
CHANNEL_BINDING_DISABLE: ChannelBinding
CHANNEL_BINDING_PREFER: ChannelBinding
CHANNEL_BINDING_REQUIRE: ChannelBinding

class Keepalives(_message.Message):
    __slots__ = ("disabled", "idle", "interval", "retries")
    DISABLED_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    disabled: bool
    idle: _duration_pb2.Duration
    interval: _duration_pb2.Duration
    retries: int
    def __init__(self, disabled: bool = ..., idle: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., interval: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., retries: _Optional[int] = ...) -> None: ...

class ConnectOptions(_message.Message):
    __slots__ = ("database", "user", "application_name", "connect_timeout", "ssl_mode", "target_session_attrs", "load_balance_hosts", "channel_binding", "keepalives", "tcp_user_timeout", "client_connection_check_interval", "idle_in_transaction_session_timeout", "search_path", "time_zone", "server_settings")
    class ServerSettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DATABASE_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    APPLICATION_NAME_FIELD_NUMBER: _ClassVar[int]
    CONNECT_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    SSL_MODE_FIELD_NUMBER: _ClassVar[int]
    TARGET_SESSION_ATTRS_FIELD_NUMBER: _ClassVar[int]
    LOAD_BALANCE_HOSTS_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_BINDING_FIELD_NUMBER: _ClassVar[int]
    KEEPALIVES_FIELD_NUMBER: _ClassVar[int]
    TCP_USER_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_CONNECTION_CHECK_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    IDLE_IN_TRANSACTION_SESSION_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    SEARCH_PATH_FIELD_NUMBER: _ClassVar[int]
    TIME_ZONE_FIELD_NUMBER: _ClassVar[int]
    SERVER_SETTINGS_FIELD_NUMBER: _ClassVar[int]
    database: str
    user: str
    application_name: str
    connect_timeout: _duration_pb2.Duration
    ssl_mode: SslMode
    target_session_attrs: TargetSessionAttrs
    load_balance_hosts: LoadBalanceHosts
    channel_binding: ChannelBinding
    keepalives: Keepalives
    tcp_user_timeout: _duration_pb2.Duration
    client_connection_check_interval: _duration_pb2.Duration
    idle_in_transaction_session_timeout: _duration_pb2.Duration
    search_path: _containers.RepeatedScalarFieldContainer[str]
    time_zone: str
    server_settings: _containers.ScalarMap[str, str]
    def __init__(self, database: _Optional[str] = ..., user: _Optional[str] = ..., application_name: _Optional[str] = ..., connect_timeout: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., ssl_mode: _Optional[_Union[SslMode, str]] = ..., target_session_attrs: _Optional[_Union[TargetSessionAttrs, str]] = ..., load_balance_hosts: _Optional[_Union[LoadBalanceHosts, str]] = ..., channel_binding: _Optional[_Union[ChannelBinding, str]] = ..., keepalives: _Optional[_Union[Keepalives, _Mapping]] = ..., tcp_user_timeout: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., client_connection_check_interval: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., idle_in_transaction_session_timeout: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., search_path: _Optional[_Iterable[str]] = ..., time_zone: _Optional[str] = ..., server_settings: _Optional[_Mapping[str, str]] = ...) -> None: ...
