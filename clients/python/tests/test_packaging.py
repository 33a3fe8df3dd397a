"""What is published: the wheel, the stubs, the types, the form of the code."""

from __future__ import annotations

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import grpc_tools
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

import session_broker

PROJECT = Path(__file__).resolve().parents[1]
PROTOS = PROJECT.parents[1] / "proto"


def test_the_wheel_has_all_that_is_needed(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(PROJECT)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"session_broker-{session_broker.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    source = PROJECT / "src"
    expected = {str(file.relative_to(source)) for file in source.rglob("*") if file.suffix in (".py", ".pyi", ".typed")}
    assert {"session_broker/py.typed", "sessionbroker/py.typed"} <= expected
    assert expected == {name for name in names if ".dist-info/" not in name}
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"postgresql.sessionbroker" in zipfile.ZipFile(wheel).read(entry_points)


def test_the_generated_code_is_that_of_the_protos(tmp_path: Path) -> None:
    files = sorted(str(file.relative_to(PROTOS)) for file in PROTOS.glob("sessionbroker/v1/*.proto"))
    described = tmp_path / "descriptors"
    includes = [f"-I{PROTOS}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    assert protoc.main(["protoc", *includes, f"--descriptor_set_out={described}", *files]) == 0
    for file in FileDescriptorSet.FromString(described.read_bytes()).file:
        module = importlib.import_module(file.name.removesuffix(".proto").replace("/", ".") + "_pb2")
        committed = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(committed)
        for proto in (file, committed):
            _forget_json_names(proto)
        assert committed == file, f"{file.name} has changed: run scripts/generate.py"


def _forget_json_names(file: FileDescriptorProto) -> None:
    """Compilers say them or leave them to their rule."""
    messages = list(file.message_type)
    while messages:
        message = messages.pop()
        messages += message.nested_type
        for field in message.field:
            field.ClearField("json_name")


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(session_broker.__all__) == sorted(set(session_broker.__all__))
    for name in session_broker.__all__:
        public = getattr(session_broker, name)
        assert public.__doc__ or public.__module__.startswith("sessionbroker."), name


@pytest.mark.parametrize(
    "command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=["ruff", "format", "mypy"]
)
def test_the_form(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
