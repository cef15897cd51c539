"""Tables from files: CSV, TSV, JSON, JSON lines, Parquet and tar, as columns by name."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import csv as pyarrow_csv
from pyarrow import parquet

from howfine.errors import TaskError, TaskNotFound
from howfine.tasks import captions
from howfine.tasks.wanted import Wanted

Columns = dict[str, list[Any]]
# Labels of CSV and TSV that are numbers. Ints are written in one way each, so that two labels which
# differ, such as 1 and 01, are never made one.
_INT = re.compile(r"\s*(0|-?[1-9][0-9]{0,99})\s*")
_NUMBER = re.compile(
    r"\s*([-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)(e[-+]?[0-9]+)?|[-+]?(nan|inf))\s*", re.I
)


def columns(path: Path, wanted: Wanted | None = None) -> Columns:
    """All columns of a file by name; of CSV and TSV, the wanted ones are left as text.

    Raises TaskNotFound for a missing file, TaskError for one that can't be read.
    """
    if path.suffix not in READERS:
        raise TaskError(f"{path} has the ending {path.suffix!r}, expected {', '.join(READERS)}")
    if not path.is_file():
        raise TaskNotFound(f"there is no file {path}; correct the path")
    try:
        return READERS[path.suffix](path, wanted or Wanted())
    except (
        *(OSError, ValueError, RecursionError),
        *(pyarrow.ArrowException, tarfile.TarError),
    ) as error:
        raise TaskError(
            f"{path} can't be read as {path.suffix[1:]}: {str(error).splitlines()[0]}"
        ) from error


def _csv(path: Path, wanted: Wanted) -> Columns:
    return _delimited(path, wanted, pyarrow_csv.ParseOptions(newlines_in_values=True))


def _tsv(path: Path, wanted: Wanted) -> Columns:
    """Tabs only: in TSV files of sentences a quotation mark is a character like any other."""
    return _delimited(path, wanted, pyarrow_csv.ParseOptions(delimiter="\t", quote_char=False))


def _delimited(path: Path, wanted: Wanted, options: pyarrow_csv.ParseOptions) -> Columns:
    as_text = {name: pyarrow.string() for name in wanted.columns}
    table = pyarrow_csv.read_csv(
        path,
        # On one thread, so that an error names its row.
        read_options=pyarrow_csv.ReadOptions(use_threads=False),
        parse_options=options,
        convert_options=pyarrow_csv.ConvertOptions(column_types=as_text),
    )
    _once(table.column_names)
    return dict(table.to_pydict())


def _once(names: Iterable[str]) -> None:
    """Raises ValueError for columns of one name, of which one would be read; "" is no name."""
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        raise ValueError(
            f"the name {twice[0]!r} stands twice, expected one column of it; rename one of them"
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _once(name for name, _ in pairs)
    return dict(pairs)


def _json(path: Path, _: Wanted) -> Columns:
    """An array of objects, or one object a line."""
    content = path.read_text(encoding="utf-8-sig")
    if content.lstrip().startswith("["):
        records = json.loads(content, object_pairs_hook=_object)
    else:
        lines = (line for line in content.split("\n") if line.strip())
        records = [json.loads(line, object_pairs_hook=_object) for line in lines]
    escaped = "\\ud" in content.lower()  # what is no escape is whole, being UTF-8
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"row {number} is {record!r}, expected an object")
        if escaped:
            _whole(record, number)
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _whole(record: dict[str, Any], number: int) -> None:
    """Raises ValueError for half a character, such as "\\ud83d": no tokenizer takes it."""
    for name, cell in record.items():
        try:
            json.dumps([name, cell], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"row {number}, column {name!a}, holds {cell!a:.200} with half a character "
                f"(a lone surrogate), expected whole ones; correct the row or take it out"
            ) from error


def _parquet(path: Path, _: Wanted) -> Columns:
    return dict(parquet.read_table(path).to_pydict())


def _tar(path: Path, _: Wanted) -> Columns:
    return captions.tarred(path)


READERS: dict[str, Callable[[Path, Wanted], Columns]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _json,
    ".json": _json,
    ".parquet": _parquet,
    ".tar": _tar,
}


def read_numbers(tables: Sequence[Columns], label: str) -> None:
    """Turn labels read as text into ints, else numbers, if those of all tables are.

    nan and inf beside numbers stay numbers, so that an error names their row.
    """
    values = [value for table in tables for value in table.get(label, []) if value]
    parse: Callable[[str], float]
    if all(map(_INT.fullmatch, values)):
        parse = int
    elif all(map(_NUMBER.fullmatch, values)) and any(set(".eE") & set(each) for each in values):
        parse = float
    else:
        return
    for table in tables:
        if label in table:
            table[label] = [parse(value) if value else value for value in table[label]]
