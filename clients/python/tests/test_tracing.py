"""OpenTelemetry: spans of calls, and the context that the broker's own spans join."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import session_broker
from session_broker import Broker, ProgrammingError, aio

SERVICE = "sessionbroker.v1.SessionService"


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """Where all spans of this process go from now on."""
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    trace.set_tracer_provider(provider)
    return memory


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    """The spans of one test."""
    exporter.clear()
    return exporter


def named(spans: InMemorySpanExporter, method: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == f"{SERVICE}/{method}"]


def test_each_call_is_a_client_span_of_the_callers_trace(
    broker: Broker, spans: InMemorySpanExporter, target: str
) -> None:
    with trace.get_tracer("test").start_as_current_span("work") as work, broker.session() as session:
        session.execute("SELECT 1")
    (span,) = named(spans, "Execute")
    assert span.kind is SpanKind.CLIENT
    assert span.parent is not None
    assert span.parent.span_id == work.get_span_context().span_id
    host, _, port = target.rpartition(":")
    assert dict(span.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": SERVICE,
        "rpc.method": "Execute",
        "rpc.grpc.status_code": 0,
        "server.address": host,
        "server.port": int(port),
    }
    assert [len(named(spans, method)) for method in ("BeginSession", "Commit", "Close")] == [1, 1, 1]


def test_an_error_is_on_its_span_without_its_words(broker: Broker, spans: InMemorySpanExporter) -> None:
    with pytest.raises(ProgrammingError), broker.session() as session:
        session.execute("SELECT nothing")
    (span,) = named(spans, "Execute")
    assert span.status.status_code is StatusCode.ERROR
    attributes = dict(span.attributes or {})
    assert attributes["rpc.grpc.status_code"] == 3
    assert attributes["error.type"] == "DATABASE_ERROR"
    assert attributes["db.response.status_code"] == "42703"
    assert "nothing" not in str(span.to_json())


def test_a_stream_is_one_span_until_its_end(broker: Broker, spans: InMemorySpanExporter) -> None:
    with broker.session() as session, session.stream("SELECT generate_series(1, 20000)") as stream:
        stream.fetchmany(1)
        assert named(spans, "ExecuteStream") == []
        list(stream)
        assert len(named(spans, "ExecuteStream")) == 1


async def test_tasks_have_spans_too(target: str, spans: InMemorySpanExporter) -> None:
    async with aio.connect(target) as broker, broker.session() as session:
        await session.execute("SELECT 1")
        async with await session.stream("SELECT 1") as stream:
            assert [row async for row in stream] == [(1,)]
    assert len(named(spans, "Execute")) == len(named(spans, "ExecuteStream")) == 1


def test_the_context_is_sent(target: str, exporter: InMemorySpanExporter) -> None:
    # The traceparent that leaves is looked at where it leaves.
    sent: list[list[tuple[str, str]]] = []
    with session_broker.connect(target, credentials=None) as broker:
        links = broker._links
        original = links._metadata

        def metadata() -> list[tuple[str, str]]:
            sent.append(original())
            return sent[-1]

        links._metadata = metadata  # type: ignore[method-assign]
        with trace.get_tracer("test").start_as_current_span("work") as work, broker.session() as session:
            session.execute("SELECT 1")
    trace_id = format(work.get_span_context().trace_id, "032x")
    assert sent
    for pairs in sent:
        assert dict(pairs)["traceparent"].split("-")[1] == trace_id


def test_nothing_of_it_is_imported_where_it_is_not_installed() -> None:
    script = """
import sys
sys.modules["opentelemetry"] = None
import session_broker, session_broker.aio
assert not any(name.startswith("opentelemetry.") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
