"""What the tests stand on: a PostgreSQL and brokers of their own, and a link between two programs that can be cut."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg

# Runs a program ($3 ...) in the directory $2 until the end of standard input, which the test process holds: however
# that ends, the program then gets the signal $1 and the directory goes. Its process id is the first line of output.
SUPERVISOR = """
signal=$1 directory=$2
cd "$directory" || exit 1
shift 2
sh -c 'echo $$; exec "$@"' sh "$@" </dev/null &
program=$!
exec >/dev/null
trap '' INT
cat >/dev/null
kill -"$signal" $program 2>/dev/null
wait $program
rm -rf "$directory"
"""

# What every broker of the tests shares, so that each opens the others' commit tokens.
COMMIT_TOKEN_KEY = "a key for tests, not drawn at random"

# The bearer token of the principal with the admin right.
ADMIN_TOKEN = "operations-" + secrets.token_hex(16)


def digest(token: str) -> str:
    """What a broker's configuration holds of a static token."""
    return "sha256:" + hashlib.sha256(token.encode()).hexdigest()


def wait_until(promise: Callable[[], bool], seconds: float = 10.0) -> None:
    """Looks again and again; fails when it has not come true in time."""
    deadline = time.monotonic() + seconds
    while not promise():
        assert time.monotonic() < deadline, f"not within {seconds} s: {promise}"
        time.sleep(0.01)


def free_port() -> int:
    """A port of 127.0.0.1 below those that the system hands out to clients."""
    start = secrets.randbelow(12_000)
    for port in (20_000 + (start + offset) % 12_000 for offset in range(12_000)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class Program:
    """A supervised program: it ends with the test process, whatever becomes of that."""

    def __init__(
        self, *command: str, directory: Path, stop: signal.Signals, user: str | None = None, stderr: Path | None = None
    ) -> None:
        account = pwd.getpwnam(user) if user else None
        with Path(stderr or os.devnull).open("wb") as log:
            self.supervisor = subprocess.Popen(
                ["/bin/sh", "-c", SUPERVISOR, "sh", str(int(stop)), str(directory), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                user=account and account.pw_uid,
                group=account and account.pw_gid,
                extra_groups=[] if account else None,
                start_new_session=True,
            )
        assert self.supervisor.stdout is not None
        self.output = self.supervisor.stdout
        self.pid = int(self.output.readline())

    def signal(self, number: signal.Signals) -> None:
        """Sends the program a signal."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """Ends it, and waits until it is gone."""
        assert self.supervisor.stdin is not None
        self.supervisor.stdin.close()
        self.supervisor.wait(30)
        self.output.close()


class Postgres:
    """A throw-away PostgreSQL server on a free port of 127.0.0.1."""

    def __init__(self) -> None:
        self.user = next((name for name in ("postgres", "nobody") if os.geteuid() == 0 and _has_account(name)), None)
        self.directory = Path(tempfile.mkdtemp(prefix="session-broker-client-", dir="/tmp"))
        self.password = secrets.token_hex(8)
        self.port = free_port()
        self.programs = _server_programs()
        (self.directory / "password").write_text(self.password)
        if self.user:
            shutil.chown(self.directory, self.user)
            shutil.chown(self.directory / "password", self.user)
        initdb = [str(self.programs / "initdb"), "-D", f"{self.directory}/data", "-U", "postgres", "-E", "UTF8"]
        initdb += ["--locale=C", "-A", "scram-sha-256", f"--pwfile={self.directory}/password", "--no-sync"]
        made = subprocess.run(
            initdb, capture_output=True, user=self.user, cwd=self.directory, text=True, extra_groups=self.user and []
        )
        assert made.returncode == 0, made.stderr
        self._start()
        with self.connect("postgres") as superuser:
            superuser.execute(f"CREATE ROLE broker LOGIN PASSWORD '{self.password}'".encode())
        self.create_database("main")

    def _start(self) -> None:
        settings = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self.directory}
        settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": 200}
        settings |= {"timezone": "UTC", "max_prepared_transactions": 10}
        options = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
        server = str(self.programs / "postgres")
        self.program = Program(
            server,
            *("-D", f"{self.directory}/data", *options),
            directory=self.directory,
            stop=signal.SIGQUIT,
            user=self.user,
            stderr=None,
        )
        wait_until(lambda: "ready" in self._pid_file(), 30)

    def _pid_file(self) -> str:
        with contextlib.suppress(OSError):
            return (self.directory / "data" / "postmaster.pid").read_text()
        return ""

    def stop(self) -> None:
        """Ends the server and removes its directory."""
        self.program.stop()

    def create_database(self, name: str) -> None:
        """Makes a database with the accounts of the README, owned by the broker's role."""
        with self.connect("postgres") as superuser:
            superuser.execute(f"CREATE DATABASE {name} OWNER broker".encode())
        with self.connect(name) as superuser:
            superuser.execute(
                "CREATE TABLE accounts (id int PRIMARY KEY, owner text NOT NULL, "
                "balance numeric(12, 2) NOT NULL CHECK (balance >= 0)); "
                "INSERT INTO accounts VALUES (1, 'Ada', 100.00), (2, 'Grace', 50.00); "
                "ALTER TABLE accounts OWNER TO broker; GRANT ALL ON SCHEMA public TO broker"
            )

    def url(self, database: str = "main", user: str = "broker") -> str:
        """A database's URL."""
        return f"postgresql://{user}:{self.password}@127.0.0.1:{self.port}/{database}"

    def connect(self, database: str = "main") -> psycopg.Connection:
        """An independent witness: the superuser, in autocommit."""
        return psycopg.connect(self.url(database, "postgres"), autocommit=True)

    def value(self, sql: str, database: str = "main") -> object:
        """The one value of a query, as the witness sees it."""
        with self.connect(database) as witness:
            row = witness.execute(sql.encode()).fetchone()
        assert row is not None
        return row[0]


class BrokerProcess:
    """A running session-broker."""

    def __init__(self, configuration: str, listen: str = "127.0.0.1:0") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="session-broker-client-", dir="/tmp"))
        self.log = self.directory / "log"
        file = self.directory / "broker.toml"
        file.write_text(configuration)
        binary = os.environ.get("SESSION_BROKER", "session-broker")
        found = shutil.which(binary)
        assert found, f"{binary} is not there: set SESSION_BROKER to the broker's program"
        command = [found, "serve", "--config", str(file), "--listen", listen]
        self.program = Program(*command, directory=self.directory, stop=signal.SIGKILL, stderr=self.log)
        ready = self.program.output.readline()
        assert "listening on " in ready, f"the broker did not start: {self.log.read_text()}"
        self.target = ready.rsplit(" ", 1)[1].strip()

    def kill(self) -> None:
        """Ends it without a word, as a crash does."""
        self.program.signal(signal.SIGKILL)
        wait_until(lambda: not _is_alive(self.program.pid))

    def stop(self) -> None:
        """Ends it."""
        self.program.stop()


