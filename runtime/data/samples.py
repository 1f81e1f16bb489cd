"""Reads training and evaluation samples from files of JSON lines and from tables, and checks them one by one.

| line | meaning |
|---|---|
| {"text": "..."} | plain text, packed into windows; every token is predicted |
| {"prompt": ..., "completion": "..."} | the completion is predicted; a prompt is a string, or a list of messages for the chat template |
| {"messages": [{"role": ..., "content": ...}, ...]} | a conversation; what the assistant says is predicted |
| {"conversations": [{"from": ..., "value": ...}, ...]} | the same as ShareGPT has it: turns of human, gpt and system |
| {"instruction": "...", "input": "...", "output": "..."} | as Alpaca has it: a user's turn, the first two a line apart, and the assistant's |
| {"prompt": ..., "choices": ["...", ...], "answer": ...} | a question; `answer` is the right choice or its index |
| {"prompt": ..., "chosen": ..., "rejected": ...} | a pair of answers, for the losses DPO and ORPO; each answer is a string or a list with one message |

Pairs may also be two conversations {"chosen": [...], "rejected": [...]} that differ in their last message alone: what
comes before is the prompt, beside which a `prompt` is not read.

Beside messages, `tools` are what the chat template shows the assistant as functions to call; a message with
`tool_calls` needs no `content`. A content may be a list of parts, all of them {"type": "text", "text": ...}: they are
joined. Alpaca's `input` may be left out; `system` may stand beside it, and beside ShareGPT's turns. Files named
.jsonl.gz are read as they are. A row of a table (`tightfit.runtime.data.tables`) is read as a line with its columns as
keys.
"""  # noqa: E501  a row of a table is one line

from __future__ import annotations

import codecs
import gzip
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import check_regular
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.strict_json import JsonError, from_json
from tightfit.runtime.data.tables import EXAMPLE, LONGEST, PARTS, Lines, kind_of, open_data, rows_of, table_files

Message = dict[str, Any]
Tools = tuple[dict[str, Any], ...]
Prompt = str | tuple[Message, ...]
FORMS = (
    '{"text"}, {"prompt", "completion"}, {"messages"}, {"conversations"}, {"instruction", "input", "output"}'
    ' or {"prompt", "choices", "answer"}'
)
PAIR_FORM = '{"prompt", "chosen", "rejected"}'
READ_WITH = {
    "messages": ("tools",),
    "conversations": ("system", "tools"),
    "chosen": ("rejected", "prompt", "tools"),
    "choices": ("prompt", "answer", "tools"),
    "completion": ("prompt", "tools"),
    "instruction": ("input", "output", "system"),
    "text": (),
}
"""the part by which the form of a sample is known -> the other parts that it has"""
SPOKEN = ("reasoning_content", "reasoning", "thinking", "tool_calls")
"""keys under which templates of published models find what an assistant's message says beside its content"""
LINES = (".jsonl", ".jsonl.gz")
"""how the name of a file of JSON lines ends"""
UNREAD = re.compile(r"\.(jsonl|ndjson|csv|tsv|parquet|arrow)(\.(gz|bz2|xz|zst|lz4|zip|7z))?$", re.IGNORECASE)
"""the end of a file's name that says that it holds data, in a form that may not be read"""
CHUNK = 1 << 16
BEGINNING = 4096
"""bytes of a .json file in which its first bracket lies"""
SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}
CONVERSION = (
    "import json, sys; [print(json.dumps(line)) for line in json.load(open(sys.argv[1], encoding='utf-8-sig'))]"
)
"""a program for `python -c` that prints a JSON list as JSON lines"""
DATA_FORMS = (
    "data are a .jsonl or .jsonl.gz file, a table (.csv, .tsv, .parquet, .arrow), a directory of such files or of the"
    " library datasets, or the word random"
)


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Completion:
    prompt: Prompt
    completion: str | Message
    """a message only after a prompt of messages: it may have tool calls and whatever else the template shows"""
    tools: Tools | None = None


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: Tools | None = None


