"""Graphs as files: versioned JSON, with the captured tensors beside it as safetensors. Never pickle, never code.

The JSON holds a header (format, version, sha256 of the body) and a body: the operations in their text form, the lines
where the user wrote them (a file by its own name, without its folders, so that the same script makes the same file on
every machine), and a digest of each constant. Anything that was cut off or changed is refused by name.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import safetensors

from tracelens.errors import (
    ForbiddenFunctionError,
    GraphFileError,
    GraphSyntaxError,
    GraphVersionError,
    UntrustedApplyError,
    VerificationError,
)
from tracelens.ir.functions import FUNCTIONS
from tracelens.ir.graph import Constant, Graph
from tracelens.ir.ops import Call, Const
from tracelens.ir.parse import parse
from tracelens.ir.text import text
from tracelens.ir.types import DType, TensorType, parse_type
from tracelens.ir.verify import verify
from tracelens.location import Location

FORMAT = "tracelens-graph"
VERSION = (1, 0)

_deserialize = cast("Callable[[bytes], list[tuple[str, dict[str, Any]]]]", safetensors.deserialize)  # pyright: ignore[reportUnknownMemberType]  # untyped

_STORED = {
    "F64": DType.FLOAT64,
    "F32": DType.FLOAT32,
    "BF16": DType.BFLOAT16,
    "F16": DType.FLOAT16,
    "I64": DType.INT64,
    "I32": DType.INT32,
    "I16": DType.INT16,
    "I8": DType.INT8,
    "U8": DType.UINT8,
    "BOOL": DType.BOOL,
    "C64": DType.COMPLEX64,
}
_CODES = {dtype: code for code, dtype in _STORED.items()}


@dataclass(frozen=True, slots=True)
class StoredConstant:
    """A constant that came out of a file: bytes and a type."""

    type: TensorType
    name: str | None
    data: bytes

    def payload(self) -> bytes:
        return self.data


@dataclass(frozen=True, slots=True)
class StoredLocation(Location):
    """A line that came out of a file. Its source is elsewhere: a file of that name here may be quite another one."""

    @property
    def text(self) -> str:
        return ""


def to_json(graph: Graph, *, trusted: bool = False) -> str:
    """The graph as JSON text; the constants are :func:`constants_bytes`.

    Raises :class:`UntrustedApplyError` for a graph with ``tl.apply``, unless ``trusted``: then the file names each
    function by module and name, and reading it will import that module.
    """
    if graph.functions and not trusted:
        raise UntrustedApplyError(
            "the graph runs Python functions of yours (tl.apply), which a file holds only by name",
            instead="to_json(..., trusted=True), and from_json(..., trusted=True) where you trust the file",
        )
    body = {
        "graph": text(graph).splitlines(),
        "lines": [[_own_name(location.filename), location.line] for location in graph.locations],
        "constants": [
            {"type": str(constant.type), "name": constant.name, "sha256": _digest(constant.payload())}
            for constant in graph.constants
        ],
        "functions": [_function_name(function) for function in graph.functions],
    }
    version = f"{VERSION[0]}.{VERSION[1]}"
    header = {"format": FORMAT, "version": version, "sha256": _seal(version, body)}
    return json.dumps({**header, "body": body}, indent=1, allow_nan=False)


def constants_bytes(graph: Graph) -> bytes:
    """The captured tensors in the safetensors format, named by their numbers.

    The format is a length, a JSON header and the bytes. It is put together here because the library's own writers take
    a framework's tensors or raw addresses, and this floor knows neither; its reader checks the result.
    """
    header: dict[str, object] = {}
    payloads: list[bytes] = []
    position = 0
    for number, constant in enumerate(graph.constants):
        payload = constant.payload()
        header[str(number)] = {
            "dtype": _CODES[constant.type.dtype],
            "shape": list(constant.type.shape),
            "data_offsets": [position, position + len(payload)],
        }
        payloads.append(payload)
        position += len(payload)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that the data is aligned
    return struct.pack("<Q", len(head)) + head + b"".join(payloads)


def from_json(source: str, constants: bytes | None = None, *, trusted: bool = False) -> Graph:
    """The graph that :func:`to_json` wrote.

    Raises :class:`GraphFileError` for text that is cut off or was changed, :class:`GraphVersionError` for a newer major
    version, :class:`ForbiddenFunctionError` for a function outside the allow-list (it is never executed), and
    :class:`UntrustedApplyError` for a graph that would run Python or write files, unless ``trusted``.
    """
    body = _checked_body(source)
    try:
        graph = parse("\n".join(_list_of(body, "graph", str)))
        lines = _list_of(body, "lines", list)
        if lines and len(lines) != len(graph.ops):
            raise ValueError(f"it has {len(graph.ops)} operations and {len(lines)} lines of source")
        graph = replace(graph, locations=tuple(StoredLocation(str(name), int(line)) for name, line in lines))
        entries = _list_of(body, "constants", dict)
        names = _list_of(body, "functions", str)
    except (GraphSyntaxError, KeyError, TypeError, ValueError) as error:
        raise GraphFileError(f"the file's body is not a graph: {error}") from None
    for number, op in enumerate(graph.ops):
        if isinstance(op, Call) and op.function not in FUNCTIONS:
            raise graph.blame(
                ForbiddenFunctionError(
                    f"the file names {op.function!r}, which is not on the allow-list; it was not run"
                ),
                number,
            )
    if not trusted and (names or graph.applies or any(save.to is not None for save in graph.saves)):
        raise UntrustedApplyError(
            "running this graph would run Python functions or write files that the graph file names",
            instead="from_json(..., trusted=True), if you trust where the file comes from",
        )
    if any(op.index >= len(names) for op in graph.applies):
        raise GraphFileError("the graph applies functions that the file does not list")
    graph = replace(
        graph,
        constants=_constants(graph, cast("list[dict[str, Any]]", entries), constants),
        functions=tuple(_function(name) for name in names),
    )
    try:
        verify(graph)
    except VerificationError as error:
        raise GraphFileError(
            f"the file holds a graph that is not valid: {error.problem}", excerpt=error.excerpt
        ) from None
    return graph


def write(graph: Graph, path: str | Path, *, trusted: bool = False) -> Path:
    """Writes ``path`` (JSON) and, if the graph has constants, ``path`` with the suffix ``.safetensors``."""
    path = Path(path)
    document = to_json(graph, trusted=trusted)
    if graph.constants:
        path.with_suffix(".safetensors").write_bytes(constants_bytes(graph))
    path.write_text(document, encoding="utf-8")
    return path


def read(path: str | Path, *, trusted: bool = False) -> Graph:
    """The graph that :func:`write` wrote."""
    path = Path(path)
    beside = path.with_suffix(".safetensors")
    try:
        document = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GraphFileError(f"{path} is not text: {error}") from None
    return from_json(document, beside.read_bytes() if beside.exists() else None, trusted=trusted)


def _checked_body(source: str) -> dict[str, Any]:
    try:
        document: object = json.loads(source)
    except ValueError as error:
        raise GraphFileError(
            f"the file is not complete JSON, so it was cut off or damaged: {error}"
        ) from None
    if not isinstance(document, dict) or cast("dict[str, object]", document).get("format") != FORMAT:
        raise GraphFileError(f"the file is not a graph file: it does not say format={FORMAT!r}")
    found = cast("dict[str, Any]", document)
    version = str(found.get("version", ""))
    if not re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,9}", version):
        raise GraphFileError(f"the file's version {found.get('version')!r} is not a version")
    major, _, minor = version.partition(".")
    if int(major) > VERSION[0]:
        raise GraphVersionError(
            f"the file has format version {major}.{minor}, and this tracelens reads up to {VERSION[0]}.x",
            instead="a newer tracelens",
        )
    body: object = found.get("body")
    if not isinstance(body, dict) or found.get("sha256") != _seal(version, cast("object", body)):
        raise GraphFileError(
            "the file was changed after it was written: its contents do not have the sha256 that its header names",
            instead="write the graph again with to_json",
        )
    unknown = set(found) - {"format", "version", "sha256", "body"}
    if unknown:
        raise GraphFileError(f"the file's header has unknown entries: {', '.join(sorted(unknown))}")
    return cast("dict[str, Any]", body)


def _constants(graph: Graph, entries: list[dict[str, Any]], data: bytes | None) -> tuple[Constant, ...]:
    count = max((op.index + 1 for op in graph.ops if isinstance(op, Const)), default=0)
    if count > len(entries):
        raise GraphFileError("the graph uses constants that the file does not list")
    if not entries:
        return ()
    if data is None:
        raise GraphFileError(
            "the graph's constants are missing",
            instead="keep the .safetensors file beside the .json file, or pass constants=",
        )
    try:
        stored = dict(_deserialize(data))
    except safetensors.SafetensorError as error:
        raise GraphFileError(f"the constants are not an intact safetensors file: {error}") from None
    found: list[StoredConstant] = []
    for number, entry in enumerate(entries):
        held = stored.get(str(number))
        payload = bytes(held["data"]) if held is not None else b""
        try:
            type_, name, digest = parse_type(str(entry["type"])), entry["name"], entry["sha256"]
        except (KeyError, ValueError):
            raise GraphFileError(f"the file does not describe constant #{number}") from None
        intact = (
            held is not None
            and _digest(payload) == digest
            and _STORED.get(held["dtype"]) is type_.dtype
            and tuple(held["shape"]) == type_.shape
        )
        if not intact:
            raise GraphFileError(f"constant #{number} is not the one that the graph was written with")
        found.append(StoredConstant(type_, None if name is None else str(name), payload))
    return tuple(found)


def _list_of(body: dict[str, Any], key: str, kind: type) -> list[Any]:
    found = body[key]
    if not isinstance(found, list) or not all(isinstance(part, kind) for part in cast("list[object]", found)):
        raise TypeError(f"{key} is not a list of {kind.__name__}")
    return cast("list[Any]", found)


def _canonical(body: object) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _seal(version: str, body: object) -> str:
    """What the header's sha256 is made of: everything that the file says, but for the white space."""
    return _digest(_canonical([FORMAT, version, body]))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _own_name(filename: str) -> str:
    """The name without its folders, which would tell who wrote the graph and differ from machine to machine."""
    own = re.split(r"[/\\]", filename)[-1]
    # A name like <cell 4> stands for what is no file.
    return "<" + own if filename.startswith("<") and not own.startswith("<") else own


def _function_name(function: object) -> str:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not name or "<" in name or module == "__main__":
        raise UntrustedApplyError(
            f"{function!r} has no importable name, so a file cannot hold it",
            instead="a function defined at the top of a module",
        )
    return f"{module}:{name}"


def _function(name: str) -> object:
    module, _, path = name.partition(":")
    try:
        found: object = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise GraphFileError(
            f"the file names the function {name!r}, which cannot be found here: {error}",
            instead="make the module that defines it importable",
        ) from error
    return found
