"""Samples in tables: CSV with the standard library, Parquet and Arrow files with pyarrow."""

from __future__ import annotations

import csv
import gzip
import json
import resource
import sys
import tracemalloc
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import format_size
from tightfit.runtime.data.samples import (
    Completion,
    Conversation,
    Question,
    Text,
    checked_columns,
    data_files,
    parse_sample,
    read_samples,
)
from tightfit.runtime.data.tables import LEAST_READ_BYTES, READ_BYTES, rows_of

TURNS = [{"role": "user", "content": "Good?"}, {"role": "assistant", "content": "Yes."}]


def written(path: Path, *rows: list[str], **options: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows(rows)
    return path


def read(path: Path, columns: dict[str, str] | None = None, longest: int | None = None) -> list[Any]:
    return [sample for _, sample in read_samples(path, longest, columns)]


# CSV


@settings(max_examples=60)
@given(texts=st.lists(st.text(alphabet='ab,"\n\r é\t;', min_size=1, max_size=12), min_size=1, max_size=6))
def test_what_the_standard_library_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    path = written(tmp_path_factory.mktemp("csv") / "a.csv", ["id", "text"], *(["1", text] for text in texts))
    assert read(path) == [Text(text) for text in texts]


def test_columns_are_parts_by_their_names_or_those_given(tmp_path: Path) -> None:
    rows = [["question", "answer", "text"], ["Good?", "yes", "ignored"]]
    columns = {"prompt": "question", "completion": "answer"}
    for path in (written(tmp_path / "a.csv", *rows), written(tmp_path / "a.tsv", *rows, delimiter="\t")):
        assert read(path, columns) == [Completion("Good?", "yes")]
    assert read(written(tmp_path / "b.csv", ["completion", "id", "prompt"], ["yes", "7", "Good?"])) == [
        Completion("Good?", "yes")
    ]
    alpaca = [["instruction", "input", "output"], ["Say", "", "no"], ["Say", "it", "no"]]
    first, second = read(written(tmp_path / "c.csv", *alpaca))
    assert [one.prompt[-1]["content"] for one in (first, second)] == ["Say", "Say\nit"]
    # JSON lines have columns too.
    assert parse_sample(b'{"question": "Good?", "answer": "yes", "text": 3}', columns) == Completion("Good?", "yes")
    with pytest.raises(InputError, match=r"^no key 'answer', which columns names; there are question$"):
        parse_sample(b'{"question": "Good?"}', columns)


def test_lists_are_written_as_json(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", ["messages"], [json.dumps(TURNS)], ["no list"])
    good, bad = read(path)
    assert good == Conversation(tuple(TURNS))
    assert str(bad).startswith('"messages" is not JSON (')
    path = written(
        tmp_path / "b.csv",
        ["prompt", "choices", "answer"],
        ["Good?", '["yes", "no"]', "no"],
        ["Good?", '["yes", "no"]', "1"],
        ["2 or 1?", '["2", "1"]', "1"],
    )
    assert read(path) == [
        Question("Good?", ("yes", "no"), 1),
        Question("Good?", ("yes", "no"), 1),
        Question("2 or 1?", ("2", "1"), 1),
    ]


def test_every_bad_row_is_named_with_the_line_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"two\nlines",b\r\n\r\na\r\na,b,c\r\n,b\r\na,\r\n')
    found = list(read_samples(path))
    assert [place for place, _ in found] == [2, 5, 6, 7, 8]
    assert found[0][1] == Completion("two\nlines", "b")
    assert found[3][1] == Completion("", "b")
    assert [str(found[at][1]) for at in (1, 2, 4)] == [
        "1 fields where the header has 2",
        "3 fields where the header has 2",
        '"completion" is empty; write a string with something in it',
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'text\n"never closed\n', "a.csv:2: not CSV (unexpected end of data)"),
        (b'text\n"a"b\n', "a.csv:2: not CSV (',' expected after '\"')"),
        (b"text\ngood\n\xff\n", "a.csv:3: not UTF-8 (byte 0 of the line); save it as UTF-8"),
        (b"prompt;completion\na;b\n", "a.csv: its fields are separated by semicolons; save it with commas"),
        (b"text,text\na,b\n", "a.csv: two columns are called 'text'; rename one of them"),
        (b"id,body\n1,a\n", "a.csv: its columns are id, body; say which ones are the parts of a sample"),
    ],
)
def test_a_file_that_is_no_table_of_samples_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(path)
    assert message in str(caught.value)


def test_columns_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", ["id", "body"], ["1", "a"])
    with pytest.raises(
        InputError, match=r"a\.csv: has no column 'Body', which columns names; its columns are id, body$"
    ):
        read(path, {"text": "Body"})
    with pytest.raises(
        InputError, match=r"^columns: a sample has no part 'question'; it has text, prompt, completion,"
    ):
        checked_columns({"question": "prompt"})
    assert read(written(tmp_path / "b.csv")) == []


