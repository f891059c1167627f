"""JSON, JSON lines and parquet files of datasets.

Reading errors name the file. Files are written completely or not at all.
"""

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
    """Read a JSON object. Raises FileNotFoundError for a missing file and ValueError for other content."""
    return _object(_text(path), path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object from each line.

    Empty lines are skipped. Raises the errors of `read_json`, with the line's number.
    """
    lines = enumerate(_text(path).splitlines(), start=1)
    return [_object(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON in UTF-8."""
    files.write_text(path, json.dumps(value, indent=4, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object on each line."""
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_table(path: Path, columns: Sequence[str] | None = None, *, max_rows: int | None = None) -> pa.Table:
    """Read `columns` of a parquet file, by default all. The checksums of pages that have one are verified.

    `max_rows` is the largest number of rows that the dataset's metadata allows, by default one for each byte of the
    file. A few kilobytes can hold millions of equal rows, so rows are counted before any is read. Raises
    FileNotFoundError for a missing file and ValueError for a damaged file, a missing column or more rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file is missing; {REMEDY}")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            check_rows(file, path, path.stat().st_size if max_rows is None else max_rows)
            names = file.schema_arrow.names
            missing = [name for name in columns or [] if name not in names]
            if missing:
                raise ValueError(f"{path}: column {missing[0]!r} is missing; available: {', '.join(names)}")
            table = file.read(columns=None if columns is None else list(columns))
            table.validate(full=True)
            return table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: damaged parquet file ({reason}); {REMEDY}") from error


def check_rows(file: pq.ParquetFile, path: Path, max_rows: int) -> None:
    """Raise ValueError where the footer of an open parquet file counts more rows than `max_rows`."""
    footer = file.metadata
    rows = max(footer.num_rows, sum(footer.row_group(index).num_rows for index in range(footer.num_row_groups)))
    if rows > max_rows:
        raise ValueError(f"{path}: holds {rows} rows, the dataset's metadata allows at most {max_rows}; {REMEDY}")


def matrix(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """Return a column of lists of one length, flattened, as (N, D) float32, and a column of numbers as (N, 1).

    Raises ValueError for other types, gaps and lists of different length.
    """
    column = table[name].combine_chunks()
    flat = column
    while pa.types.is_list(flat.type) or pa.types.is_fixed_size_list(flat.type) or pa.types.is_large_list(flat.type):
        flat = flat.flatten()
    if not (pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type) or pa.types.is_boolean(flat.type)):
        raise ValueError(f"{path}: column {name!r}: expected numbers, got {flat.type}; {REMEDY}")
    width = len(flat) // max(len(column), 1)
    ragged = pa.types.is_list(column.type) and len(set(np.diff(column.offsets.to_numpy()))) > 1
    if flat.null_count or column.null_count or ragged or width * len(column) != len(flat):
        raise ValueError(f"{path}: column {name!r} has gaps, or rows of different length; {REMEDY}")
    values = flat.to_numpy(zero_copy_only=False).astype(np.float32)
    return values.reshape(len(column), -1)


def integers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """Return a column of whole numbers, or of lists of one whole number, as (N,) int64.

    Raises ValueError for other types.
    """
    column = table[name].combine_chunks()
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    if not pa.types.is_integer(column.type) or column.null_count or len(column) != table.num_rows:
        raise ValueError(f"{path}: column {name!r}: expected one whole number in each row; {REMEDY}")
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
