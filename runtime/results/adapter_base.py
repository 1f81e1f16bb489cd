"""The base of an adapter: which model it is, and how packing rounded it when the adapter was trained. Imports no
PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.profiles.models.lora import from_peft
from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.strict_json import read_json
from tightfit.runtime.engine.training.adapter import CONFIG

ROUNDED = "rounded from"
"""beginning of the notes on values that packing changes (`tightfit.profiles.weights.precision.rounding_note`)"""


@dataclass(frozen=True, kw_only=True)
class AdapterBase:
    """The base of an adapter, opened."""

    named: str
    source: Source
    rounding: str | None
    """How packing changed its values when the adapter was trained, as a sentence; None: no report says."""


def open_base(folder: Path, requested: str | None) -> AdapterBase:
    """The base of the adapter in `folder`: `requested`, or what the report of its run or its adapter_config.json names.

    Raises InputError where none is named, or it is none that has weights of its own.
    """
    report_base = _base_in_report(folder)
    base_name = requested or report_base.get("source") or named_base(folder)
    if not base_name:
        raise InputError(f"{folder}: its adapter_config.json names no base model; give its {spelled('base')}")
    try:
        source = resolve(str(base_name))
    except InputError as error:
        if requested:
            raise
        raise InputError(
            f"the base of the adapter, {base_name}, cannot be opened: {error}; or name it with {spelled('base')}"
        ) from error
    if not source.has_weights:
        raise InputError(
            f"{base_name} is a bare config, whose weights are random: there is nothing to merge; give its"
            f" {spelled('base')}"
        )
    if source.kind == "bundle":
        raise InputError(
            f"{base_name} is a bundle, whose weights are packed: name the model's own files with {spelled('base')}"
        )
    if source.kind not in ("huggingface", "gguf"):
        raise InputError(
            f"{base_name} is a module of your own, which is trained in full: a run's OUT/model holds it whole"
        )
    rounding = report_base.get("rounding") or (None if ROUNDED in source.note else source.note)
    return AdapterBase(named=str(base_name), source=source, rounding=rounding)


def _base_in_report(folder: Path) -> dict[str, Any]:
    """What the report of the run that left the adapter in `folder` says of its base; {} if there is no report."""
    try:
        report = read_json(folder.parent / "report.json")
        base = report["base"] if Path(report["adapter"]).name == folder.name else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return base if isinstance(base, dict) else {}


def rounding_difference(rounding: str | None) -> str | None:
    """How the base that the adapter was added to differs from the one that training saw, in a sentence; None: not at
    all.
    """
    if rounding is not None and ROUNDED not in rounding:
        return None
    seen_in_training = (
        f"training saw the base {rounding}" if rounding else "where training saw the base rounded (4 bits by default)"
    )
    return (
        f"{seen_in_training}; the adapter was added to the values of the base's own files, from which those differ by"
        " the rounding: losses of the run are near those of this model, not equal"
    )


def named_base(folder: Path) -> str | None:
    """The base that the adapter_config.json in `folder` names. Raises InputError for a folder without an adapter, and
    where it names a revision of a model on the hub.
    """
    from_peft(folder)
    settings = read_json(folder / CONFIG)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if base and revision not in (None, "main") and not Path(base).exists():
        raise InputError(
            f"{folder}: its base is {base} at the revision {revision!r}, and models of the hub are taken at their"
            f" newest; download that revision and name its folder with {spelled('base')}"
        )
    return base or None