def configuration(
    postgres: Postgres, *, profile: str = "", tables: str = "", top: str = "", engine: str = "", anonymous: bool = True
) -> str:
    """A broker's configuration for `postgres`: lines of the default profile and the engine, and further tables."""
    return f"""
commit_token_key = "{COMMIT_TOKEN_KEY}"
drain_grace = "1s"
{top}
[engines.main]
url = "{postgres.url()}"
{engine}
[authentication]
anonymous = {str(anonymous).lower()}
[authentication.tokens]
operations = ["{digest(ADMIN_TOKEN)}"]
[principals.anonymous]
[principals.operations]
admin = true
[profiles.default]
{profile}
{tables}
"""


class Frames:
    """Tells answers in what an HTTP/2 server sends from what it says of the connection itself."""

    HEADERS = 1

    def __init__(self) -> None:
        self._buffer = b""
        self._skip = 0

    def answers_in(self, data: bytes) -> bool:
        """Whether an answer begins or ends in the next bytes."""
        found = False
        data = self._buffer + data
        while True:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
            if self._skip or len(data) < 9:
                self._buffer = data
                return found
            found = found or data[3] == self.HEADERS
            self._skip = 9 + int.from_bytes(data[:3], "big")


class Link:
    """A TCP proxy before a gRPC server, whose answers can be swallowed and whose connections can be cut."""

    def __init__(self, target: str) -> None:
        self.lead_to(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._dropping = threading.Event()
        self._refusing = threading.Event()
        self._deaf = threading.Event()
        self.dropped = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def lead_to(self, target: str) -> None:
        """Where connections made from now on lead."""
        host, _, port = target.rpartition(":")
        self._server = (host, int(port))

    def drop_answers(self) -> None:
        """From now on, what the server sends is swallowed; `dropped` is set when there was an answer in it."""
        self.dropped.clear()
        self._dropping.set()

    def drop_requests(self) -> None:
        """From now on, what the client sends is swallowed; `dropped` is set when there was some."""
        self.dropped.clear()
        self._deaf.set()

    def cut(self) -> None:
        """Ends all connections. Those made later pass everything on."""
        self._dropping.clear()
        self._deaf.clear()
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def refuse(self, refusing: bool = True) -> None:
        """Whether new connections are ended at once."""
        (self._refusing.set if refusing else self._refusing.clear)()

    def close(self) -> None:
        """Ends everything."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing.is_set():
                near.close()
                continue
            try:
                far = socket.create_connection(self._server)
            except OSError:
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.append((near, far))
            threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        frames = Frames()
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                answered = answers and frames.answers_in(data)
                if not (self._dropping if answers else self._deaf).is_set():
                    sink.sendall(data)
                elif answered or not answers:
                    self.dropped.set()
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def link(target: str) -> Iterator[Link]:
    """A link that ends with the block."""
    made = Link(target)
    try:
        yield made
    finally:
        made.close()


def _has_account(name: str) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam(name))
    return False


def _is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be collected does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def _server_programs() -> Path:
    """Where initdb and postgres are: $PG_BIN, the PATH, or the newest that a package has installed."""
    on_path = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep)]
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    for directory in [Path(os.environ.get("PG_BIN", "")), *on_path, *packaged]:
        if (directory / "initdb").is_file() and (directory / "postgres").is_file():
            return directory
    raise AssertionError(
        "PostgreSQL's server programs were not found in $PG_BIN, on the PATH or where packages put them"
    )
