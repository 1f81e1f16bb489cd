"""What the service sends to a worker process (`JobOrder`), and what the worker answers with (`EventWriter`); the lanes
in which jobs wait for a worker.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.planner.service.wire.redaction import Redaction
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.strict_json import to_json

SOLVE = "solve"
"""the lane of plans, comparisons and bundles: as many are solved at once as the settings say"""
LOCAL = "cpu"
"""this machine's device, and the lane of the measurements and runs that need it to themselves"""
UPLOAD = "upload"
"""the lane of the processes that read uploads"""
VIEW = "view"
"""the lane of the processes that make what is shown of plans"""
UploadKind = Literal["profile", "description", "example", "list"]
"""what is uploaded: a profile, the description of a model of which a bundle is wanted, the profile that comes with the
package, or samples that may be a JSON list
"""
MERGED = {"gguf": "merged.gguf", "safetensors": "merged.tar"}
"""form of a merged model -> its file in the folder of the job that has merged it"""
PROGRESS_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class JobOrder:
    """What a worker is to do, and where."""

    kind: str
    """a job's kind, upload or view"""
    request: dict[str, Any]
    objects: str
    """folder of the content-addressed files"""
    memory_bytes: int | None
    """private memory that the work may take (RLIMIT_DATA)"""
    cpu_seconds: int | None = None
    """of the processor that it may take (RLIMIT_CPU)"""
    digests: dict[str, str] = field(default_factory=dict)
    """id of each profile or plan that the request names -> digest of its object"""
    names: dict[str, str] = field(default_factory=dict)
    """id of each file that the request names -> its name"""
    folder: str = ""
    """folder of this job alone"""
    lock: str | None = None
    """file that is locked while the device is used"""
    command: list[str] = field(default_factory=list)
    """tightfit's command line"""
    folders: list[str] = field(default_factory=list)
    """files in these are named relative to them in all that leaves the service"""
    paths: dict[str, str] = field(default_factory=dict)
    """a run's model's real paths, which were redacted in its stored plan"""

    def redaction(self) -> Redaction:
        return Redaction(map(Path, self.folders))

    def content(self, identity: str) -> bytes:
        """Content of a profile or plan that the request names. Raises InputError where it is gone, UnreadableError
        where damaged.
        """
        if identity not in self.digests:
            raise InputError(f"what was stored as {identity} is gone since this was asked for; make it again")
        return ObjectStore(Path(self.objects)).read(self.digests[identity])


class EventWriter:
    """Writes a worker's events to its standard output, where the service reads them: without paths but in the rows of
    files, and progress at most every tenth of a second.
    """

    def __init__(self) -> None:
        # Libraries print; standard output is the service's.
        self._file = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.redaction = Redaction([])
        self._last = 0.0
        self._lock = threading.Lock()

    def progress(self, *, always: bool = False, **what: Any) -> None:
        now = time.monotonic()
        if always or now - self._last >= PROGRESS_SECONDS:
            self._last = now
            self.write("progress", **what)

    def write(self, event: str, *, files: list[dict[str, Any]] | None = None, **what: Any) -> None:
        line = {"event": event} | self.redaction.value(what) | ({} if files is None else {"files": files})
        with self._lock:
            self._file.write(to_json(line) + "\n")
