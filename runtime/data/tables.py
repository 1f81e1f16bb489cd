"""Reads samples from tables: CSV, Parquet, and Arrow files such as those of a folder of the library datasets.

A column has one part of every sample, under the names of `tightfit.runtime.data.samples` or those that the caller
gives. One row is in memory at a time, of Parquet some rows, of Arrow a record batch, and what reading them may take is
bounded: a small file can claim or unfold to any size. Where a cell has to hold a list (messages, choices, tools), it
may hold its JSON.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import check_regular, open_regular
from tightfit.runtime.common.limits import allocating
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.strict_json import JsonError, from_json, read_json
from tightfit.runtime.common.units import format_size
from tightfit.runtime.data.preparation import BYTES_PER_BYTE

if TYPE_CHECKING:
    from types import ModuleType

KINDS = {
    ".csv": "CSV",
    ".csv.gz": "CSV",
    ".tsv": "CSV",
    ".tsv.gz": "CSV",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}
"""how the name of a table ends -> its kind"""
DATASET, SPLITS = "state.json", "dataset_dict.json"
"""in a folder that the library datasets has saved: its files in order; in one of several such folders: their names"""
EXAMPLE = {"prompt": "question", "completion": "answer"}
"""parts of a sample and columns that have them"""
PARTS = (
    "text",
    "prompt",
    "completion",
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "system",
    "choices",
    "answer",
    "chosen",
    "rejected",
    "tools",
)
"""names of a sample's parts"""
LISTS = ("messages", "conversations", "choices", "tools")
"""parts that are lists"""
LONGEST = 1 << 26
"""bytes of a line of CSV, where the caller sets no limit: an unclosed quote would read the whole file into memory"""
ROWS = 64
"""of Parquet that are decoded at a time"""
STREAM_BYTES = 1 << 16
"""of a Parquet file's columns that are read at a time"""
READ_BYTES, LEAST_READ_BYTES = 1 << 30, 1 << 26
"""of memory that reading some rows of Parquet or a batch of Arrow may take, where the caller sets no limit to a row;
the least
"""

Row = dict[str, Any]
Lines = gzip.GzipFile | BinaryIO


@contextlib.contextmanager
def open_data(file: Path) -> Iterator[Lines]:
    """A file of data for reading, unpacked where its name ends with .gz."""
    with open_regular(file) as raw:
        if file.name.lower().endswith(".gz"):
            with gzip.open(raw) as content:
                yield content
        else:
            yield raw


def kind_of(file: Path) -> str | None:
    """The kind of a table by the file's name; None: it is none."""
    return next((kind for ending, kind in KINDS.items() if file.name.lower().endswith(ending)), None)


def table_files(folder: Path) -> list[Path]:
    """The tables in a folder in order of name, or the files of a folder of datasets in its order; [] if there are none.

    Raises InputError where it is not clear which ones are meant.
    """
    if (splits := folder / SPLITS).is_file():
        listed = _json(splits).get("splits")
        names = [str(name) for name in listed] if isinstance(listed, list) and listed else ["train"]
        raise InputError(
            f"{folder}: holds {len(names)} data sets ({', '.join(names)}); name the folder of one: {folder / names[0]}"
        )
    if (state := folder / DATASET).is_file():
        try:
            return [folder / Path(entry["filename"]).name for entry in _json(state)["_data_files"]]
        except (KeyError, TypeError) as error:
            raise InputError(f"{state}: not written by the library datasets; name the files in the folder") from error
    tables = sorted(path for path in folder.iterdir() if path.is_file() and kind_of(path))
    kinds = sorted({str(kind_of(path)) for path in tables})
    if len(kinds) > 1:
        raise InputError(f"{folder}: holds tables of several kinds ({', '.join(kinds)}); name the file that is meant")
    return tables


