"""How a broker is reached, and what is said when it is not: hosts, TLS, credentials, owners, forks, leases."""

from __future__ import annotations

import asyncio
import datetime
import gc
import ipaddress
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Server
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from support import ADMIN_TOKEN, BrokerProcess, Postgres, configuration, digest, free_port, link, wait_until

import session_broker
from session_broker import (
    TLS,
    Advice,
    Broker,
    BrokerUnavailable,
    EndReason,
    OperationalError,
    ProgrammingError,
    Retry,
    SessionEnded,
    aio,
)
from session_broker._channel import Schedule

ONCE = Retry(attempts_max=1)
StartBroker = Callable[[str], BrokerProcess]


def failure(broker: Broker) -> session_broker.Error:
    """What the first statement says."""
    with broker, broker.session() as session, pytest.raises(session_broker.Error) as caught:
        session.execute("SELECT 1")
    return caught.value


class TestTargets:
    def test_a_host_that_refuses(self) -> None:
        error = failure(session_broker.connect(f"127.0.0.1:{free_port()}"))
        assert isinstance(error, BrokerUnavailable)
        assert error.advice is Advice.CALL
        assert "Connection refused" in str(error)

    def test_a_host_that_has_no_address(self) -> None:
        error = failure(session_broker.connect("no-such-host.invalid:50051", retry=ONCE))
        assert isinstance(error, BrokerUnavailable)

    def test_a_server_that_is_no_broker(self, postgres: Postgres) -> None:
        error = failure(session_broker.connect(f"127.0.0.1:{postgres.port}", retry=ONCE))
        assert isinstance(error, BrokerUnavailable)

    def test_a_server_that_says_nothing_is_given_up_by_its_timeout(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            with session_broker.connect(f"127.0.0.1:{port}", retry=ONCE) as broker:
                began = time.monotonic()
                with pytest.raises(session_broker.OperationalError):
                    broker.run(["SELECT 1"], timeout=0.5)
                assert time.monotonic() - began < 5

    def test_no_target(self) -> None:
        with pytest.raises(ProgrammingError, match="HOST:PORT"):
            session_broker.connect("")

    def test_run_knows_that_nothing_was_sent(self) -> None:
        with session_broker.connect(f"127.0.0.1:{free_port()}") as broker, pytest.raises(BrokerUnavailable):
            broker.run(["SELECT 1"])

    def test_a_unix_socket(self, postgres: Postgres, tmp_path: Path) -> None:
        path = tmp_path / "broker.sock"
        process = BrokerProcess(configuration(postgres), listen=f"unix:{path}")
        try:
            with session_broker.connect(f"unix:{path}") as broker, broker.session() as session:
                assert session.execute("SELECT 1").scalar() == 1
        finally:
            process.stop()

    def test_a_broker_that_comes_late_is_waited_for(self, postgres: Postgres) -> None:
        port = free_port()
        started: list[BrokerProcess] = []
        text = configuration(postgres)
        starting = threading.Timer(0.3, lambda: started.append(BrokerProcess(text, f"127.0.0.1:{port}")))
        starting.start()
        try:
            with (
                session_broker.connect(f"127.0.0.1:{port}", retry=Retry(20, 20)) as broker,
                broker.session() as session,
            ):
                assert session.execute("SELECT 1").scalar() == 1
        finally:
            starting.join()
            for process in started:
                process.stop()


class TestCredentials:
    @pytest.fixture
    def guarded(self, start_broker: StartBroker, postgres: Postgres) -> str:
        """A broker that lets nobody in without a token."""
        tables = "[principals.billing]"
        text = configuration(postgres, anonymous=False, tables=tables).replace(
            "[authentication.tokens]", f'[authentication.tokens]\nbilling = ["{digest("billing")}"]'
        )
        return start_broker(text).target

    def test_a_token_or_what_gives_one(self, guarded: str) -> None:
        for credentials in ("billing", lambda: "billing"):
            with session_broker.connect(guarded, credentials=credentials) as broker, broker.session() as session:
                assert session.execute("SELECT 1").scalar() == 1

    @pytest.mark.parametrize("credentials", [None, "wrong"])
    def test_wrong_credentials_are_refused(self, guarded: str, credentials: str | None) -> None:
        error = failure(session_broker.connect(guarded, credentials=credentials))
        assert isinstance(error, OperationalError)
        assert (error.reason, error.advice) == ("UNAUTHENTICATED", Advice.NOTHING)
        assert "wrong" not in str(error)

    def test_credentials_that_expire_are_refused_and_fresh_ones_go_on(self, guarded: str) -> None:
        token = ["billing"]
        with session_broker.connect(guarded, credentials=lambda: token[0]) as broker, broker.session() as session:
            session.execute("SELECT 1")
            token[0] = "expired"
            with pytest.raises(OperationalError) as caught:
                session.execute("SELECT 2")
            assert caught.value.reason == "UNAUTHENTICATED"
            token[0] = "billing"
            assert session.execute("SELECT 3").scalar() == 3

    async def test_a_function_that_fails_is_told_without_its_words(self, guarded: str) -> None:
        def fail() -> str:
            raise ValueError("a secret")

        async def fail_too() -> str:
            raise ValueError("a secret")

        with session_broker.connect(guarded, credentials=fail) as broker:
            with pytest.raises(OperationalError, match="credentials raised ValueError") as caught:
                broker.run(["SELECT 1"])
            assert "a secret" not in str(caught.value)
        async with aio.connect(guarded, credentials=fail_too) as tasks:
            with pytest.raises(OperationalError, match="credentials raised ValueError"):
                await tasks.run(["SELECT 1"])

    def test_credentials_do_not_go_over_a_network_in_plain_text(self) -> None:
        with pytest.raises(ProgrammingError, match="plaintext_beyond_loopback"):
            session_broker.connect("broker.example:50051", credentials="billing")
        session_broker.connect("broker.example:50051", credentials="billing", plaintext_beyond_loopback=True).close()
        session_broker.connect("broker.example:50051", credentials="billing", tls=True).close()

    def test_what_only_operators_may_is_refused_to_others(self, broker: Broker, target: str, admin: str) -> None:
        with pytest.raises(OperationalError) as caught:
            broker.sessions()
        assert caught.value.reason == "FORBIDDEN"
        with broker.session(labels={"test": "terminated"}) as session:
            session.execute("SELECT 1")
            with session_broker.connect(target, credentials=admin) as operations:
                (found,) = operations.sessions(labels={"test": "terminated"})
                assert found.session_id == session.id
                assert operations.terminate(found.session_id, "a test") is EndReason.TERMINATED
            with pytest.raises(SessionEnded) as ended:
                session.execute("SELECT 1")
            assert ended.value.end_reason is EndReason.TERMINATED
            session.rollback()


class Authority:
    """Certificates, and their files."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = self._write(f"{name}.crt", self._sign(self._name, self._key, ca=True))

    def issue(self, name: str, *alternatives: x509.GeneralName) -> tuple[Path, Path]:
        """A certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        certificate = self._write(f"{name}.crt", self._sign(subject, key, alternatives))
        return certificate, self._write(f"{name}.key", pem)

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        alternatives: tuple[x509.GeneralName, ...] = (),
        ca: bool = False,
    ) -> bytes:
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, data: bytes) -> Path:
        file = self.directory / name
        file.write_bytes(data)
        return file


