"""A service that traces and solves for this machine: what it is asked for is kept in the cache and not asked for again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter

from tightfit.planner.generation.choice import Choice, ChoiceProblem
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.profiles.sources.described import TracingRequest
from tightfit.profiles.sources.known_decoders import keep_facts
from tightfit.profiles.sources.lookup import description_request
from tightfit.profiles.sources.prepared import PreparedModel, is_prepared, load_prepared, save_prepared
from tightfit.runtime.cli.options import service
from tightfit.runtime.common.files import cache_directory, kept, write_whole

if TYPE_CHECKING:
    from tightfit.planner.service.client import Client

Answer = TypeVar("Answer")
CHOICES = TypeAdapter(list[Choice | None])


class Elsewhere:
    """The service at `url`. With `force` it is asked anew for all. `report` is called with what is asked for.

    Methods raise what the service's client raises.
    """

    def __init__(self, url: str, certificate: Path | None, *, force: bool, report: Callable[[str], None]) -> None:
        self._url, self._certificate, self._force, self._report = url, certificate, force, report
        self._traced: dict[str, PreparedModel] = {}

    def describe(self, model: str) -> None:
        """Learn what the decoder of a model consists of, where only transformers knows its family: it is not needed here then."""
        request = description_request(model, anew=self._force)
        if request is None:
            return
        self._report(f"having the model described by {self._url}")
        facts = self._asked(lambda client: client.trace(request)).decoder
        assert facts is not None
        keep_facts(request.source.config, request.stored or (), facts)

    def trace(self, request: TracingRequest) -> Path:
        """The prepared folder with what was asked for."""
        folder = cache_directory() / "prepared" / _key(request.model_dump_json())
        if self._force or not is_prepared(folder):
            self._report(f"having the model traced by {self._url}")
            save_prepared(self._asked(lambda client: client.trace(request)), folder, None, None)
        return folder

    def traced(self, request: TracingRequest) -> PreparedModel:
        """What was asked for: once, however often it is wanted."""
        key = _key(request.model_dump_json())
        if key not in self._traced:
            self._traced[key] = load_prepared(self.trace(request))
        return self._traced[key]

    def choose(self, problems: Sequence[ChoiceProblem]) -> Sequence[Choice | None]:
        """What stays in memory between the tokens of answers (`tightfit.planner.generation.choice.Choose`)."""
        text = json.dumps([problem.model_dump() for problem in problems])
        place = cache_directory() / "generation" / f"choices-{_key(text)}.json"
        known = None if self._force else kept(place, CHOICES.validate_json)
        if known is not None:
            return known
        self._report(f"having the answers planned by {self._url}")
        choices = self._asked(lambda client: client.choose(problems))
        write_whole(place, CHOICES.dump_json(choices).decode())
        return choices

    def _asked(self, ask: Callable[[Client], Answer]) -> Answer:
        with service(self._url, self._certificate) as client:
            return ask(client)


def _key(text: str) -> str:
    return hashlib.sha256(f"{PROFILE_VERSION} {text}".encode()).hexdigest()[:32]