def test_a_row_of_more_than_the_budget_holds_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", ["prompt", "completion"], ["a" * 30, "b" * 30], ["a", "b"])
    first, second = read(path, longest=70)
    assert (first, second) == (Completion("a" * 30, "b" * 30), Completion("a", "b"))
    with pytest.raises(InputError, match=r"a\.csv:2: a row of \d+ bytes, and what the run's budget leaves is enough"):
        read(path, longest=50)
    path = written(tmp_path / "b.csv", ["prompt", "completion"], ["a\n" * 40, "b\n" * 40], ["a", "b"])
    first, second = read(path, longest=100)
    assert str(first).startswith(
        "a row of 160 bytes, and what the run's budget leaves is enough to tokenise one of 100;"
    )
    assert second == Completion("a", "b")


@pytest.mark.slow
def test_a_million_rows_take_no_more_memory_than_a_few(tmp_path: Path) -> None:
    """Packed, since only reading is of interest; what is held besides does not grow with the rows."""

    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.csv.gz"
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(b"prompt,completion\n" + b"Is it good?,yes\n" * rows)
        tracemalloc.start()
        assert sum(1 for _ in read_samples(path)) == rows
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    few = peak(1000)
    assert peak(50_000) < few + (64 << 10)


# Folders


def test_a_folder_of_datasets_is_read_in_its_own_order(tmp_path: Path) -> None:
    """As `save_to_disk` of the library writes it."""
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    assert [path.name for path in data_files(str(tmp_path))] == names
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"state\.json: not written by the library datasets; name the files"):
        data_files(str(tmp_path))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match=r"holds 2 data sets \(train, test\); name the folder of one: .*/train$"):
        data_files(str(tmp_path))


# Parquet and Arrow, with a stand-in for pyarrow: as much of it as is called, over JSON lines


class Batch:
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.num_rows = rows, len(rows)

    def slice(self, start: int, count: int) -> Batch:
        return Batch(self.rows[start : start + count])

    def to_pylist(self) -> list[dict[str, Any]]:
        for row in self.rows:
            bytearray(row.get("unfolds", 0))
        return self.rows


class Broken(Exception):
    pass


class Opened:
    """A file of JSON lines as a table: `ParquetFile`, and what `open_stream` and `open_file` return."""

    def __init__(self, path: Path, **_: Any) -> None:
        self.rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line != "ARROW1"]
        names = list(self.rows[0])
        self.schema = self.schema_arrow = SimpleNamespace(names=names)
        self.chosen = names
        self.num_record_batches = len(self.rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_batch(self, number: int) -> Batch:
        return Batch([{name: self.rows[number][name] for name in self.chosen}])

    def __iter__(self) -> Any:
        return map(self.get_batch, range(len(self.rows)))

    def iter_batches(self, batch_size: int, columns: list[str], use_threads: bool) -> Any:
        for start in range(0, len(self.rows), batch_size):
            if any("broken" in row for row in self.rows[start : start + batch_size]):
                raise Broken("Corrupt snappy compressed data")
            for row in self.rows[start : start + batch_size]:
                bytearray(row.get("claims", 0))
            yield Batch([{name: row[name] for name in columns} for row in self.rows[start : start + batch_size]])


class Source:
    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(source: Source, options: Any = None) -> Opened:
        made = Opened(Path(source.path))
        if options:
            made.chosen = [made.schema.names[place] for place in options["included_fields"]]
        return made

    module = ModuleType("pyarrow")
    vars(module).update(
        ArrowException=Broken, OSFile=Source, set_memory_pool=lambda _: None, system_memory_pool=lambda: None
    )
    parquet, ipc = ModuleType("pyarrow.parquet"), ModuleType("pyarrow.ipc")
    vars(parquet).update(ParquetFile=Opened)
    vars(ipc).update(open_stream=opened, open_file=opened, IpcReadOptions=lambda **options: options)
    vars(module).update(parquet=parquet, ipc=ipc)
    for one in (module, parquet, ipc):
        monkeypatch.setitem(sys.modules, one.__name__, one)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "file.arrow"])
@pytest.mark.usefixtures("pyarrow")
def test_rows_of_parquet_and_arrow_are_samples(tmp_path: Path, name: str) -> None:
    rows = [{"q": f"Good {number}?", "id": number, "a": "yes"} for number in range(130)]
    path = tmp_path / name
    lines = ["ARROW1"] if name.startswith("file") else []
    path.write_text("\n".join([*lines, *map(json.dumps, rows)]))
    columns = {"prompt": "q", "completion": "a"}
    assert read(path, columns) == [Completion(f"Good {number}?", "yes") for number in range(130)]
    rows[70]["a"], rows[128]["q"] = "", "long " * 99
    path.write_text("\n".join([*lines, *map(json.dumps, rows)]))
    bad = [(place, str(told)) for place, told in read_samples(path, 99, columns) if isinstance(told, InputError)]
    assert [place for place, _ in bad] == ["row 71", "row 129"]
    assert bad[0][1] == '"completion" is empty; write a string with something in it'
    assert bad[1][1].startswith("a row of 498 bytes")


