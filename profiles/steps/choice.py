"""Chooses the step of a source that the options of profiling ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightfit.profiles.options import ProfileOptions
from tightfit.profiles.sources.bundle import Bundle
from tightfit.profiles.steps.bundled_step import BundledStep
from tightfit.profiles.steps.decoder_step import DecoderStep
from tightfit.profiles.weights.source import Source

if TYPE_CHECKING:
    from tightfit.profiles.steps.step import ProfiledStep


def step_of(source: Source, options: ProfileOptions, bundle: Bundle | None = None) -> ProfiledStep:
    """The step of a source that the options ask for, or that a bundle has. Raises InputError for options that it cannot
    have.
    """
    if bundle is not None:
        return BundledStep(source, options, bundle)
    if source.kind == "module":
        from tightfit.profiles.steps.module_step import ModuleStep

        return ModuleStep(source, options)
    if options.side_rank is not None:
        from tightfit.profiles.steps.side_step import SideStep

        return SideStep(source, options)
    return DecoderStep(source, options)
