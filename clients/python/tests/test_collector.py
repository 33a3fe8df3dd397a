"""One trace, from the caller to PostgreSQL, in a real collector's own words."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from support import BrokerProcess, Postgres, configuration, free_port, wait_until

import session_broker
from session_broker import _tracing

METHOD = "sessionbroker.v1.SessionService/"


class Collector:
    """A rotel that prints the traces it receives."""

    def __init__(self, directory: Path) -> None:
        self.endpoint = f"http://127.0.0.1:{free_port()}"
        self._said = directory / "collector.log"
        address = self.endpoint.removeprefix("http://")
        arguments = ["start", "--exporter", "blackhole", "--debug-log", "traces", "--debug-log-verbosity", "detailed"]
        arguments += ["--otlp-grpc-endpoint", address, "--otlp-http-endpoint", f"127.0.0.1:{free_port()}"]
        with self._said.open("wb") as said:
            program = str(files("rotel") / "rotel-agent")
            self._process = subprocess.Popen([program, *arguments], stdout=said, stderr=said)
        wait_until(lambda: "Starting Rotel" in self.said)

    @property
    def said(self) -> str:
        return self._said.read_text()

    def spans(self) -> list[dict[str, str]]:
        """Its spans, by the names of what it prints of each."""
        blocks = re.split(r"^Span #\d+$", self.said, flags=re.MULTILINE)[1:]
        facts = re.compile(r"^ +(Trace ID|Parent ID|ID|Name|Kind) +: (\S.*|)$", re.MULTILINE)
        return [dict(facts.findall(block)) for block in blocks]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    collector = Collector(tmp_path)
    yield collector
    collector.stop()


def test_one_trace_goes_from_the_caller_to_its_statements(
    postgres: Postgres,
    start_broker: Callable[[str], BrokerProcess],
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provider = TracerProvider(resource=Resource.create({"service.name": "checkout"}))
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=collector.endpoint, insecure=True)))
    monkeypatch.setattr(_tracing, "_TRACER", provider.get_tracer("session_broker"))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    target = start_broker(configuration(postgres)).target
    work = provider.get_tracer("test").start_as_current_span("checkout")
    with work as span, session_broker.connect(target) as broker, broker.session() as session:
        trace_id = f"{span.get_span_context().trace_id:032x}"
        session.execute("SELECT balance FROM accounts WHERE id = $1", [1])
        session.execute("UPDATE accounts SET balance = balance")

    def spans() -> list[dict[str, str]]:
        return [span for span in collector.spans() if span.get("Trace ID") == trace_id]

    calls = {METHOD + name for name in ("BeginSession", "Execute", "Commit", "Close")}
    wanted = calls | {"checkout", "SELECT accounts", "UPDATE accounts", "COMMIT", "transaction"}
    wait_until(lambda: {span["Name"] for span in spans()} >= wanted)
    by_id = {span["ID"]: span for span in spans()}

    def line(span: dict[str, str]) -> list[tuple[str, str]]:
        """The span and those above it, by name and kind."""
        above = by_id.get(span["Parent ID"])
        own = (span["Name"].removeprefix(METHOD), span["Kind"].removeprefix("SPAN_KIND_"))
        return [own, *(line(above) if above else [])]

    for name, call in [("SELECT accounts", "Execute"), ("UPDATE accounts", "Execute"), ("COMMIT", "Commit")]:
        (statement,) = [span for span in by_id.values() if span["Name"] == name]
        above = [(name, "CLIENT"), (call, "SERVER"), (call, "CLIENT"), ("checkout", "INTERNAL")]
        assert line(statement) == above
