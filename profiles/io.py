"""Reads and writes profile files: versioned JSON with a checksum of its content, written atomically.

Imports no PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tightfit.profiles.graph_input import is_bare, parse_graph, refuse_repeated
from tightfit.profiles.schema import PROFILE_VERSION, Profile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import of_another_version, read_whole, write_whole
from tightfit.runtime.common.strict_json import JsonError, from_json

PROFILE_BEGINS = (b'{\n "checksum"', b'{"checksum"', b'{\n "version"', b'{"version"')
WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
"""JSON's literals as Python's parser takes them; a truncated file may end in the middle of one."""


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a profile, or a bare graph of operators (`tightfit.profiles.graph_input`) as one.

    Raises InputError if the file is missing, truncated, of another version or not a profile.
    """
    path = Path(path)
    try:
        content = read_whole(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; make a profile with `tightfit profile MODEL -o {path}`") from error
    return parse_profile(content, str(path))


def parse_profile(content: bytes, name: str, check: Callable[[Any], None] | None = None) -> Profile:
    """The profile that `content` holds, in any of JSON's encodings; `name` is what messages call it.

    `check` is called with the parsed JSON before a profile is built from it, and may refuse it by raising. Raises
    InputError if `content` is not a complete profile.
    """
    try:
        data = from_json(content)
    except JsonError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise InputError(f"{name}: not a profile ({error}); {_again(content)}") from error
        if not content.strip():
            raise InputError(f"{name}: empty; {_again(content)}") from error
        reason = f"cut at byte {len(content)}: {error}" if _ends_early(error.__cause__) else str(error)
        raise InputError(f"{name}: not JSON, perhaps truncated ({reason}); {_again(content)}") from error
    if check is not None:
        check(data)
    if is_bare(data):
        refuse_repeated(content, name)
        return parse_graph(data, name)
    if not isinstance(data, dict) or "layers" not in data:
        raise InputError(
            f"{name}: not a profile (no 'layers') and no graph (no 'operators'); make a profile with `tightfit profile`"
        )
    if "budget_bytes" in data:
        raise InputError(f"{name}: a plan, not a profile; make one with `tightfit profile`")
    if data.get("version") != PROFILE_VERSION:
        raise InputError(
            f"{name}: {of_another_version('profile', data.get('version'), PROFILE_VERSION)}; make it again with"
            " `tightfit profile`"
        )
    checksum = data.pop("checksum", None)
    try:
        profile = Profile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{name}: field {field}: {first['msg']} (got {str(first['input'])[:60]!r}); make the profile again"
        ) from error
    if checksum is not None and checksum != _checksum(profile):
        raise InputError(
            f"{name}: its content does not match its checksum {str(checksum)[:12]}…: changed or damaged; make it again"
            " with `tightfit profile` (without the checksum a profile changed on purpose is read)"
        )
    return profile


def _again(content: bytes) -> str:
    """Advice on how to write an unreadable file again, as far as its content tells a profile from a graph."""
    if b'"tightfit-graph"' in content:
        return "write it again with the tool that made the graph"
    if content.lstrip().startswith(PROFILE_BEGINS):
        return "make it again with `tightfit profile`"
    return "make a profile again with `tightfit profile`, a graph with the tool that writes it"


def _ends_early(error: BaseException | None) -> bool:
    """Whether a JSON error means that the text is valid up to its end but truncated."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    rest = error.doc[error.pos :].strip()
    return error.msg.startswith("Unterminated string") or any(word.startswith(rest) for word in WORDS)


def save_profile(profile: Profile, path: str | os.PathLike[str]) -> Path:
    """Write a profile atomically and return its path.

    Raises InputError if `path` is not writable, RunError if the disk is full.
    """
    return write_whole(path, checked_json(profile))


def checked_json(profile: Profile) -> str:
    """A profile as it is written to files: with its checksum."""
    return json.dumps({"checksum": _checksum(profile), **profile.model_dump(mode="json")}, indent=1) + "\n"


def canonical_json(profile: Profile) -> str:
    """A profile as JSON text that is identical for equal profiles."""
    return json.dumps(profile.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


def _checksum(profile: Profile) -> str:
    """sha256 of a profile's content, so that figures corrupted on disk are noticed."""
    return hashlib.sha256(canonical_json(profile).encode()).hexdigest()