def _json(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except (OSError, JsonError) as error:
        raise InputError(f"{file}: cannot be read ({error}); copy or download it again") from error
    return content if isinstance(content, dict) else {}


def rows_of(
    file: Path, longest: int | None, columns: Mapping[str, str] | None
) -> Iterator[tuple[int | str, Row | InputError]]:
    """Yield (line of a CSV file, ``row N`` of other tables, counted from 1; the parts of a sample or what is wrong).

    `columns` maps parts to columns; without it columns are called as parts. A row of more than `longest` bytes is an
    error. Raises InputError where the file cannot be read, or lacks columns.
    """
    kind = kind_of(file)
    rows = _csv_rows(file, longest, columns) if kind == "CSV" else _arrow_rows(file, str(kind), longest, columns)
    for row_name, row in rows:
        try:
            yield row_name, row if isinstance(row, InputError) else _parts(row)
        except InputError as error:
            yield row_name, error


def _columns_of_parts(file: Path, header: Sequence[str], columns: Mapping[str, str] | None) -> dict[str, str]:
    """Part -> column of the table. Raises InputError where columns are missing."""
    if repeated := next((name for name, count in Counter(header).items() if count > 1), None):
        raise InputError(f"{file}: two columns are called {repeated!r}; rename one of them")
    column_names = ", ".join(header[:12]) + (", …" if len(header) > 12 else "")
    column_of = {name: name for name in PARTS if name in header} if columns is None else dict(columns)
    if not column_of:
        raise InputError(
            f"{file}: its columns are {column_names}; say which ones are the parts of a sample, for example"
            f" {spelled('columns', EXAMPLE)}"
        )
    for column in column_of.values():
        if column not in header:
            raise InputError(
                f"{file}: has no column {column!r}, which {spelled('columns')} names; its columns are {column_names}"
            )
    return column_of


def _parts(row: Row) -> Row:
    """The parts of a sample as JSON would have them: lists that were written as text, and the number of an answer."""
    for name in LISTS:
        if isinstance(text := row.get(name), str):
            try:
                row[name] = from_json(text, strict=True)
            except JsonError as error:
                raise InputError(f'"{name}" is not JSON ({error}); write a list as JSON does') from error
    answer, choices = row.get("answer"), row.get("choices")
    if isinstance(answer, str) and isinstance(choices, list) and answer not in choices and answer.isdecimal():
        row["answer"] = int(answer)
    return row


def _too_long(size: int, longest: int) -> InputError:
    return InputError(
        f"a row of {size} bytes, and what the run's budget leaves is enough to tokenise one of {longest}; write it as"
        " several rows, or plan with a larger budget"
    )


# --- CSV --------------------------------------------------------------------------------------------------------------


def _csv_rows(
    file: Path, longest: int | None, columns: Mapping[str, str] | None
) -> Iterator[tuple[int, Row | InputError]]:
    limit = LONGEST if longest is None else longest
    delimiter = "\t" if ".tsv" in file.name.lower() else ","
    with open_data(file) as content, _field_limit(limit):
        reader = csv.reader(_text_lines(file, content, limit), delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if len(header) == 1 and ";" in header[0]:
                raise InputError(f"{file}: its fields are separated by semicolons; save it with commas")
            column_of = _columns_of_parts(file, header, columns) if header else {}
            index_of = {name: header.index(column) for name, column in column_of.items()}
            line = reader.line_num + 1
            for fields in reader:
                row_line, line = line, reader.line_num + 1
                if not fields:
                    continue
                if len(fields) != len(header):
                    yield row_line, InputError(f"{len(fields)} fields where the header has {len(header)}")
                elif (size := sum(len(fields[index].encode()) for index in index_of.values())) > limit:
                    yield row_line, _too_long(size, limit)
                else:
                    yield row_line, {name: fields[index] for name, index in index_of.items()}
        except csv.Error as error:
            raise InputError(
                f"{file}:{reader.line_num}: not CSV ({error}); fields with commas, quotes or line ends stand in quotes,"
                " and quotes in them are written twice"
            ) from error


def _text_lines(file: Path, content: Lines, limit: int) -> Iterator[str]:
    """The lines of a CSV file as text. Raises InputError for one that is too long or not UTF-8."""
    number = 0
    while line := content.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise InputError(f"{file}:{number}: {_too_long(len(line), limit)}")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file}:{number}: not UTF-8 (byte {error.start} of the line); save it as UTF-8"
            ) from error
        yield text


