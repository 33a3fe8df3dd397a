"""Runs SQLAlchemy's suite for dialects over psycopg and over the broker, on one PostgreSQL, and compares.

    SESSION_BROKER=target/release/session-broker python tests/suite/run.py [--part] [--asyncio]

Fails when a test that passes over psycopg neither passes over the broker nor is left out for a reason in
requirements.py, and when anything fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from requirements import CLASSES_LEFT_OUT  # noqa: E402
from support import BrokerProcess, Postgres, configuration  # noqa: E402

# The part that runs often leaves out what asks the same question of the catalogs a thousand times.
PART = "not ComponentReflectionTest and not QuotedNameArgumentTest and not BizarroCharacterTest"

DATABASES = ("by_psycopg", "by_broker")

PROFILE = """
transaction_timeout = "5m"
statement_timeout = "1m"
idle_in_transaction_timeout = "5m"
"""


def prepare(postgres: Postgres, database: str) -> None:
    """Makes a database with what the suite expects to find."""
    postgres.create_database(database)
    with postgres.connect(database) as superuser:
        superuser.execute("DROP TABLE accounts")
        for schema in ("test_schema", "test_schema_2"):
            superuser.execute(f"CREATE SCHEMA {schema} AUTHORIZATION broker".encode())


def run(url: str, report: Path, arguments: list[str]) -> None:
    """Runs the suite; what comes of it is in the report."""
    command = [sys.executable, "-m", "pytest", "-q", "suite.py", f"--dburi={url}", f"--junit-xml={report}", *arguments]
    subprocess.run(command, cwd=HERE, check=False)


def outcomes(report: Path) -> dict[str, tuple[str, str]]:
    """What came of each test, by its name without the driver's: passed, skipped or failed, and why."""
    found: dict[str, tuple[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kind_of_test = str(case.get("classname")).removeprefix("suite.").partition("_postgresql")[0]
        name = f"{kind_of_test}::{case.get('name')}"
        kind, why = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                kind, why = "failed", child.get("message") or ""
            elif child.tag == "skipped" and kind == "passed":
                kind, why = "skipped", child.get("message") or ""
        found[name] = kind, why
    return found


def main() -> int:
    """Compares the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="store_true", help="only the part that takes less than a minute")
    parser.add_argument("--asyncio", action="store_true", help="the broker's asynchronous dialect")
    parser.add_argument("arguments", nargs="*", help="pytest's")
    options = parser.parse_args()
    arguments = [*(["-k", PART] if options.part else []), *options.arguments]
    postgres = Postgres()
    broker = None
    try:
        for database in DATABASES:
            prepare(postgres, database)
        text = configuration(postgres, profile=PROFILE)
        text = text.replace(postgres.url(), postgres.url("by_broker"))
        broker = BrokerProcess(text)
        driver = "sessionbroker_async" if options.asyncio else "sessionbroker"
        with tempfile.TemporaryDirectory() as directory:
            expected_report, report = Path(directory, "psycopg.xml"), Path(directory, "broker.xml")
            psycopg_url = postgres.url("by_psycopg").replace("postgresql:", "postgresql+psycopg:")
            run(psycopg_url, expected_report, arguments)
            run(f"postgresql+{driver}://{broker.target}/main", report, arguments)
            return compare(outcomes(expected_report), outcomes(report))
    finally:
        if broker:
            broker.stop()
        postgres.stop()


def compare(expected: dict[str, tuple[str, str]], found: dict[str, tuple[str, str]]) -> int:
    """Prints how many tests passed over both, and what differs; 0 when nothing does without a reason."""
    passed = [name for name, (kind, _) in expected.items() if kind == "passed"]
    left_out: Counter[str] = Counter()
    wrong = [f"{name}: {why}" for name, (kind, why) in {**expected, **found}.items() if kind == "failed"]
    for name in passed:
        kind, why = found.get(name, ("missing", ""))
        if kind == "skipped":
            left_out[why.partition(" : ")[2]] += 1
        elif kind == "missing" and name.partition("::")[0] in CLASSES_LEFT_OUT:
            left_out[CLASSES_LEFT_OUT[name.partition("::")[0]]] += 1
        elif kind == "missing":
            wrong.append(f"{name}: did not run over the broker")
    both = sum(found.get(name, ("", ""))[0] == "passed" for name in passed)
    print(f"over psycopg {len(passed)} passed; of these {both} passed over the broker")
    for reason, count in sorted(left_out.items()):
        print(f"  left out: {count:4}  {reason}")
    for line in wrong:
        print(f"  FAILED {line[:300]}")
    return 1 if wrong or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
