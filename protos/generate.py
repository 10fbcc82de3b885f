"""Regenerate every ``_pb`` package from the .proto files beside this script: ``python protos/generate.py [ROOT]``.

A package gets one module of betterproto2 messages per proto package and one ``*_grpc`` module per service: a base class
in grpclib's shape and a stub. The server's own package also gets ``descriptors.bin``, its serialized FileDescriptorSet.

Messages come from betterproto2_compiler. Its services do not: they import asyncio, and their streaming calls are async
generators that own a task. The service modules are written here, from the same descriptors.

ROOT defaults to the repository; a test passes an empty directory and compares.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from betterproto2_compiler.casing import pascal_case, safe_snake_case
from betterproto2_compiler.lib.google.protobuf import FileDescriptorProto, FileDescriptorSet, ServiceDescriptorProto
from betterproto2_compiler.lib.google.protobuf.compiler import CodeGeneratorRequest
from betterproto2_compiler.plugin.models import get_comment
from betterproto2_compiler.plugin.parser import generate_code
from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
OPTIONS = "client_generation=none,server_generation=none"
PREAMBLE = """\
from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import Deadline

from triton_trio.grpc.stub import ClientStream, Messages, Metadata, ServerStream, ServiceBase, ServiceStub

"""


@dataclass(frozen=True)
class Package:
    """One ``_pb`` directory: its .proto files, and the module that each proto package becomes."""

    directory: str
    files: tuple[str, ...]
    modules: dict[str, str]
    descriptors: bool = False


PACKAGES = (
    Package(
        "triton_trio/_pb",
        ("model_config.proto", "grpc_service.proto", "health.proto"),
        {"inference": "inference", "grpc.health.v1": "health"},
        descriptors=True,
    ),
    Package("triton_trio/testing/_pb", ("echo.proto",), {"triton_trio.testing": "echo"}),
    Package("tests/_pb", ("codec_torture.proto",), {"triton_trio.torture": "torture"}),
)


def header(files: tuple[str, ...]) -> str:
    sources = ", ".join(f"protos/{name}" for name in files)
    return f"# Generated from {sources} by protos/generate.py.\n# Do not edit: change those, then run `make protos`.\n"


def describe(package: Package, *options: str) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "set.bin")
        code = protoc.main(
            ["protoc", f"--proto_path={PROTOS}", f"--descriptor_set_out={out}", *options, *package.files]
        )
        if code:
            raise SystemExit(f"protoc failed on {', '.join(package.files)} (exit status {code}); its message is above")
        return out.read_bytes()


def message_modules(package: Package, files: list[FileDescriptorProto]) -> Iterator[tuple[str, str]]:
    with redirect_stderr(StringIO()) as said:
        response = generate_code(CodeGeneratorRequest(list(package.files), OPTIONS, proto_file=files))
    # It reports each file of its own layout; only its warnings are news.
    sys.stderr.writelines(line for line in said.getvalue().splitlines(True) if not line.startswith("Writing "))
    made = {file.name: file.content for file in response.file}
    yield "message_pool.py", header(package.files) + made["message_pool.py"]
    for proto_package, module in package.modules.items():
        code = made[f"{proto_package.replace('.', '/')}/__init__.py"]
        # The compiler nests one package per dot; ours is flat.
        dots = "." * (proto_package.count(".") + 2)
        if f"from {dots}message_pool import" not in code:
            raise SystemExit(f"betterproto2_compiler changed its layout: no {dots}message_pool in {proto_package}")
        code = code.replace(f"from {dots}message_pool import", "from .message_pool import")
        sources = tuple(file.name for file in files if file.package == proto_package)
        yield f"{module}.py", header(sources) + code


def docstring(text: str, indent: str) -> str:
    """``text`` as a docstring of an ``indent``-deep body."""
    if not text:
        return ""
    quoted = '"""' + text.replace("\n", "\n" + indent).replace(indent + "\n", "\n")
    return f'{indent}{quoted}"""\n' if "\n" not in text else f'{indent}{quoted}\n{indent}"""\n'


