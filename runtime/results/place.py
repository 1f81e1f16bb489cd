"""Where a result is written: under a temporary name beside its place, then renamed, so that it is never there in
part.
"""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.files import remove, remove_orphans, sync_directory
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.run_folder import find_checkpoints
from tightfit.runtime.common.units import format_size
from tightfit.runtime.engine.training.adapter import WEIGHTS

FULL = (errno.ENOSPC, errno.EDQUOT)
MODEL_FILES = re.compile(r".*\.(json|safetensors|txt|model|jinja|tiktoken)|LICENSE.*|additional_chat_templates")
"""names in a folder of a model; --overwrite replaces no folder that holds others"""


def adapter_folder(folder: Path) -> Path:
    """The folder of an adapter; of a run's folder the adapter in it, or with a warning the last checkpoint of one that
    was interrupted or is under way.
    """
    if (folder / WEIGHTS).is_file():
        return folder
    inner = folder / "adapter"
    if (inner / WEIGHTS).is_file():
        return inner
    for step, path in reversed(find_checkpoints(str(folder))):
        if (checkpoint := Path(path)).joinpath(WEIGHTS).is_file():
            message = f"the run in {folder} has not come to its end: what it had learned after step {step} is taken"
            warnings.warn(f"{message}, its last checkpoint", UserWarning, stacklevel=2)
            return checkpoint
    return folder


def check_replaceable(place: Path, *, folder: bool, overwrite: bool) -> None:
    """Raise InputError if the result cannot be put at `place`: something is there already, which `overwrite` does not
    replace either if it is no result of this kind.
    """
    if not os.path.lexists(place) or (folder and place.is_dir() and not any(place.iterdir())):
        return
    if not overwrite:
        raise InputError(
            f"{place} is there already; give {spelled('overwrite', True)} to replace it, or name another place"
        )
    if folder and (place.is_symlink() or not place.is_dir()):
        raise InputError(f"{place} is no folder, and a model in safetensors is one; name another place with -o")
    if not folder and not place.is_file():
        raise InputError(f"{place} is no file, and a GGUF model is one; name another place with -o")
    if folder and (foreign := _foreign_name(place)):
        raise InputError(
            f"{place} holds {foreign}, which no merge leaves there and {spelled('overwrite', True)} would remove; name"
            " another place"
        )


def _foreign_name(folder: Path) -> str | None:
    """A name in a folder that belongs to no model; None: there is none."""
    names = sorted(path.name for path in folder.iterdir())
    if names and "config.json" not in names:
        return names[0]
    return next((name for name in names if not MODEL_FILES.fullmatch(name)), None)


@contextmanager
def atomic_output(place: Path, size: int, *, folder: bool) -> Iterator[Path]:
    """Yields a temporary path for a folder (which is made) or a file; what the block left there then gets the name
    `place`, in whose place nothing is left if the block fails.

    `size` bytes are to be written. Raises RunError where the disk has not so many left, or fills up.
    """
    temporary = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_orphans(place)
        disk = os.statvfs(place.parent)
        if (free := disk.f_bavail * disk.f_frsize) < size:
            raise RunError(
                f"{place}: {format_size(size)} are to be written and {format_size(free)} are free; free some space, or"
                " name another place with -o"
            )
        if folder:
            temporary.mkdir()
        yield temporary
        if folder:
            sync_directory(temporary)
        _put(temporary, place)
        sync_directory(place.parent)
    except OSError as error:
        if error.errno in FULL:
            raise RunError(
                f"{place}: the disk is full ({format_size(size)} are to be written); free space and try again"
            ) from error
        raise RunError(f"{place}: cannot be written ({error.strerror}); name another place with -o") from error
    finally:
        remove(temporary)


def _put(temporary: Path, place: Path) -> None:
    """Rename; what lies at `place`, if anything does, is removed once the new one has its name."""
    if not place.is_dir():
        temporary.replace(place)
        return
    earlier = place.with_name(f".{place.name}.{os.getpid()}.earlier.partial")
    place.rename(earlier)
    temporary.rename(place)
    remove(earlier)
