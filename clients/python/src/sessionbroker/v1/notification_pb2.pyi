from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListenRequest(_message.Message):
    __slots__ = ("engine", "profile", "channels")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    engine: str
    profile: str
    channels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, engine: _Optional[str] = ..., profile: _Optional[str] = ..., channels: _Optional[_Iterable[str]] = ...) -> None: ...

class ListenResponse(_message.Message):
    __slots__ = ("listening", "notification", "missed")
    LISTENING_FIELD_NUMBER: _ClassVar[int]
    NOTIFICATION_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    listening: Listening
    notification: Notification
    missed: Missed
    def __init__(self, listening: _Optional[_Union[Listening, _Mapping]] = ..., notification: _Optional[_Union[Notification, _Mapping]] = ..., missed: _Optional[_Union[Missed, _Mapping]] = ...) -> None: ...

class Listening(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Notification(_message.Message):
    __slots__ = ("channel", "payload", "backend_pid")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    BACKEND_PID_FIELD_NUMBER: _ClassVar[int]
    channel: str
    payload: str
    backend_pid: int
    def __init__(self, channel: _Optional[str] = ..., payload: _Optional[str] = ..., backend_pid: _Optional[int] = ...) -> None: ...

class Missed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
