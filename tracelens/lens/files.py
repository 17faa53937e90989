"""Lens results in files: safetensors (small and exact), parquet and CSV (a table), JSON (for programs elsewhere)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tracelens.errors import LensFileError, MissingExtraError, TracelensError
from tracelens.extras import required
from tracelens.lens.table import NEVER_NEGATIVE, Columns, result_of, whole
from tracelens.location import here

if TYPE_CHECKING:
    from tracelens.lens.result import LensResult

FORMAT = "tracelens.lens"
VERSION = 1


def save(result: LensResult, path: Path) -> Path:
    """Writes a result to a file, as its ending says."""
    form(path)[0](result, path)
    return path


def load(path: Path) -> LensResult:
    """Reads a result from a file, as its ending says."""
    read = form(path)[1]
    try:
        return read(path)
    except (MissingExtraError, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except LensFileError as error:
        error.at = here()
        raise
    except Exception as error:  # whatever a reader of a format says of a file that is not whole
        words = error.problem if isinstance(error, TracelensError) else f"{type(error).__name__}: {error}"
        raise LensFileError(
            f"{path} is not a lens result, or not a whole one: {words}",
            at=here(),
            instead=f"a file that lens.save({path.name!r}) has written",
        ) from error


def form(path: Path) -> tuple[Callable[[LensResult, Path], None], Callable[[Path], LensResult]]:
    """How files of that ending are written and read; raises where it names none, or needs a package that is missing."""
    if path.suffix.lower() == ".parquet":
        _arrow()
    try:
        return _FORMATS[path.suffix.lower()]
    except KeyError:
        raise LensFileError(
            f"{path.name!r} has no ending that names a format",
            at=here(),
            instead=f"one of {', '.join(_FORMATS)}; lens.to_html(path) for a page, lens.plot(...).save(path) for a "
            "picture",
        ) from None


# --- tensors and what is said of them --------------------------------------------------------------------------------


def _parts(result: LensResult) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a result by their names, and all else of it as JSON has it."""
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    tensors |= {f"statistics.{name}": tensor for name, tensor in result.statistics.items()}
    said = {
        name: dict(value) if name in ("text_of", "tracked") else value
        for name, value in values.items()
        if name not in tensors and name != "statistics" and value is not None
    }
    return tensors, {"format": FORMAT, "version": VERSION, **said}


def _whole(tensors: dict[str, Any], said: dict[str, Any]) -> LensResult:
    from tracelens.lens.result import LensResult

    if said.pop("format") != FORMAT:
        raise ValueError("it says that it is something else")
    version = said.pop("version")
    if version > VERSION:
        raise LensFileError(
            f"the file is in version {version} of its format, and this tracelens knows {VERSION}",
            instead="a newer tracelens",
        )
    said["text_of"] = {int(token): text for token, text in said["text_of"].items()}
    for name in ("components", "layers", "positions"):
        said[name] = tuple(said[name])
    statistics = {
        name.removeprefix("statistics."): tensors.pop(name)
        for name in list(tensors)
        if name.startswith("statistics.")
    }
    return LensResult(**said, **tensors, statistics=statistics)


def _save_safetensors(result: LensResult, path: Path) -> None:
    from safetensors.torch import save_file

    tensors, said = _parts(result)
    # Views of a larger tensor are refused by the format.
    alone = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(alone, path, metadata={FORMAT: json.dumps(said)})


def _load_safetensors(path: Path) -> LensResult:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get(FORMAT)
        if said is None:
            raise ValueError("it is another kind of file")
        return _whole({name: file.get_tensor(name) for name in file.keys()}, json.loads(said))  # noqa: SIM118  # no dict


# --- JSON ------------------------------------------------------------------------------------------------------------


def _save_json(result: LensResult, path: Path) -> None:
    tensors, said = _parts(result)
    numbers = {name: _plain(tensor.numpy()) for name, tensor in tensors.items()}
    path.write_text(json.dumps({**said, "tensors": numbers}, allow_nan=False), encoding="utf-8")


def _plain(array: np.ndarray) -> Any:
    """Nested lists; nan, which JSON has no word for, as null, and infinite numbers as texts."""
    if array.dtype.kind == "i":
        return array.tolist()
    flat = np.empty(array.size, dtype=object)
    flat[:] = [_number(number) for number in array.reshape(-1)]
    return flat.reshape(array.shape).tolist()