@dataclass(frozen=True)
class Question:
    prompt: Prompt
    choices: tuple[str, ...]
    answer: int
    tools: Tools | None = None


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to a prompt; messages only after a prompt of messages."""

    prompt: Prompt
    chosen: str | Message
    rejected: str | Message
    tools: Tools | None = None


Sample = Text | Completion | Conversation | Question | AnswerPair


def data_files(data: str) -> list[Path]:
    """The file `data` itself, or if it is a directory its files of JSON lines in order of name, or its tables.

    Raises InputError if there are none, and where one of several kinds would be left out.
    """
    if not data:
        raise InputError(f"'' names no data; {DATA_FORMS}")
    path = Path(data)
    if path.is_dir():
        try:
            entries = sorted(path.iterdir())
            lines = [file for file in entries if file.name.lower().endswith(LINES)]
            tables = table_files(path)
            for file in filter(Path.exists, (*lines, *tables)):
                check_regular(file)
            if not lines and not tables:
                raise InputError(f"{path}: no .jsonl or .jsonl.gz file in this directory, {_contents_of(path)}")
            if lines and tables:
                raise InputError(
                    f"{path}: holds JSON lines ({lines[0].name}) and tables ({tables[0].name}); name the file that is"
                    " meant, or a folder with one of the two"
                )
            for file in entries:
                if not kind_of(file) and file not in lines and (UNREAD.search(file.name) or _list(file)):
                    raise InputError(
                        f"{path}: {file.name} would not be read beside {(*lines, *tables)[0].name}; take it out of the"
                        f" folder, or name the file that is meant: {DATA_FORMS}"
                    )
        except OSError as error:
            raise InputError(_unreadable(Path(error.filename or path), error)) from error
        return lines or tables
    if path.is_file():
        return [path]
    if path.exists():
        raise InputError(f"{path}: a pipe or device, not a regular file; write the data to a file, {DATA_FORMS}")
    raise InputError(f"{path}: no such file; {DATA_FORMS}")


def checked_columns(columns: Mapping[str, str] | None) -> dict[str, str] | None:
    """The names of columns by part of a sample, as a dict. Raises InputError for a part that samples do not have."""
    for name in columns or ():
        if name not in PARTS:
            raise InputError(f"{spelled('columns')}: a sample has no part {name!r}; it has {', '.join(PARTS)}")
    return dict(columns) if columns else None


def read_samples(
    file: Path, longest: int | None = None, columns: Mapping[str, str] | None = None
) -> Iterator[tuple[int | str, Sample | InputError]]:
    """Yield (line number from 1, or ``row N``; the sample or an error that says what is wrong with the line); blank
    lines are skipped. `columns` maps the names of a sample's parts to those in the file.

    A line of more than `longest` bytes is an error, and no more than that of it is ever in memory. A file that begins
    with a JSON list yields one error and is not read on, since none of its lines would be a sample. Raises InputError
    if the file cannot be read.
    """
    try:
        if kind_of(file):
            yield from _row_samples(file, longest, columns)
            return
        longest = LONGEST if longest is None else longest
        with open_data(file) as lines:
            first = True
            for number, (line, size) in enumerate(_lines(lines, longest), 1):
                if size == len(line) and not line.strip():
                    continue
                if first and _begins_a_list(line):
                    yield number, InputError(_no_lines(file))
                    return
                first = False
                if size > len(line):
                    yield (
                        number,
                        InputError(
                            f"a line of {size} bytes, and what the run's budget leaves is enough to tokenise one of"
                            f" {longest}; write it as several lines, or plan with a larger budget"
                        ),
                    )
                    continue
                try:
                    yield number, parse_sample(line, columns)
                except InputError as error:
                    yield number, error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{file}: not a whole gzip file ({error}); copy or download it again") from error
    except OSError as error:
        raise InputError(_unreadable(file, error)) from error


def _row_samples(
    file: Path, longest: int | None, columns: Mapping[str, str] | None
) -> Iterator[tuple[int | str, Sample | InputError]]:
    for row_name, row in rows_of(file, longest, columns):
        try:
            yield row_name, row if isinstance(row, InputError) else _sample(row)
        except InputError as error:
            yield row_name, error


def _lines(file: Lines, longest: int) -> Iterator[tuple[bytes, int]]:
    """Yield each line with its length in bytes; of a line longer than `longest` bytes only the beginning."""
    while line := file.readline(longest):
        size, rest = len(line), line
        while not rest.endswith(b"\n") and (rest := file.readline(CHUNK)):
            size += len(rest)
        yield line, size


def _contents_of(directory: Path) -> str:
    """What a directory without JSON lines holds, and how to convert the first file there that can be, in words."""
    data_forms = (
        f"data are files named .jsonl or .jsonl.gz, with lines of {FORMS}, or tables (.csv, .tsv, .parquet, .arrow)"
        " with such columns"
    )
    try:
        entries = sorted(directory.iterdir())
        advice = next(
            (f"{file.name}: {hint}" for file in entries if file.is_file() and (hint := _list(file))), data_forms
        )
    except OSError as error:
        raise InputError(_unreadable(Path(error.filename or directory), error)) from error
    if not entries:
        return f"which is empty; {data_forms}"
    counts = Counter("folder" if entry.is_dir() else f"{entry.suffix} file".lstrip() for entry in entries)
    holds = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items())
    return f"but {holds}; {advice}"


def _list(file: Path) -> str | None:
    """For a .json file that begins with a list: advice on how to convert it; None for other files."""
    if file.suffix.lower() != ".json" or not file.is_file():
        return None
    with file.open("rb") as content:
        return _no_lines(file) if _begins_a_list(content.read(BEGINNING)) else None


def _begins_a_list(content: bytes) -> bool:
    return content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _no_lines(file: Path) -> str:
    return f"a JSON list where JSON lines are due; {_converted(file)}"


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path}: {error.strerror}; check the path and its permissions"


def _converted(file: Path) -> str:
    """Advice that contains the command which converts `file` to JSON lines."""
    if file.suffix == ".gz":
        return "unpack it with gunzip, and the answer to that file says how it is converted"
    target = file.with_suffix(".jsonl")
    if target.exists():
        target = file.with_suffix(".lines.jsonl")
    leave = "take it out of a folder of data and " if file.suffix == ".jsonl" else ""
    command = f'python3 -c "{CONVERSION}" {shlex.quote(str(file))} > {shlex.quote(str(target))}'
    return f"{leave}convert it: {command}"


def parse_sample(line: bytes, columns: Mapping[str, str] | None = None) -> Sample:
    """Parse one JSON line, which has the parts of a sample under their names or under those in `columns`.

    Raises InputError, which says what is wrong with it.
    """
    value = _parsed(line)
    if not isinstance(value, dict):
        raise InputError(f"a JSON {_kind(value)} where an object is due; write {FORMS}")
    if columns:
        missing = next((column for column in columns.values() if column not in value), None)
        if missing is not None:
            raise InputError(f"no key {missing!r}, which {spelled('columns')} names; there are {_keys(value)}")
        value = {name: value[column] for name, column in columns.items()}
    return _sample(value)


def _parsed(line: bytes) -> Any:
    try:
        return from_json(line, strict=True)
    except JsonError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise InputError(f"not UTF-8 (byte {error.__cause__.start} of the line)") from error
        raise InputError(f"not JSON ({error})" if isinstance(error.__cause__, ValueError) else str(error)) from error


def parse_prompt(line: bytes) -> Prompt:
    """Parse one JSON line with a "prompt", a string or a list of messages; what else it has is not looked at.

    Raises InputError, which says what is wrong with it.
    """
    value = _parsed(line)
    if not isinstance(value, dict):
        raise InputError(f'a JSON {_kind(value)} where an object with a "prompt" is due')
    return _prompt(value)


def _keys(value: dict[str, Any]) -> str:
    return ", ".join(sorted(map(str, value))[:6]) or "none"


def _sample(value: dict[str, Any]) -> Sample:
    """The sample that an object or a row describes. Raises InputError, which says what is wrong with it."""
    form = _form(value)
    value = {name: part for name, part in value.items() if name not in PARTS or name in (form, *READ_WITH[form])}
    if form in ("messages", "conversations"):
        return _conversation(value, form)
    if form == "chosen":
        return _pair(value)
    if form == "choices":
        return _question(value)
    if form == "completion":
        completion = value["completion"]
        if isinstance(completion, list):
            turns = _messages(completion, "completion")
            if len(turns) != 1 or turns[0]["role"] != "assistant":
                raise InputError('"completion" as a list must be one message of role "assistant"')
            if turns[0].get("tool_calls") and isinstance(value.get("prompt"), str):
                raise InputError('"tool_calls" are shown by the chat template; write "prompt" as a list of messages')
            if not turns[0].get("tool_calls"):
                _string(turns[0]["content"], "completion")
            if isinstance(value.get("prompt"), list):
                return Completion(_prompt(value), turns[0], tools=_tools(value))
            completion = turns[0]["content"]
        return Completion(_prompt(value), _string(completion, "completion"), tools=_tools(value))
    if form == "instruction":
        return _instruction(value)
    return Text(_string(value["text"], "text", blank=True))


def _form(value: dict[str, Any]) -> str:
    """The form of a row, a key of `READ_WITH`: the first by which no content is lost. Raises InputError where there is
    none.

    A part of another form is no loss if it repeats what is read, as in data sets with a column for each form, nor is
    the "text" that Alpaca makes of a whole sample.
    """
    forms = [form for form in READ_WITH if form in value or (form == "chosen" and "rejected" in value)]
    if not forms:
        raise InputError(
            f"unknown keys ({_keys(value)}); write {FORMS}, or say which keys are the parts:"
            f" {spelled('columns', EXAMPLE)}"
        )
    present = [name for name in PARTS if not _left_out(value.get(name))]
    forms = [form for form in forms if form in present] or forms[:1]
    unread_parts = [next(_unread_parts(value, form, present), None) for form in forms]
    if None not in unread_parts:
        raise InputError(
            f'"{forms[0]}" and "{unread_parts[0]}" in one row, of which only the first would be read; leave one out, or'
            f" say which parts are meant: {spelled('columns', {forms[0]: forms[0]})}"
        )
    return forms[unread_parts.index(None)]


def _unread_parts(value: dict[str, Any], form: str, present: list[str]) -> Iterator[str]:
    """Those of the parts `present` in a row whose content is lost if the row is read as `form`."""
    parts = (form, *READ_WITH[form])
    others = [name for name in present if name not in parts]
    read = set(_leaves([value.get(part) for part in parts])) if others else set()
    for name in others:
        text = value[name]
        written_out = name == "text" and form == "instruction" and isinstance(text, str)
        written_out = written_out and all(text_read in text for text_read in read if isinstance(text_read, str))
        if not written_out and not read.issuperset(_leaves(text)):
            yield name


def texts_in(value: Any) -> Iterator[str]:
    """Every text in lists and objects, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from texts_in(inner)