@pytest.mark.usefixtures("pyarrow")
def test_lists_and_nothing_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("\n".join(json.dumps(row) for row in ({"messages": TURNS, "tools": None},) * 2))
    assert read(path) == [Conversation(tuple(TURNS))] * 2


@pytest.mark.usefixtures("pyarrow")
def test_a_damaged_table_is_told_with_how_far_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("\n".join(json.dumps(row) for row in [*[{"text": "a"}] * 64, {"text": "b", "broken": True}]))
    with pytest.raises(InputError, match=r"a\.parquet: after row 64, not a whole Parquet file \(Corrupt snappy"):
        read(path)


@pytest.mark.parametrize(("name", "key"), [("a.parquet", "claims"), ("a.parquet", "unfolds"), ("a.arrow", "unfolds")])
@pytest.mark.parametrize(("longest", "most"), [(None, READ_BYTES), (1, LEAST_READ_BYTES), (1 << 20, 512 << 20)])
@pytest.mark.usefixtures("pyarrow")
def test_what_a_table_unfolds_to_is_bounded(
    tmp_path: Path, name: str, key: str, longest: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may claim any size: memory ends before it does, and the limit is gone again."""
    path, limit = tmp_path / name, resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr("tightfit.runtime.data.tables.PARTS", ("text", key))
    for size, fits in ((most // 2, True), (2 * most, False)):
        path.write_text("\n".join(json.dumps(row) for row in [*[{"text": "a"}] * 64, {"text": "b", key: size}]))
        path.write_text(path.read_text().replace('{"text": "a"}', json.dumps({"text": "a", key: 0})))
        if fits:
            assert len(list(rows_of(path, longest, None))) == 65
            continue
        with pytest.raises(InputError) as caught:
            list(rows_of(path, longest, None))
        assert f"{path}: to read on after row 64 takes more than the {format_size(most)}" in str(caught.value)
        assert resource.getrlimit(resource.RLIMIT_DATA) == limit


def test_tables_of_pyarrow_that_unfold_are_bounded(tmp_path: Path) -> None:
    """Where it is installed: files of some KiB that claim gigabytes, or have as much in a row, a page, a dictionary."""
    arrow = pytest.importorskip("pyarrow")
    parquet, ipc = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow.ipc")
    large = 4 * LEAST_READ_BYTES
    one = arrow.table({"text": ["a" * large]})
    parquet.write_table(one, tmp_path / "page.parquet", compression="zstd", use_dictionary=False)
    packed = ipc.IpcWriteOptions(compression="zstd")
    with ipc.new_file(str(tmp_path / "row.arrow"), one.schema, options=packed) as writer:
        writer.write_table(one)
    repeated = arrow.DictionaryArray.from_arrays(arrow.array([0] * 100_000, arrow.int32()), ["a" * (large // 32)])
    parquet.write_table(
        arrow.table({"text": repeated}),
        tmp_path / "repeated.parquet",
        compression="zstd",
        dictionary_pagesize_limit=1 << 30,
        store_schema=False,
    )
    nulls = arrow.ListArray.from_arrays(arrow.array([0, 2_000_000_000], arrow.int32()), arrow.nulls(2_000_000_000))
    with ipc.new_file(str(tmp_path / "nulls.arrow"), arrow.schema([("messages", nulls.type)])) as writer:
        writer.write_batch(arrow.record_batch([nulls], names=["messages"]))
    small = arrow.table({"text": ["a" * 1000]})
    with ipc.new_file(str(tmp_path / "claim.arrow"), small.schema, options=packed) as writer:
        writer.write_table(small)
    content, length = (tmp_path / "claim.arrow").read_bytes(), (1000).to_bytes(8, "little")
    (tmp_path / "claim.arrow").write_bytes(
        content.replace(length + b"\x28\xb5\x2f\xfd", (1 << 40).to_bytes(8, "little") + b"\x28\xb5\x2f\xfd")
    )
    for file in sorted(tmp_path.iterdir()):
        assert file.stat().st_size < 1 << 20
        with pytest.raises(InputError, match=r"to read on after row 0 takes more than the 64\.0 MiB of memory"):
            list(rows_of(file, 1000, None))


def test_what_reads_them_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(
        InputError,
        match=r"a\.parquet: pyarrow is not installed, which reads Parquet files: pip install 'tightfit\[arrow\]'",
    ):
        read(tmp_path / "a.parquet")


def test_files_of_pyarrow_itself_are_read(tmp_path: Path) -> None:
    """Where it is installed."""
    arrow = pytest.importorskip("pyarrow")
    parquet, ipc = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow.ipc")
    table = arrow.table(
        {"id": list(range(300)), "messages": [TURNS] * 300, "tools": [None] * 300, "text": ["no"] * 300}
    )
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=130)
    with ipc.new_stream(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    with ipc.new_file(str(tmp_path / "c.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert read(tmp_path / name, {"messages": "messages", "tools": "tools"}) == [Conversation(tuple(TURNS))] * 300
        assert read(tmp_path / name, {"text": "text"}) == [Text("no")] * 300
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=r"not a whole (Parquet|Arrow) file"):
            read(tmp_path / name)
