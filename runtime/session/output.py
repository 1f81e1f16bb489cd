"""The output folder of a run: locks it while a run writes to it, and finds or removes what an earlier run left
there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tightfit.runtime.common.errors import InputError, TightfitError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.run_folder import find_checkpoints, writing_to
from tightfit.runtime.common.strict_json import read_json
from tightfit.runtime.engine.training.batches import open_batches
from tightfit.runtime.engine.training.checkpoint import load_latest, partial_directories
from tightfit.runtime.engine.training.evaluations import Evaluations

RESULTS = ("metrics.jsonl", "fleet.jsonl", "report.json", "adapter", "model", "side", "best")
"""what a run leaves that must not be overwritten unasked; its prepared ``data`` can be made again and are not among
it"""
OURS = {
    "model": ("model.safetensors",),
    "best": ("adapter_config.json", "adapter_model.safetensors", "model.safetensors"),
}
"""folder of a name that others give to theirs too -> the only files that a run leaves in it"""


TOKENS = ".tokens"
"""folder in the output directory that `tokens_kept` makes way for"""
ENDING_SECONDS = 2.0
"""how long a process that was killed may take to end, on a busy machine, and holds its lock until then"""


@contextmanager
def locked(directory: Path, held: int | None = None) -> Iterator[int]:
    """Make the output directory and lock it against other runs; yields the descriptor that holds the lock. `held` is
    that of a lock which this process had before it became another program.

    The lock is released when the block ends, or ends with a TightfitError; then the folders that were made for it are
    removed where nothing is in them. After any other exception it lasts until the processes that inherited the
    descriptor have closed it. Raises InputError if the directory cannot be made or written, or another run has it.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = held if held is not None else os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{directory}: {error.strerror}; choose another output directory") from error
    try:
        if not os.access(directory, os.W_OK | os.X_OK):
            raise InputError(f"{directory}: takes no files; make it writable, or choose another output directory")
        with suppress(OSError):  # a file system without locks
            if not _lock(descriptor):
                raise InputError(
                    f"another run is under way in {directory}; wait for its end, or choose another output directory"
                )
        try:
            yield descriptor
        except TightfitError:
            with suppress(OSError):
                for folder in made:  # the innermost first; one that holds something ends it
                    folder.rmdir()
            _unlock(descriptor)
            raise
        _unlock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock the folder of a descriptor; False: another process still holds the lock after `ENDING_SECONDS`. Raises
    OSError where the file system has no locks.
    """
    deadline = time.monotonic() + ENDING_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(ENDING_SECONDS / 40)


def _unlock(descriptor: int) -> None:
    """Release the lock explicitly: forks of this process, such as a DataLoader's workers, may hold the
    descriptor open.
    """
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def is_locked(directory: Path) -> bool:
    """Whether a run holds the directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def tokens_kept(directory: Path, *, begun: bool = False) -> Iterator[Path]:
    """A folder in which tokenised data may be kept from when the length of a sequence is chosen until the run has
    prepared its data (`tightfit.runtime.session.launch.prepared` then removes it).

    It begins empty, whatever a call that was killed left there, unless it has `begun` in an earlier program of this
    process, and is removed if the block ends with an exception.
    """
    folder = directory / TOKENS
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Make a temporary folder in which data are prepared; it is removed at the end, with what is still in it.

    The caller moves the data out once they are found to fit, and only then replaces those of an earlier run.
    """
    staging = directory / ".data.partial"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    with writing_to(directory):
        staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_prepared(directory: Path) -> None:
    """Remove the prepared data of an earlier run, and nothing else that somebody may keep in a folder ``data``."""
    folder = directory / "data"
    if folder.is_symlink():
        return
    for purpose in ("train", "evaluate"):
        for kind in ("records", "batches", "references"):
            (folder / f"{purpose}.{kind}").unlink(missing_ok=True)
    with suppress(OSError):  # it is not there, or not empty
        folder.rmdir()


def to_be_replaced(
    directory: Path, steps: int | None, *, resume: bool, overwrite: bool, elsewhere: bool = False
) -> list[Path]:
    """Paths that an earlier run left in the output directory and that this run is to replace; none if it resumes.

    Half-written checkpoints are removed here. With `elsewhere` the checkpoint to resume from may come from another
    member of a fleet. `steps` is the number of steps of this run; None where it is not known. Raises
    InputError if there is an earlier run and neither `resume` nor `overwrite` is set, if it cannot be resumed, and if a
    folder ``model`` or ``best`` holds files that no run made.
    """
    try:
        if os.path.lexists(data := directory / "data") and not data.is_dir():
            raise InputError(
                f"{data} is no folder, and a run keeps its prepared data in one of that name; move it away, or choose"
                " another output directory"
            )
        for folder in (directory / name for name in OURS):
            if not resume and folder.is_dir() and (foreign := _foreign_file(folder)):
                raise InputError(
                    f"{folder} holds {foreign}, which no run leaves there and {spelled('overwrite', True)} would"
                    " remove; move it away, or choose another output directory"
                )
        earlier = [path for name in RESULTS if (path := directory / name).exists() and path.stat().st_size]
        checkpoints = find_checkpoints(str(directory))
        earlier += [Path(path) for _, path in checkpoints]
        if earlier and not resume and not overwrite:
            advice = (
                f"continue it with {spelled('resume', True)}, "
                if checkpoints
                else "it has no checkpoint to go on from, "
            )
            raise InputError(
                f"{directory} holds an earlier run ({earlier[0].name}); {advice}replace it with"
                f" {spelled('overwrite', True)}, or choose another directory"
            )
        if resume and not checkpoints and not elsewhere:
            advice = f"give {spelled('overwrite', True)} in place of" if earlier else "leave out"
            raise InputError(
                f"{directory} holds no checkpoint to resume from; {advice} {spelled('resume', True)} to start from the"
                " beginning"
            )
        if resume and steps is not None:
            check_reached(directory, steps)
        for partial in partial_directories(str(directory)):
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{directory}: {error.strerror}; choose another output directory") from error
    return [] if resume else earlier


def check_reached(directory: Path, steps: int) -> None:
    """Raise InputError where the run in `directory` has more than `steps` steps behind it."""
    checkpoints = find_checkpoints(str(directory))
    if checkpoints and (reached := checkpoints[-1][0]) > steps:
        raise InputError(
            f"{spelled('steps')} {steps}: the run in {directory} has reached step {reached}; give at least {reached},"
            " or choose another directory"
        )


def _foreign_file(folder: Path) -> str | None:
    """A file name in one of the folders `OURS` that no run makes there, so that it may be somebody's model; None if
    there is none.

    Hidden files do not count.
    """
    ours = OURS[folder.name]
    return min((path.name for path in folder.iterdir() if path.name not in ours and path.name[0] != "."), default=None)


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders; of a symbolic link only the link."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def finished_report(
    directory: Path, settings: dict[str, Any], train: Path, evaluation: Path | None, name: str
) -> tuple[dict[str, Any] | None, bool]:
    """The report of the run in `directory` if it has taken all its steps already, or has ended early because its
    evaluations were no better any more, and whether it was evaluated.

    `train` and `evaluation` are this run's prepared data files; `name` names the training data in messages. The second
    value says whether both evaluations, before and after, were made on the data in `evaluation`, or none is wanted.
    (None, False) if steps or results are missing. Raises InputError if the run was made under other conditions or on
    other data.
    """
    expected = {**settings["conditions"], "data": _fingerprint(train)}
    checkpoint = load_latest(str(directory), json.loads(json.dumps(expected)), name)  # noqa: TID251  as JSON, to compare equal
    held_out = _fingerprint(evaluation) if evaluation else None
    try:
        report = read_json(directory / "report.json")
        evaluations = Evaluations.of(settings, held_out, checkpoint.state)
        ended = checkpoint.step == settings["steps"] or (evaluations is not None and evaluations.over)
        done = ended and checkpoint.step == len(report["loss"])
        evaluated = {moment for moment, saved in report["evaluation"].items() if saved["data"] == held_out}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, False
    saved = Path(str(report.get("adapter"))).name
    names = sorted(("adapter", "model", "side"), key=lambda name: name != saved)
    trained = next((path for name in names if (path := directory / name).is_dir()), None)
    if not done or trained is None:
        return None, False
    # The present paths, since the folder may have been moved.
    report |= {"adapter": str(trained), "checkpoint": checkpoint.path}
    return report, held_out is None or evaluated == {"before", "after"}


def _fingerprint(prepared: Path) -> str:
    batches = open_batches(str(prepared), seed=0)  # the seed matters for training alone
    batches.close()
    return batches.fingerprint