def _left_out(value: Any) -> bool:
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def _leaves(value: Any) -> Iterator[Any]:
    """The texts and numbers in lists and objects."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def _conversation(value: dict[str, Any], key: str) -> Conversation:
    messages = _messages(value[key], key)
    for index, message in enumerate(messages):
        spoken = ((message.get("content") or "").strip(), *map(message.get, SPOKEN))
        if message["role"] == "assistant" and not any(spoken):
            raise InputError(
                f'message {index} of "{key}", what the assistant says, is blank; write it, or leave it out'
            )
    if key == "conversations":
        messages = (*_system(value), *messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f'"{key}" has no turn of role "assistant"; there is nothing to learn')
    return Conversation(messages, tools=_tools(value))


def _instruction(value: dict[str, Any]) -> Completion:
    if value.get("history"):
        raise InputError('"history" is not read; write the turns as {"messages"}')
    request = _string(value["instruction"], "instruction")
    if not _left_out(value.get("input")):
        request += "\n" + _string(value["input"], "input")
    return Completion((*_system(value), {"role": "user", "content": request}), _string(value.get("output"), "output"))


def _system(value: dict[str, Any]) -> tuple[Message, ...]:
    """The system turn of a sample that has it under a key of its own; () if there is none."""
    return (
        ({"role": "system", "content": _string(value["system"], "system")},)
        if not _left_out(value.get("system"))
        else ()
    )


def _question(value: dict[str, Any]) -> Question:
    choices = value["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError('"choices" must be a list of at least two strings')
    texts = tuple(_string(choice, "choices") for choice in choices)
    if len(set(texts)) < len(texts):
        raise InputError('"choices" names the same answer twice')
    answer = value.get("answer")
    if isinstance(answer, str) and answer in texts:
        return Question(_prompt(value), texts, texts.index(answer), tools=_tools(value))
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return Question(_prompt(value), texts, answer, tools=_tools(value))
    raise InputError(f'"answer" is {answer!r}; write one of the choices or its index from 0 to {len(texts) - 1}')


def _pair(value: dict[str, Any]) -> AnswerPair:
    for key in ("chosen", "rejected"):
        if value.get(key) is None:
            raise InputError(f'"{key}" is missing or null; a pair of answers is {PAIR_FORM}')
    (prompt_messages, chosen), (other_messages, rejected) = (_answer(value[key], key) for key in ("chosen", "rejected"))
    if prompt_messages != other_messages:
        raise InputError(
            '"chosen" and "rejected" differ before their last message; what comes before it is the prompt of both'
        )
    tools = _tools(value)
    if prompt_messages:
        return AnswerPair(prompt_messages, chosen, rejected, tools)
    prompt = _prompt(value)
    if isinstance(prompt, str) and not (isinstance(chosen, str) and isinstance(rejected, str)):
        if any(not isinstance(answer, str) and answer.get("tool_calls") for answer in (chosen, rejected)):
            raise InputError('"tool_calls" are shown by the chat template; write "prompt" as a list of messages')
        chosen, rejected = (answer if isinstance(answer, str) else answer["content"] for answer in (chosen, rejected))
    return AnswerPair(prompt, chosen, rejected, tools)


def _answer(value: Any, key: str) -> tuple[tuple[Message, ...], str | Message]:
    """(the messages before an answer, if it stands at the end of a conversation; the answer)."""
    if not isinstance(value, list):
        return (), _string(value, key)
    *before, last = _messages(value, key)
    if last["role"] != "assistant":
        raise InputError(
            f'"{key}" ends with a message of role {last["role"]!r}; its last message is the answer, of role "assistant"'
        )
    if not last.get("tool_calls"):
        _string(last["content"], key)
    return tuple(before), last


def _prompt(value: dict[str, Any]) -> Prompt:
    prompt = value.get("prompt")
    if isinstance(prompt, list):
        return _messages(prompt, "prompt")
    if not isinstance(prompt, str):
        raise InputError(f'"prompt" is {_kind(prompt)}; write a string or a list of messages')
    return _whole(prompt, "prompt")


def _tools(value: dict[str, Any]) -> Tools | None:
    """The functions that the assistant may call, for the chat template; None if there are none."""
    tools = value.get("tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError('"tools" must be a list of objects, each the JSON schema of a function')
    if isinstance(value.get("prompt"), str):
        raise InputError('"tools" are shown by the chat template; write "prompt" as a list of messages')
    return tuple(tools)


def _messages(value: Any, key: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f'"{key}" must be a list of {{"role", "content"}} objects, not {_kind(value)}')
    messages = tuple(_message(message, f'message {index} of "{key}"') for index, message in enumerate(value))
    for message in messages:
        _whole(message["role"] + (message.get("content") or ""), key)
    return messages


def _message(message: Any, name: str) -> Message:
    """Check a message and convert ShareGPT's keys. Its content becomes a string, and may be missing beside tool
    calls.
    """
    needed = '"role" and "content"'
    if isinstance(message, dict) and "from" in message and "role" not in message:
        role = SHAREGPT.get(str(message["from"]))
        if role is None:
            raise InputError(
                f'{name} is from {message["from"]!r}; write {", ".join(SHAREGPT)}, or "role" and "content"'
            )
        message, needed = {"role": role, "content": message.get("value")}, '"from" and "value"'
    elif isinstance(message, dict) and not (_left_out(message.get("from")) and _left_out(message.get("value"))):
        raise InputError(
            f'{name} has "role" and "content", and "from" and "value" beside; leave out one of the two pairs'
        )
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        content = "".join(_part(part, name) for part in content)
        message = message | {"content": content}
    if content is None and isinstance(message, dict) and message.get("tool_calls"):
        content = ""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(content, str):
        raise InputError(f"{name} must be an object with the strings {needed}")
    return message


def _part(part: Any, name: str) -> str:
    """The text of one part of a content that is a list."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        description = f"of type {kind!r}" if isinstance(kind, str) else "without a type"
        raise InputError(f'{name} has a part {description}; only text is trained on: {{"type": "text", "text": "..."}}')
    if not isinstance(part.get("text"), str):
        raise InputError(f'{name} has a text part whose "text" is {_kind(part.get("text"))}; write a string')
    text: str = part["text"]
    return text


def _string(value: Any, key: str, *, blank: bool = False) -> str:
    if not isinstance(value, str) or not (value if blank else value.strip()):
        problem = _kind(value) if not isinstance(value, str) else "empty" if not value else "blank"
        raise InputError(f'"{key}" is {problem}; write a string with something in it')
    return _whole(value, key)


def _whole(text: str, key: str) -> str:
    """Return the text if UTF-8 can encode it. JSON's escapes can spell a lone surrogate, which no tokenizer takes.

    Raises InputError in that case.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(f'"{key}" has half a character ({half!a}, a lone surrogate); write the whole one') from error
    return text


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "truth value", int: "number", float: "number"}
    return "missing or null" if value is None else names.get(type(value), type(value).__name__)
