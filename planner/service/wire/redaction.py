"""Redacts this machine's paths in all that leaves the service: a file in an opened folder is named relative to it, any
other by its last part alone.

Workers and libraries name files in full, as whoever started the service needs them: its log keeps them so. What a
worker makes is redacted before it is stored; a profile's real paths are kept beside it, for its runs. What is stored of
a request and of an error is redacted where it is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tightfit.planner.service.wire.schema import ServiceJob
from tightfit.profiles.schema import Model

PATH = re.compile(r"(?<![\w./:~-])/(?:[\w.,@+~=-]+/)*([\w.@+~=-]*[\w@+~=-])")
"""an absolute path in a sentence, whose last full stop is the sentence's; its name is the group"""
PATHS = ("source", "data", "eval_data", "adapter", "bundle")
"""fields of a job's request that hold a path or another word"""
ADAPTER_BASE = "adapter_base"
"""field of a model's config that names the base of its adapters"""


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

    def text(self, sentence: str) -> str:
        for folder, name in self._folders:
            sentence = folder.sub(partial(_known, name), sentence)
        return PATH.sub(r"\1", sentence)

    def value(self, data: Any) -> Any:
        """JSON with all its strings redacted."""
        if isinstance(data, str):
            return self.text(data)
        if isinstance(data, list | tuple):
            return [self.value(item) for item in data]
        if isinstance(data, dict):
            return {name: self.value(item) for name, item in data.items()}
        return data

    def model(self, model: Model) -> tuple[Model, dict[str, str]]:
        """The model with its paths redacted, and what `with_paths` needs to take that back."""
        known_paths = {"source": model.source, "store": model.store, ADAPTER_BASE: model.config.get(ADAPTER_BASE)}
        paths = {name: path for name, path in known_paths.items() if path is not None and self.text(path) != path}
        return with_paths(model, {name: self.text(path) for name, path in paths.items()}), paths

    def job(self, job: ServiceJob) -> ServiceJob:
        """The job with its error and its request redacted."""
        request = {k: self.text(v) if k in PATHS and isinstance(v, str) else v for k, v in job.request.items()}
        error = job.error and job.error.model_copy(update={"message": self.text(job.error.message)})
        return job.model_copy(update={"request": request, "error": error})


def with_paths(model: Model, paths: Mapping[str, str]) -> Model:
    """The model with these paths of its source, its store and the base of its adapters, where they are given."""
    update: dict[str, Any] = {name: path for name, path in paths.items() if name != ADAPTER_BASE}
    if ADAPTER_BASE in paths:
        update |= {"config": model.config | {ADAPTER_BASE: paths[ADAPTER_BASE]}}
    return model.model_copy(update=update)


def _known(name: str, match: re.Match[str]) -> str:
    """A known folder in a sentence: the folder's name, or nothing before what lies in it."""
    return "" if match[1] else name
