"""Generates src/sessionbroker/v1 from the broker's protos.

The compiler is pinned in an environment of its own: code from protoc 25 runs on protobuf 4.25 to 7, which that of later
compilers does not. `tests/test_generated.py` compares what is committed with the protos.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

COMPILER = ("grpcio-tools==1.62.3", "setuptools<81")
PROTOS = Path(__file__).resolve().parents[3] / "proto"
TARGET = Path(__file__).resolve().parents[1] / "src"


def main() -> None:
    """Makes the environment, compiles, and replaces what was there."""
    files = sorted(str(file.relative_to(PROTOS)) for file in PROTOS.glob("sessionbroker/v1/*.proto"))
    for old in (TARGET / "sessionbroker" / "v1").glob("*_pb2.py*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        python = str(Path(scratch, "Scripts" if sys.platform == "win32" else "bin", "python"))
        subprocess.run([python, "-m", "pip", "install", "--quiet", *COMPILER], check=True)
        command = [python, "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"--python_out={TARGET}", f"--pyi_out={TARGET}"]
        subprocess.run([*command, *files], check=True)


if __name__ == "__main__":
    main()
