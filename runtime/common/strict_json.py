"""Reads JSON from outside, and writes strict JSON, which every parser accepts: no NaN and no infinity.

`from_json` and `read_json` are the one way in for JSON that tightfit has not just written itself; the linter refuses
`json.loads` elsewhere.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any, NoReturn

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import LARGEST_DOCUMENT, read_whole

DEEPEST = 100
"""lists and objects within one another; what walks through a value calls itself for each"""


class JsonError(InputError, ValueError):
    """A text is not JSON, or not of the kind that is accepted; callers put the text's name before the message."""


def read_json(path: str | os.PathLike[str], *, most: int = LARGEST_DOCUMENT) -> Any:
    """What the JSON in the file `path` says. Raises OSError as `read_whole` does, and JsonError."""
    return from_json(read_whole(path, most=most))


def from_json(text: str | bytes | bytearray, *, strict: bool = False) -> Any:
    """What the JSON in `text` says, in any of JSON's encodings.

    With `strict`, no key may stand twice in an object and no number may be NaN or infinite: of other programs' files
    these are read as Python reads them. Raises JsonError for what is not JSON, or nested more than `DEEPEST` deep.
    """
    strictly: dict[str, Any] = (
        {"object_pairs_hook": _once, "parse_constant": _no_number, "parse_float": _finite_number} if strict else {}
    )
    try:
        value = json.loads(text, **strictly)  # noqa: TID251  the one place
    except JsonError:
        raise
    except UnicodeDecodeError as error:
        raise JsonError(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise JsonError(_TOO_DEEP) from error
    except ValueError as error:
        raise JsonError(str(error)) from error
    if _brackets(text) > DEEPEST and is_deeper(value, DEEPEST):
        raise JsonError(_TOO_DEEP)
    return value


_TOO_DEEP = f"lists or objects nested more than {DEEPEST} deep"


def _brackets(text: str | bytes | bytearray) -> int:
    return text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    merged = dict(pairs)
    if len(merged) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError(f"the key {twice[:60]!r} stands twice in one object; leave one of them out")
    return merged


def _no_number(word: str) -> NoReturn:
    raise JsonError(f"{word} is no number in JSON; write null, or leave it out")


def _finite_number(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise JsonError(f"{word[:40]} is too large for a number; write it as a text, or leave it out")
    return number


def to_json(value: Any) -> str:
    """`value` as one line of strict JSON; NaN and infinity (an infeasible plan's step time) become null."""
    return json.dumps(_finite(value), allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)
