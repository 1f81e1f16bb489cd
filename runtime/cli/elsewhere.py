"""A service that makes bundles for this machine and plans for it: what it was asked for is kept in the cache and not
asked for again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter

from tightfit.planner.generation.choice import Choice, ChoiceProblem
from tightfit.profiles.options import SEQ, ProfileOptions
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.profiles.sources.lookup import longest_sequence
from tightfit.profiles.weights.source import BUNDLE
from tightfit.runtime.cli.options import service
from tightfit.runtime.common.cache import cache_key, cache_place, keep, kept
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.results.answer_options import AnswerOptions

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

    def bundle(self, model: str, options: ProfileOptions) -> Path | None:
        """The folder of a bundle of the model with the step that the options ask for. None where the model is code of
        one's own, and where it or an option is a bundle.
        """
        return self._bundle(model, options, any_step=False)

    def answers(self, model: str, options: AnswerOptions) -> Path | None:
        """The folder of a bundle of the model, with whatever step; else as `bundle`."""
        seq = min(SEQ, longest_sequence(model) or SEQ)
        asked = ProfileOptions(seq=seq, base=options.base, embeddings=options.embeddings, bundle=options.bundle)
        return self._bundle(model, asked, any_step=True)

    def _bundle(self, model: str, options: ProfileOptions, *, any_step: bool) -> Path | None:
        from tightfit.profiles.api import bundle_request

        request = bundle_request(model, **dict(options))
        if request is None:
            return None
        request = request.without_places()
        of_model = request.model_copy(update={"options": {}, "lora": None})
        folders = cache_directory() / "bundles" / cache_key(PROFILE_VERSION, of_model.model_dump_json())
        folder = folders / cache_key(request.model_dump_json())
        kept_bundles = [
            file.parent for file in sorted(folders.glob(f"*/{BUNDLE}" if any_step else f"{folder.name}/{BUNDLE}"))
        ]
        if kept_bundles and not self._force:
            return kept_bundles[0]
        self._report(f"having the model traced by {self._url}")
        self._asked(lambda client: client.bundle(request)).save(folder)
        return folder

    def choose(self, problems: Sequence[ChoiceProblem]) -> Sequence[Choice | None]:
        """What stays in memory between the tokens of answers (`tightfit.planner.generation.choice.Choose`)."""
        asked = [problem.model_dump() for problem in problems]
        place = cache_place("generation/choices", PROFILE_VERSION, asked)
        known = None if self._force else kept(place, CHOICES.validate_json)
        if known is not None:
            return known
        self._report(f"having the answers planned by {self._url}")
        choices = self._asked(lambda client: client.choose(problems))
        keep(place, CHOICES.dump_json(choices))
        return choices

    def _asked(self, ask: Callable[[Client], Answer]) -> Answer:
        with service(self._url, self._certificate) as client:
            return ask(client)