class TestTls:
    @pytest.fixture
    def authority(self, tmp_path: Path) -> Authority:
        """Who vouches for the broker and for clients."""
        return Authority(tmp_path, "authority")

    @pytest.fixture
    def encrypted(self, start_broker: StartBroker, postgres: Postgres, authority: Authority) -> str:
        """A broker with TLS that asks for a client certificate, and lets nobody in without."""
        loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        certificate, key = authority.issue("broker", x509.DNSName("broker.test"), loopback)
        tables = f"""
            [tls]
            certificate = "{certificate}"
            key = "{key}"
            client_ca = "{authority.file}"
            client_certificates = "optional"
            [principals."orders"]
        """
        text = configuration(postgres, anonymous=False, tables=tables)
        return start_broker(text.replace("[authentication]", '[authentication]\ncertificate = "cn"')).target

    def test_a_client_certificate_lets_in(self, encrypted: str, authority: Authority) -> None:
        certificate, key = authority.issue("orders")
        tls = TLS(ca=authority.file, certificate=certificate, key=key)
        with session_broker.connect(encrypted, tls=tls) as broker, broker.session() as session:
            assert session.execute("SELECT 1").scalar() == 1

    def test_a_token_lets_in_under_another_name(self, encrypted: str, authority: Authority) -> None:
        tls = TLS(ca=authority.file.read_bytes(), server_name="broker.test")
        with session_broker.connect(encrypted, tls=tls, credentials=ADMIN_TOKEN) as broker, broker.session() as session:
            assert session.execute("SELECT 1").scalar() == 1

    def test_an_authority_that_is_not_believed(self, encrypted: str, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        stranger = Authority(tmp_path / "other", "stranger")
        error = failure(session_broker.connect(encrypted, tls=TLS(ca=stranger.file), retry=ONCE))
        assert isinstance(error, BrokerUnavailable)
        assert "handshake failed" in str(error)

    def test_a_name_that_is_not_the_brokers(self, encrypted: str, authority: Authority) -> None:
        tls = TLS(ca=authority.file, server_name="other.test")
        assert isinstance(failure(session_broker.connect(encrypted, tls=tls, retry=ONCE)), BrokerUnavailable)

    def test_tls_to_a_broker_without(self, target: str, authority: Authority) -> None:
        error = failure(session_broker.connect(target, tls=TLS(ca=authority.file), retry=ONCE))
        assert isinstance(error, BrokerUnavailable)
        assert "handshake failed" in str(error)

    def test_plain_text_to_a_broker_with(self, encrypted: str) -> None:
        assert isinstance(failure(session_broker.connect(encrypted, retry=ONCE)), BrokerUnavailable)

    def test_wrong_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(ProgrammingError, match=r"tls\.ca"):
            session_broker.connect("broker.example:1", tls=TLS(ca=tmp_path / "missing"))
        with pytest.raises(ProgrammingError, match="go together"):
            session_broker.connect("broker.example:1", tls=TLS(certificate=b"x"))


class TestOwners:
    def test_calls_on_a_session_go_where_it_lives(self, start_broker: StartBroker, postgres: Postgres) -> None:
        process = start_broker(configuration(postgres))
        with link(process.target) as front, session_broker.connect(front.target) as broker:
            session = broker.session()
            session.execute("SELECT 1")
            front.refuse()
            front.cut()
            assert session.execute("SELECT 2").scalar() == 2
            session.close()

    def test_an_owner_that_does_not_answer_is_reached_by_the_target(
        self, start_broker: StartBroker, postgres: Postgres
    ) -> None:
        process = start_broker(configuration(postgres, top=f'endpoint = "127.0.0.1:{free_port()}"'))
        with session_broker.connect(process.target) as broker:
            with broker.session() as session:
                assert session.execute("SELECT 1").scalar() == 1
            began = time.monotonic()
            with broker.session() as session:
                assert session.execute("SELECT 1").scalar() == 1
            assert time.monotonic() - began < 1

    def test_owners_are_not_followed_where_that_is_not_wanted(
        self, start_broker: StartBroker, postgres: Postgres
    ) -> None:
        process = start_broker(configuration(postgres))
        with link(process.target) as front, session_broker.connect(front.target, follow_owner=False) as broker:
            session = broker.session()
            session.execute("SELECT 1")
            front.refuse()
            front.cut()
            with pytest.raises(BrokerUnavailable):
                session.execute("SELECT 2")
            session.abandon()

    def test_an_owner_that_comes_back_is_followed_again(
        self, start_broker: StartBroker, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("session_broker._broker.UNREACHABLE_TIME", 0.0)
        monkeypatch.setattr("session_broker._sync.PROBE_TIMEOUT", 0.5)
        with link("127.0.0.1:1") as back:
            process = start_broker(configuration(postgres, top=f'endpoint = "{back.target}"'))
            back.lead_to(process.target)
            with session_broker.connect(process.target, retry=ONCE) as broker:
                first = broker.session()
                assert first.execute("SELECT 1").scalar() == 1
                back.refuse()
                back.cut()
                with pytest.raises(BrokerUnavailable):
                    first.execute("SELECT 1")
                with broker.session() as session:
                    assert session.execute("SELECT 1").scalar() == 1
                back.refuse(False)
                with broker.session() as session:
                    assert session.execute("SELECT 1").scalar() == 1
                    assert session._core.grant is not None
                    assert session._core.grant.endpoint == back.target
                first.close()

    async def test_a_session_granted_while_its_owner_is_sought_is_closed(
        self, start_broker: StartBroker, postgres: Postgres, admin: str
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
            process = start_broker(configuration(postgres, top=f'endpoint = "{endpoint}"'))
            async with aio.connect(process.target, credentials=admin) as broker:
                session = broker.session(labels={"test": "sought"})
                task = asyncio.create_task(session.execute("SELECT 1"))
                while not await broker.sessions(labels={"test": "sought"}):
                    assert not task.done()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await session.close()
                assert not await broker.sessions(labels={"test": "sought"})


class TestKeepAlive:
    LEASE = 1.0

    def test_a_session_that_ended_does_not_end_the_others(self, broker: Broker, target: str, admin: str) -> None:
        ended = broker.session(lease_ttl=self.LEASE)
        ended.execute("SELECT 1")
        with session_broker.connect(target, credentials=admin) as operations:
            operations.terminate(ended.id, "a test")
        quiet_until = time.monotonic() + self.LEASE
        wait_until(lambda: time.monotonic() > quiet_until)
        with broker.session(lease_ttl=self.LEASE) as kept:
            kept.execute("CREATE TEMPORARY TABLE kept (a int)")
            quiet_until = time.monotonic() + 1.5 * self.LEASE
            wait_until(lambda: time.monotonic() > quiet_until)
            assert kept.execute("SELECT count(*) FROM kept").scalar() == 0
        ended.close()

    def test_credentials_that_fail_once_do_not_end_it(self, target: str, admin: str) -> None:
        failed = threading.Event()

        def token() -> str:
            if threading.current_thread().name == "session-broker-keeper" and not failed.is_set():
                failed.set()
                raise ZeroDivisionError
            return admin

        with session_broker.connect(target, credentials=token) as broker, broker.session(lease_ttl=1) as session:
            session.execute("CREATE TEMPORARY TABLE kept (a int)")
            quiet_until = time.monotonic() + 2
            wait_until(lambda: time.monotonic() > quiet_until)
            assert failed.is_set()
            assert session.execute("SELECT count(*) FROM kept").scalar() == 0

    async def test_credentials_that_fail_once_do_not_end_it_in_a_task(self, target: str, admin: str) -> None:
        quiet = failed = False

        async def token() -> str:
            nonlocal failed
            if quiet and not failed:
                failed = True
                raise ZeroDivisionError
            return admin

        async with aio.connect(target, credentials=token) as broker, broker.session(lease_ttl=1) as session:
            unheard: list[object] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
            await session.execute("CREATE TEMPORARY TABLE kept (a int)")
            quiet = True
            quiet_until = time.monotonic() + 2
            await asyncio.to_thread(wait_until, lambda: time.monotonic() > quiet_until)
            assert failed
            assert (await session.execute("SELECT count(*) FROM kept")).scalar() == 0
            gc.collect()
            assert not unheard

    def test_a_session_is_looked_at_once_however_often_it_is_granted(self, broker: Broker) -> None:
        schedule = Schedule()
        with broker.session() as session:
            session.execute("SELECT 1")
            session._core.renew_at = 0.0
            for _ in range(3):
                schedule.add(session._core)
            assert len(schedule) == 1
            assert list(schedule.due()) == [session._core]

    def test_what_cannot_be_renewed_is_tried_again_until_its_lease_has_run_out(self, target: str) -> None:
        with link(target) as cable, session_broker.connect(cable.target, follow_owner=False) as broker:
            session = broker.session(lease_ttl=1)
            session.execute("SELECT 1")
            call = session._core.renewal()
            assert call is not None
            unsent = BrokerUnavailable("a test")
            unsent.advice = Advice.CALL
            cable.refuse()
            cable.cut()
            before = time.monotonic()
            session._core.renewed(call, unsent)
            assert session._core.renew_at >= before + session._core.renew_after / 2
            wait_until(lambda: session._core.renewal() is None, 5)
            session.abandon()

    def test_idle_sessions_are_kept_with_a_transaction_and_without(self, broker: Broker) -> None:
        sessions = [broker.session(lease_ttl=self.LEASE) for _ in range(50)]
        for session in sessions:
            session.execute("SELECT 1", commit=True)
        sessions[0].execute("CREATE TEMPORARY TABLE kept (a int)")
        quiet_until = time.monotonic() + 2.5 * self.LEASE
        wait_until(lambda: time.monotonic() > quiet_until)
        assert sessions[0].execute("SELECT count(*) FROM kept").scalar() == 0
        for session in sessions:
            assert session.execute("SELECT 1").scalar() == 1
            session.close()

    def test_a_session_that_nobody_holds_is_let_go(self, broker: Broker, target: str, admin: str) -> None:
        def alive() -> int:
            with session_broker.connect(target, credentials=admin) as operations:
                return len(operations.sessions(labels={"test": "dropped"}))

        session = broker.session(lease_ttl=self.LEASE, labels={"test": "dropped"})
        session.execute("SELECT 1")
        assert alive() == 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del session
            gc.collect()
        assert [warning.category for warning in caught] == [ResourceWarning]
        caught.clear()
        wait_until(lambda: alive() == 0)

    def test_a_session_that_expired_while_nothing_could_keep_it_is_told(self, target: str) -> None:
        with link(target) as cable, session_broker.connect(cable.target, follow_owner=False) as broker:
            session = broker.session(lease_ttl=self.LEASE)
            session.execute("SELECT 1")
            cable.refuse()
            cable.cut()
            quiet_until = time.monotonic() + 1.5 * self.LEASE
            wait_until(lambda: time.monotonic() > quiet_until)
            cable.refuse(False)
            with pytest.raises(SessionEnded) as caught:
                session.execute("SELECT 1")
            assert caught.value.end_reason is EndReason.LEASE_EXPIRED
            session.close()
            with broker.session() as another:
                assert another.execute("SELECT 1").scalar() == 1

    def test_an_interrupted_link_is_survived(self, target: str) -> None:
        with (
            link(target) as cable,
            session_broker.connect(cable.target, follow_owner=False) as broker,
            broker.session(lease_ttl=2.0) as session,
        ):
            session.execute("CREATE TEMPORARY TABLE kept (a int)")
            for _ in range(3):
                cable.cut()
                quiet_until = time.monotonic() + 1.0
                wait_until(lambda until=quiet_until: time.monotonic() > until)  # type: ignore[misc]
            assert session.execute("SELECT count(*) FROM kept").scalar() == 0

    def test_the_thread_ends_with_its_connection(self, target: str) -> None:
        def keepers() -> set[threading.Thread]:
            return {thread for thread in threading.enumerate() if thread.name == "session-broker-keeper"}

        before = keepers()
        broker = session_broker.connect(target)
        with broker.session() as session:
            session.execute("SELECT 1")
        (keeper,) = keepers() - before
        del broker, session
        gc.collect()
        wait_until(lambda: not keeper.is_alive())


class TestProcesses:
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
    def test_a_forked_child_is_told(self, server: Server) -> None:
        script = Path(__file__).with_name("fork_program.py")
        done = subprocess.run(
            [sys.executable, str(script), server.target], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["child: InterfaceError", "child: 0", "parent: 2"]

    def test_errors_travel_between_processes(self, broker: Broker) -> None:
        with pytest.raises(ProgrammingError) as caught, broker.session() as session:
            session.execute("SELECT nothing")
        copy = pickle.loads(pickle.dumps(caught.value))
        assert type(copy) is type(caught.value)
        assert (str(copy), copy.sqlstate, copy.advice) == (str(caught.value), "42703", Advice.NOTHING)
        assert copy.pg == caught.value.pg

    def test_a_spawned_child_connects_anew(self, server: Server) -> None:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(spawned, [server.target]) == 1


def spawned(target: str) -> object:
    """What a child process does."""
    with session_broker.connect(target) as broker, broker.session() as session:
        return session.execute("SELECT 1").scalar()


class TestAttach:
    GRACE = 'disconnect_grace = "1s"'
    HOLD = "SELECT pg_advisory_xact_lock(4711)"
    HOLDERS = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711"

    def test_a_program_that_dies_is_rolled_back_within_seconds(
        self, start_broker: StartBroker, postgres: Postgres
    ) -> None:
        process = start_broker(configuration(postgres, profile=self.GRACE))
        program = """
import sys, session_broker
session = session_broker.connect(sys.argv[1]).session(attach=True)
session.execute("SELECT pg_advisory_xact_lock(4711)")
while not session.info().state.attached: pass
print("ready", flush=True)
sys.stdin.read()
"""
        child = subprocess.Popen(
            [sys.executable, "-c", program, process.target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert postgres.value(self.HOLDERS) == 1
        began = time.monotonic()
        child.kill()
        child.communicate()
        wait_until(lambda: postgres.value(self.HOLDERS) == 0)
        assert time.monotonic() - began < 5

    def test_an_interrupted_link_is_survived(self, start_broker: StartBroker, postgres: Postgres) -> None:
        process = start_broker(configuration(postgres, profile='disconnect_grace = "5s"'))
        with (
            link(process.target) as cable,
            session_broker.connect(cable.target, follow_owner=False) as broker,
            broker.session(attach=True, lease_ttl=2) as session,
        ):
            session.execute("CREATE TEMPORARY TABLE kept (a int)")
            wait_until(lambda: session.info().state.attached)
            cable.cut()
            wait_until(lambda: not session.info().state.attached)
            wait_until(lambda: session.info().state.attached)
            assert session.execute("SELECT count(*) FROM kept").scalar() == 0

    def test_a_session_that_nobody_holds_is_let_go(self, start_broker: StartBroker, postgres: Postgres) -> None:
        process = start_broker(configuration(postgres, profile=self.GRACE))
        with session_broker.connect(process.target) as broker:
            session = broker.session(attach=True)
            session.execute(self.HOLD)
            while not session.info().state.attached:
                assert postgres.value(self.HOLDERS) == 1
            session.abandon()
            del session
            wait_until(lambda: postgres.value(self.HOLDERS) == 0)

    async def test_tasks_attach_too(self, start_broker: StartBroker, postgres: Postgres) -> None:
        process = start_broker(configuration(postgres, profile=self.GRACE))
        async with aio.connect(process.target) as broker:
            session = broker.session(attach=True)
            await session.execute(self.HOLD)
            while not (await session.info()).state.attached:
                assert postgres.value(self.HOLDERS) == 1
            session.abandon()
            await asyncio.to_thread(wait_until, lambda: postgres.value(self.HOLDERS) == 0)
