"""Chooses the step of a source that the options of profiling ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tightfit.profiles.options import ProfileOptions
from tightfit.profiles.steps.decoder_step import DecoderStep
from tightfit.profiles.steps.prepared_step import PreparedStep
from tightfit.profiles.weights.source import Source

if TYPE_CHECKING:
    from tightfit.profiles.steps.step import ProfiledStep


def step_of(source: Source, options: ProfileOptions) -> ProfiledStep:
    """The step of a source that the options ask for. Raises InputError for options that it cannot have."""
    folder = options.prepared or (source.path if source.kind == "prepared" else None)
    if folder is not None:
        return PreparedStep(source, options, Path(folder))
    if source.kind == "module":
        from tightfit.profiles.steps.module_step import ModuleStep

        return ModuleStep(source, options)
    if options.side_rank is not None:
        from tightfit.profiles.steps.side_step import SideStep

        return SideStep(source, options)
    return DecoderStep(source, options)