def service_module(file: FileDescriptorProto, index: int, service: ServiceDescriptorProto, messages: str) -> str:
    name = pascal_case(service.name)
    base, stub, mapping, used = [], [], [], set()
    for position, method in enumerate(service.method):
        request, reply = (pascal_case(t.rpartition(".")[2]) for t in (method.input_type, method.output_type))
        used |= {request, reply}
        python_name = safe_snake_case(method.name)
        route = f'"/{file.package}.{service.name}/{method.name}"'
        kind = "_".join("stream" if side else "unary" for side in (method.client_streaming, method.server_streaming))
        doc = docstring(get_comment(file, [6, index, 2, position]), " " * 8)

        unary = kind == "unary_unary"
        takes = f"request: {request}" if unary else f"stream: ServerStream[{request}, {reply}]"
        gives = reply if unary else "None"
        base.append(
            f"    async def {python_name}(self, {takes}) -> {gives}:\n{doc}"
            f'        raise GRPCError(Status.UNIMPLEMENTED, "{method.name} is not implemented")\n'
        )
        handler = f"self._unary_unary(self.{python_name})" if unary else f"self.{python_name}"
        mapping.append(f"            {route}: Handler({handler}, Cardinality.{kind.upper()}, {request}, {reply}),\n")

        argument, types = {
            "unary_unary": (f"request: {request}, ", f"request, {reply}"),
            "unary_stream": (f"request: {request}, ", f"request, {reply}"),
            "stream_unary": (f"messages: Messages[{request}], ", f"messages, {request}, {reply}"),
            "stream_stream": ("", f"{request}, {reply}"),
        }[kind]
        prefix = "" if method.server_streaming else "async "
        result = f"AbstractAsyncContextManager[ClientStream[{request}, {reply}]]" if method.server_streaming else reply
        call = f"self._{kind}({route}, {types}, timeout=timeout, deadline=deadline, metadata=metadata)"
        stub.append(
            f"    {prefix}def {python_name}(self, {argument}*, timeout: float | None = None, "
            f"deadline: Deadline | None = None, metadata: Metadata | None = None) -> {result}:\n{doc}"
            f"        return {'await ' if prefix else ''}{call}\n"
        )

    doc = docstring(get_comment(file, [6, index]), " " * 4)
    return "".join(
        (
            header((file.name,)),
            PREAMBLE,
            f"from .{messages} import {', '.join(sorted(used))}\n\n",
            f'__all__ = ("{name}Base", "{name}Stub")\n\n\n',
            f"class {name}Base(ServiceBase):\n{doc}\n",
            "\n".join(base),
            "\n    def __mapping__(self) -> dict[str, Handler]:\n        return {\n",
            *mapping,
            "        }\n\n\n",
            f"class {name}Stub(ServiceStub):\n{doc}\n",
            "\n".join(stub),
        )
    )


def tidy(code: str) -> str:
    code = _ruff("check", "--select", "I,F401", "--fix", "--silent", "-", code=code)
    return _ruff("format", "-", code=code)


def _ruff(*arguments: str, code: str) -> str:
    return subprocess.run(["ruff", *arguments], input=code, stdout=subprocess.PIPE, check=True, encoding="utf-8").stdout


def generate(package: Package) -> dict[str, str | bytes]:
    """The files of one package by name."""
    described = FileDescriptorSet.parse(describe(package, "--include_imports", "--include_source_info"))
    files: dict[str, str | bytes] = {"__init__.py": header(package.files)}
    files |= message_modules(package, described.file)
    for file in described.file:
        for index, service in enumerate(file.service):
            module = package.modules[file.package]
            files[f"{module}_grpc.py"] = tidy(service_module(file, index, service, module))
    if package.descriptors:
        files["descriptors.bin"] = describe(package, "--include_imports")
    return files


def main(root: Path) -> None:
    # betterproto2_compiler looks for ruff on PATH; a virtual environment need not be active.
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    root = root.resolve()
    for package in PACKAGES:
        # From a directory without settings, so that ruff's output depends on nothing but its version.
        with tempfile.TemporaryDirectory() as neutral, chdir(neutral):
            files = generate(package)
        directory = root / package.directory
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            (directory / name).write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS.parent)
