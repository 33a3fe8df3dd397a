"""OpenTelemetry: a CLIENT span for each call, whose context the broker's own span joins.

Imported only where `opentelemetry-api` is installed.
"""

from __future__ import annotations

from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, Status, StatusCode

from session_broker._protocol import Method
from session_broker.errors import Error

_CODE_OK = 0
_TRACER = trace.get_tracer("session_broker")


class Span:
    """The span of one call."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def end(self, error: BaseException | None = None) -> None:
        """Ends it, with the call's status."""
        if isinstance(error, Error) and error.code is not None:
            self._span.set_attribute("rpc.grpc.status_code", error.code.value[0])
            if error.reason:
                self._span.set_attribute("error.type", error.reason)
            if error.sqlstate:
                self._span.set_attribute("db.response.status_code", error.sqlstate)
        elif error is None:
            self._span.set_attribute("rpc.grpc.status_code", _CODE_OK)
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def start_span(method: Method[Any], endpoint: str, metadata: list[tuple[str, str]]) -> Span:
    """Begins a span and adds its context to the call's metadata."""
    address, _, port = endpoint.rpartition(":")
    attributes: dict[str, str | int] = {"rpc.system": "grpc", "rpc.service": method.service, "rpc.method": method.name}
    if port.isdecimal():
        attributes |= {"server.address": address.strip("[]"), "server.port": int(port)}
    else:
        attributes["server.address"] = endpoint
    span = _TRACER.start_span(f"{method.service}/{method.name}", kind=SpanKind.CLIENT, attributes=attributes)
    if span.get_span_context().is_valid:
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(span))
        metadata.extend(carrier.items())
    return Span(span)
