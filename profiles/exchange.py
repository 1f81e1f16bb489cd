"""Profile files: versioned JSON with a checksum of their content, written whole or not at all. No torch is imported."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from pydantic import ValidationError

from profiles.bare import is_bare, parse_graph, refuse_repeated
from profiles.errors import InputError
from profiles.files import of_another_version, write_whole
from profiles.schema import PROFILE_VERSION, Profile


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a profile, or a bare graph of operators (`profiles.bare`) as one.

    Raises InputError for a file that is missing, truncated, of another version or not a profile.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; make a profile with `tightfit profile MODEL -o {path}`") from error
    return parse_profile(content, str(path))


def parse_profile(content: bytes, name: str) -> Profile:
    """The profile that `content` holds, in any of JSON's encodings; `name` is what messages call it.

    Raises InputError where it is no whole profile.
    """
    try:
        data = json.loads(content)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: not a profile (byte {error.start} is not text); make it again with `tightfit profile`"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{name}: not JSON, perhaps truncated ({error}); make it again with `tightfit profile`"
        ) from error
    if is_bare(data):
        refuse_repeated(content, name)
        return parse_graph(data, name)
    if not isinstance(data, dict) or "layers" not in data:
        raise InputError(f"{name}: not a profile (no 'layers'); make one with `tightfit profile`")
    if "budget_bytes" in data:
        raise InputError(f"{name}: a plan, not a profile; make one with `tightfit profile`")
    if data.get("version") != PROFILE_VERSION:
        raise InputError(
            f"{name}: {of_another_version('profile', data.get('version'), PROFILE_VERSION)}; make it again with `tightfit profile`"
        )
    checksum = data.pop("checksum", None)
    try:
        found = Profile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{name}: field {place}: {first['msg']} (got {str(first['input'])[:60]!r}); make the profile again"
        ) from error
    if checksum is not None and checksum != _checksum(found):
        raise InputError(
            f"{name}: its content does not match its checksum {str(checksum)[:12]}…: changed or damaged; make it again with `tightfit profile` (without the checksum a profile changed on purpose is read)"
        )
    return found


def save_profile(profile: Profile, path: str | os.PathLike[str]) -> Path:
    """Write a profile, whole or not at all. Raises InputError where the place cannot be written, RunError for a full disk."""
    return write_whole(
        path, json.dumps({"checksum": _checksum(profile), **profile.model_dump(mode="json")}, indent=1) + "\n"
    )


def canonical_json(profile: Profile) -> str:
    """A profile as text that is the same for the same content."""
    return json.dumps(profile.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


def _checksum(profile: Profile) -> str:
    """sha256 of what a profile says: digits that flipped on disk would otherwise be believed."""
    return hashlib.sha256(canonical_json(profile).encode()).hexdigest()
