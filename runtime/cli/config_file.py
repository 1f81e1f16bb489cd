"""Reads a command's options from a YAML or TOML file, and writes those that were used as TOML.

A key is an option's long name, with - or _ between its words, or the name of the command's argument. An option that may
be given several times takes a list, or a map where it has the form NAME=VALUE.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightfit.runtime.cli.options import key_of, usage
from tightfit.runtime.cli.other_tools import OTHER_NAMES, hint
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import read_whole, write_whole

FOR_ONE_CALL = ("config", "resume", "overwrite", "force", "json", "debug", "help", "help_all")
"""options that say what one call of the command does, and not how it trains: files may not have them"""
WRITTEN = "# The options of a run of `tightfit train`, as they were used.\n"
"""the first line of a file that `write_options` has written"""


def read_options(path: Path, context: Any) -> dict[str, Any]:
    """The options that the file gives to the command of `context`, by the parameters' names, as words.

    They can be the context's `default_map`: what stands on the command line goes before. Raises InputError for a file
    that cannot be read, for a key that is no option, which names the nearest one, and for a value that the option does
    not take.
    """
    known = {key_of(parameter): parameter for parameter in context.command.params}
    values: dict[str, Any] = {}
    for name, value in read_file(path).items():
        key = str(name).replace("-", "_")
        if OTHER_NAMES.get(key, key) in FOR_ONE_CALL:
            raise InputError(f"{path}: {name}: this is said on the command line, not in a file; leave it out")
        if key not in known:
            settable = {name: name for name in known if name not in FOR_ONE_CALL}
            raise InputError(f"{path}: {name}: no option of `{context.command_path}`{hint(key, settable, near=True)}")
        parameter = known[key]
        if parameter.name in values:
            raise InputError(f"{path}: {name}: given twice")
        if value is None:
            continue
        words = _as_words(f"{path}: {name}", parameter, value)
        try:
            parameter.process_value(context, words)
        except Exception as error:
            if not usage(error):
                raise
            raise InputError(f"{path}: {name}: {value!r} is no value for it ({error.message})") from error  # type: ignore[attr-defined]
        values[parameter.name] = words
    return values


def read_file(path: Path) -> dict[Any, Any]:
    """The map that a .yaml, .yml or .toml file holds. Raises InputError where there is none."""
    try:
        text = read_whole(path).decode()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a YAML or TOML file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); name a YAML or TOML file") from error
    if path.suffix == ".toml":
        import tomllib

        try:
            return tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise InputError(f"{path}: not TOML ({error})") from error
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"{path}: options are read from YAML or TOML; name the file .yaml, .yml or .toml")
    try:
        import yaml
    except ImportError as error:
        raise InputError(f"{path}: YAML needs PyYAML (pip install pyyaml); or write the options as TOML") from error
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: no map of options; write a line such as 'batch: 4' for each")
    return content


def write_options(path: Path, options: Mapping[str, Any], comment: str) -> None:
    """Write options, by their keys, as TOML that `read_options` reads, with a `comment` for people.

    Raises InputError if the file cannot be written, or was not written by this function: a person's is not replaced.
    """
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(WRITTEN):
        raise InputError(
            f"{path} is not by tightfit, which writes the options that a run used under this name; move it away, or"
            " choose another output directory"
        )
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in options.items()]
    write_whole(path, WRITTEN + f"# {comment}\n\n" + "".join(lines))


def _as_words(where: str, parameter: Any, value: Any) -> str | bool | list[str]:
    """A value as words of a command line, as the `parameter` takes them."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise InputError(f"{where}: {value!r} is no value for it; write true or false")
        return value
    multiple = getattr(parameter, "multiple", False)
    if isinstance(value, (dict, list)) and not multiple:
        raise InputError(f"{where}: one value is due; write several names as one, with commas between them")
    if isinstance(value, dict):
        return [f"{name}={_as_word(where, item)}" for name, item in value.items()]
    if multiple:
        return [_as_word(where, item) for item in (value if isinstance(value, list) else [value])]
    return _as_word(where, value)


def _as_word(where: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise InputError(f"{where}: {value!r} is no value for it; write a number or words")
    # A shell would have replaced the home folder.
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else str(value)
