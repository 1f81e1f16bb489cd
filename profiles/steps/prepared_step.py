"""A step that was traced on another machine: of a prepared folder, or by a service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tightfit.profiles.options import ProfileOptions, Progress
from tightfit.profiles.schema import TracedStep, adamw
from tightfit.profiles.sources.described import described
from tightfit.profiles.sources.prepared import load_prepared, prepared_json
from tightfit.profiles.steps.step import ProfiledStep
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled

if TYPE_CHECKING:
    from tightfit.profiles.tracing.trace import Trace

MEASURING = ("device", "threads", "force", "progress", "prepared", "adapter", "accumulate", "memory")
"""options that say how a step is measured or where its adapter lies, and not what is traced"""


class PreparedStep(ProfiledStep):
    """Options that say what is traced were given when the model was prepared; the same ones may be given again."""

    worth_a_process = False

    def __init__(self, source: Source, options: ProfileOptions, folder: Path) -> None:
        super().__init__(source, options)
        self._folder = folder
        self._prepared = prepared = load_prepared(folder)
        step = prepared.training
        self.kind = step.model.kind
        self.dtype, self.batch, self.seq = step.compute_dtype, step.batch, step.seq
        self._check_options()
        self._check_model()

    def _check_options(self) -> None:
        given = self.options.model_dump(mode="json", exclude=set(MEASURING), exclude_defaults=True)
        earlier = self._prepared.request.options or {}
        for name, value in given.items():
            if earlier.get(name) != value:
                was = spelled(name, earlier[name]) if name in earlier else f"without {spelled(name)}"
                raise InputError(
                    f"{spelled(name, value)}: {self._folder} was prepared {was}; leave the option out, or prepare the model again"
                )

    def _check_model(self) -> None:
        """Raise InputError if the step was traced for a model of another form than the source's."""
        wanted, here = self._prepared.request.source, described(self.source)
        for name, tensor in wanted.tensors.items():
            if here.tensors.get(name) != tensor:
                there = f"{tensor.shape} in {tensor.format}"
                found = here.tensors.get(name)
                self._refuse(
                    f"{name} is {there} there and {f'{found.shape} in {found.format}' if found else 'not'} here"
                )
        if wanted.config != here.config:
            names = {*wanted.config, *here.config}
            name = next(name for name in sorted(names) if wanted.config.get(name) != here.config.get(name))
            self._refuse(
                f"its configuration says {name} {wanted.config.get(name)!r} there and {here.config.get(name)!r} here"
            )

    def _refuse(self, difference: str) -> NoReturn:
        raise InputError(
            f"{self._folder} was prepared for {self._prepared.request.source.name}, and {self.source.name} is another model:"
            f" {difference}; prepare this one"
        )

    def settings(self, report: Progress) -> list[Any]:
        return [prepared_json(self._prepared)]

    def traced(self, report: Progress) -> TracedStep:
        step, source = self._prepared.training, self.source
        model = step.model.model_copy(update={"name": source.name, "source": source.path})
        return step.model_copy(update={"model": model, "optimizer": adamw(self.options.accumulate)})

    def trace(self, report: Progress) -> Trace:
        raise AssertionError("a prepared step is traced already")