def _number(number: np.float32) -> float | str | None:
    if np.isnan(number):
        return None
    return float(_digits(number)) if np.isfinite(number) else str(number)


def _digits(number: np.float32) -> str:
    """As few digits as give the number back, also by way of a double as most readers go."""
    short = str(number)
    return short if np.float32(float(short)) == number else repr(float(number))


def _load_json(path: Path) -> LensResult:
    said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    arrays = said.pop("tensors")
    return _whole({name: _tensor(name, nested) for name, nested in arrays.items()}, said)


def _tensor(name: str, nested: Any) -> Tensor:
    if name.rpartition(".")[2] in _WHOLE_NUMBERS:
        return torch.tensor(nested, dtype=torch.int64)
    array = np.array(nested, dtype=object)
    return torch.from_numpy(np.where(array == None, np.nan, array).astype(np.float32))  # noqa: E711  # each of them


_WHOLE_NUMBERS = ("token_ids", "next_ids", "top_ids", "rank", "tracked_ranks")


# --- tables ----------------------------------------------------------------------------------------------------------


def _save_csv(result: LensResult, path: Path) -> None:
    table = whole(result)
    cells = [_cells(name, column) for name, column in table.items()]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*cells, strict=True))


def _cells(name: str, column: np.ndarray) -> list[str]:
    """What stands in a column: nothing where there is no number and no text."""
    if column.dtype.kind == "f":
        return ["" if np.isnan(number) else _digits(number) for number in column]
    if name in NEVER_NEGATIVE:
        return ["" if number < 0 else str(number) for number in column.tolist()]
    return ["" if cell is None else str(cell) for cell in column.tolist()]


def _load_csv(path: Path) -> LensResult:
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        heads = next(reader)
        rows = list(reader)
    table: Columns = {}
    for name, column in zip(heads, zip(*rows, strict=True), strict=True):
        if _is_text(name):
            table[name] = np.array([cell or None for cell in column], dtype=object)
        elif _is_float(name):
            table[name] = np.array([float(cell or "nan") for cell in column], dtype=np.float32)
        elif name != "generated":
            table[name] = np.array([int(cell or -1) for cell in column], dtype=np.int64)
    # Empty texts of the whole result are texts, and not missing.
    for name in ("model", "lens"):
        table[name] = np.array([cell or "" for cell in table[name]], dtype=object)
    return result_of(table)


def _is_text(name: str) -> bool:
    return name in ("component", "token", "next_token", "model", "lens") or (
        name.startswith("top_") and name[4:].isdecimal()
    )


def _is_float(name: str) -> bool:
    if name.startswith(("rank: ", "tracked_id: ")):
        return False
    return name.startswith("log_prob: ") or name.endswith("_log_prob") or name in _FLOATS


_FLOATS = ("log_prob", "entropy", "kl", "js", "tv", "logsumexp")


def _arrow() -> tuple[Any, Any]:
    what = "a file that ends in .parquet"
    return required("pyarrow", extra="pandas", what=what), required(
        "pyarrow.parquet", extra="pandas", what=what
    )


def _save_parquet(result: LensResult, path: Path) -> None:
    arrow, parquet = _arrow()
    arrays = {
        name: arrow.array(column, mask=column < 0 if name in NEVER_NEGATIVE else None)
        if column.dtype != object
        else arrow.array(column.tolist(), type=arrow.string())
        for name, column in whole(result).items()
    }
    parquet.write_table(arrow.table(arrays), path)


def _load_parquet(path: Path) -> LensResult:
    _, parquet = _arrow()
    table: Columns = {}
    read = parquet.read_table(path)
    for name in read.column_names:
        column = read[name]
        if name in NEVER_NEGATIVE:
            column = column.fill_null(-1)
        table[name] = np.asarray(column.to_pylist(), dtype=object) if _is_text(name) else column.to_numpy()
    return result_of(table)


_FORMATS: dict[str, tuple[Callable[[LensResult, Path], None], Callable[[Path], LensResult]]] = {
    ".safetensors": (_save_safetensors, _load_safetensors),
    ".parquet": (_save_parquet, _load_parquet),
    ".csv": (_save_csv, _load_csv),
    ".json": (_save_json, _load_json),
}
