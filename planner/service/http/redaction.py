"""Redacts this machine's paths in answers: a file in an opened folder is named relative to it, any other by its last
part alone.

Workers and libraries name files in full, as whoever started the service needs them: its log keeps them so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from tightfit.planner.service.wire.schema import Job

PATH = re.compile(r"(?<![\w./:~-])/(?:[\w.,@+~=-]+/)*([\w.@+~=-]*[\w@+~=-])")
"""an absolute path in a sentence, whose last full stop is the sentence's; its name is the group"""
PATHS = ("source", "data", "eval_data")
"""fields of a job's request that hold a path or another word"""


class Redaction:
    """Takes the folders that a client knows, or that are the service's own, out of paths; of any other it leaves the
    name.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        known = {path for folder in folders for path in (folder, folder.absolute(), folder.resolve())}
        longest_first = sorted((str(path) for path in known if path != Path("/")), key=len, reverse=True)
        self._folders = [
            (re.compile(rf"(?<![\w./~-]){re.escape(folder)}(/|(?![\w-]))"), Path(folder).name)
            for folder in longest_first
        ]

    def text(self, words: str) -> str:
        for folder, name in self._folders:
            words = folder.sub(partial(_known, name), words)
        return PATH.sub(r"\1", words)

    def job(self, job: Job) -> Job:
        """The job with its error and its request as clients are told them."""
        request = {k: self.text(v) if k in PATHS and isinstance(v, str) else v for k, v in job.request.items()}
        error = job.error and job.error.model_copy(update={"message": self.text(job.error.message)})
        return job.model_copy(update={"request": request, "error": error})


def _known(name: str, found: re.Match[str]) -> str:
    """A known folder in a sentence: the folder's name, or nothing before what lies in it."""
    return "" if found[1] else name
