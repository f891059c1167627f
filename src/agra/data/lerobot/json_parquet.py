"""JSON, JSON lines and parquet as datasets hold them: read with errors that name the file, written whole or not at all."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from agra import files

REMEDY = "copy or collect the dataset again"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError without the file, ValueError where it holds something else."""
    return _object(_text(path), path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; empty lines are skipped. Raises as `read_json` does, naming the line."""
    lines = enumerate(_text(path).splitlines(), start=1)
    return [_object(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, texts as they are."""
    files.write_text(path, json.dumps(value, indent=4, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_table(path: Path, columns: Sequence[str] | None = None, *, most: int | None = None) -> pa.Table:
    """`columns` of a parquet file (all of them by default), every page's checksum verified where it has one.

    `most` is the largest number of rows that the dataset's metadata allows, by default one a byte of the file: a few
    kilobytes can hold millions of equal rows. Raises FileNotFoundError without the file and ValueError where it is damaged,
    lacks a column or holds more rows, before any row is read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file is missing; {REMEDY}")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            check_rows(file, path, path.stat().st_size if most is None else most)
            names = file.schema_arrow.names
            missing = [name for name in columns or [] if name not in names]
            if missing:
                raise ValueError(f"{path}: column {missing[0]!r} is missing, there are {', '.join(names)}")
            table = file.read(columns=None if columns is None else list(columns))
            table.validate(full=True)
            return table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: damaged parquet file ({reason}); {REMEDY}") from error


def check_rows(file: pq.ParquetFile, path: Path, most: int) -> None:
    """Raise ValueError where an open parquet file holds more rows than `most`, by its footer."""
    footer = file.metadata
    rows = max(footer.num_rows, sum(footer.row_group(index).num_rows for index in range(footer.num_row_groups)))
    if rows > most:
        raise ValueError(f"{path}: holds {rows} rows, the dataset's metadata allows at most {most}; {REMEDY}")


def matrix(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """A column of equally long lists (nested ones are flattened) as (N, D) float32, of numbers as (N, 1)."""
    column = table[name].combine_chunks()
    flat = column
    while pa.types.is_list(flat.type) or pa.types.is_fixed_size_list(flat.type) or pa.types.is_large_list(flat.type):
        flat = flat.flatten()
    if not (pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type) or pa.types.is_boolean(flat.type)):
        raise ValueError(f"{path}: column {name!r} should hold numbers, it holds {flat.type}; {REMEDY}")
    width = len(flat) // max(len(column), 1)
    ragged = pa.types.is_list(column.type) and len(set(np.diff(column.offsets.to_numpy()))) > 1
    if flat.null_count or column.null_count or ragged or width * len(column) != len(flat):
        raise ValueError(f"{path}: column {name!r} has gaps or rows of different length; {REMEDY}")
    values = flat.to_numpy(zero_copy_only=False).astype(np.float32)
    return values.reshape(len(column), -1)


def integers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """A column of whole numbers, also where each stands in a list of one, as (N,) int64."""
    column = table[name].combine_chunks()
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    if not pa.types.is_integer(column.type) or column.null_count or len(column) != table.num_rows:
        raise ValueError(f"{path}: column {name!r} should hold one whole number a row; {REMEDY}")
    return column.to_numpy(zero_copy_only=False).astype(np.int64)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: file is missing; {REMEDY}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}); {REMEDY}") from error


def _object(text: str, where: Path | str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); {REMEDY}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}; {REMEDY}")
    return value
