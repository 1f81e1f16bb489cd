"""A step that was traced elsewhere and came in a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tightfit.profiles.options import ProfileOptions
from tightfit.profiles.schema import TracedStep
from tightfit.profiles.sources.bundle import Bundle
from tightfit.profiles.steps.step import ProfiledStep, of_source
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.progress import Progress

if TYPE_CHECKING:
    from tightfit.profiles.tracing.traced import Trace

MEASURING = (
    "device", "threads", "force", "progress", "bundle", "adapter", "accumulate", "memory", "base", "embeddings",
)  # fmt: skip
"""options that say how a step is measured, how weights are packed, or where an adapter lies, and not what is traced"""


class BundledStep(ProfiledStep):
    """Options that say what is traced were given when the bundle was made; the same ones may be given again."""

    worth_a_process = False

    def __init__(self, source: Source, options: ProfileOptions, bundle: Bundle) -> None:
        super().__init__(source, options)
        self._bundle, step = bundle, bundle.step
        self.kind = step.model.kind
        self.dtype, self.batch, self.seq = step.compute_dtype, step.batch, step.seq
        given = options.model_dump(mode="json", exclude=set(MEASURING), exclude_defaults=True)
        asked = bundle.request.options
        for name, value in given.items():
            if asked.get(name) != value:
                was = spelled(name, asked[name]) if name in asked else f"without {spelled(name)}"
                raise InputError(
                    f"{spelled(name, value)}: the bundle of {bundle.request.name} was made {was}; leave the option out,"
                    " or make a bundle with it"
                )

    def settings(self, report: Progress) -> list[Any]:
        return [self._bundle.json()]

    def traced(self, report: Progress) -> TracedStep:
        return of_source(self._bundle.step, self.source, self.options.accumulate)

    def trace(self, report: Progress) -> Trace:
        raise AssertionError("the step of a bundle is traced already")