@contextlib.contextmanager
def _field_limit(limit: int) -> Iterator[None]:
    """While entered, fields of CSV may have `limit` characters."""
    before = csv.field_size_limit(limit)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# --- Parquet and Arrow ------------------------------------------------------------------------------------------------


def _arrow_rows(
    file: Path, kind: str, longest: int | None, columns: Mapping[str, str] | None
) -> Iterator[tuple[str, Row | InputError]]:
    arrow = _pyarrow(file, kind)
    check_regular(file)
    most = READ_BYTES if longest is None else max(LEAST_READ_BYTES, longest * BYTES_PER_BYTE)
    number = 0
    try:
        batches = _parquet_batches(file, columns) if kind == "Parquet" else _arrow_batches(arrow, file, columns)
        while True:
            with allocating(most):
                batch, column_of = next(batches, (None, {}))
            if batch is None:
                break
            for index in range(batch.num_rows):
                with allocating(most):
                    row = batch.slice(index, 1).to_pylist()[0]
                number += 1
                size = _size(row)
                if longest is not None and size > longest:
                    yield f"row {number}", _too_long(size, longest)
                else:
                    yield f"row {number}", {name: row[column] for name, column in column_of.items()}
    except MemoryError as error:
        raise InputError(
            f"{file}: to read on after row {number} takes more than the {format_size(most)} of memory that reading may"
            " take; write it in shorter rows and smaller row groups or batches, or plan with a larger budget"
        ) from error
    except (arrow.ArrowException, OSError) as error:
        after = f"after row {number}, " if number else ""
        raise InputError(f"{file}: {after}not a whole {kind} file ({error}); copy or download it again") from error


def _pyarrow(file: Path, kind: str) -> ModuleType:
    """The library pyarrow, set to give freed memory back at once, since it counts against the budget of preparation."""
    try:
        import pyarrow as pa
    except ModuleNotFoundError as error:
        raise InputError(
            f"{file}: pyarrow is not installed, which reads {kind} files: pip install 'tightfit[arrow]'"
        ) from error
    pa.set_memory_pool(pa.system_memory_pool())
    arrow: ModuleType = pa
    return arrow


def _parquet_batches(file: Path, columns: Mapping[str, str] | None) -> Iterator[tuple[Any, dict[str, str]]]:
    """Batches of at most `ROWS` rows with the chosen columns, and which part each column is."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file, buffer_size=STREAM_BYTES, pre_buffer=False) as table:
        column_of = _columns_of_parts(file, table.schema_arrow.names, columns)
        columns_read = list(dict.fromkeys(column_of.values()))
        for batch in table.iter_batches(batch_size=ROWS, columns=columns_read, use_threads=False):
            yield batch, column_of


def _arrow_batches(
    arrow: ModuleType, file: Path, columns: Mapping[str, str] | None
) -> Iterator[tuple[Any, dict[str, str]]]:
    """The record batches of an Arrow file or stream with the chosen columns, and which part each column is."""
    import pyarrow.ipc

    with file.open("rb") as content:
        streamed = content.read(6) != b"ARROW1"
    open_reader = pyarrow.ipc.open_stream if streamed else pyarrow.ipc.open_file
    with arrow.OSFile(str(file)) as source, open_reader(source) as reader:
        header = reader.schema.names
    column_of = _columns_of_parts(file, header, columns)
    fields = sorted({header.index(column) for column in column_of.values()})
    options = pyarrow.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    with arrow.OSFile(str(file)) as source, open_reader(source, options=options) as reader:
        batches: Iterable[Any] = reader
        if not streamed:
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        for batch in batches:
            yield batch, column_of


def _size(value: Any) -> int:
    """Bytes of all strings in a row."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0
