"""What goes over the wire of a model of which a bundle is made for a device: its configuration, without names of places
there, which is checked here before anything is made of it. The model's weights stay where they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tightfit.planner.service.wire.errors import ServiceError, invalid
from tightfit.planner.service.wire.schema import DEEPEST
from tightfit.profiles.models.decoder_config import decoder_shape, handwritten, initial_deviation, text_config
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.models.transformers_config import check
from tightfit.profiles.options import LARGEST_RANK, ProfileOptions
from tightfit.profiles.sources.bundle import MOST_STORED, BundleRequest
from tightfit.profiles.steps.bundled_step import MEASURING
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.strict_json import JsonError, from_json, is_deeper

NAMES = re.compile(r"[\w.-]+", re.ASCII)
"""names of tensors, such as model.layers.0.self_attn.q_proj.weight"""
MODEL = re.compile(r"[^/\\\x00-\x1f\x7f]{1,200}(/[^/\\\x00-\x1f\x7f]{1,200})?")
"""the name of a model, or its id on a hub"""
LONGEST = 80
"""letters of a field's name that are repeated"""


def parse_request(content: bytes) -> BundleRequest:
    """The request that was sent, which is checked. Raises ServiceError 422, naming the field that is wrong."""
    try:
        data = from_json(content)
    except JsonError as error:
        raise ServiceError(422, "invalid_request", f"not JSON, or cut off ({error})", "body") from error
    if is_deeper(data, DEEPEST):
        raise invalid("", f"objects and lists more than {DEEPEST} deep in each other; send them flatter")
    stored = data.get("stored") if isinstance(data, dict) else None
    if isinstance(stored, list) and len(stored) > MOST_STORED:
        raise invalid("stored", f"{len(stored)} tensors; this service traces models of at most {MOST_STORED}")
    try:
        request = BundleRequest.model_validate(data)
        request.model_dump_json()
    except ValidationError as error:
        raise _first_fault(error) from error
    except ValueError as error:  # halves of characters
        raise invalid("", f"cannot be repeated as JSON ({error}); leave out what is no text") from error
    if not MODEL.fullmatch(request.name):
        raise invalid("name", f"{request.name[:LONGEST]!r} is no name of a model; send its last part alone")
    check_config(request.config, "config")
    _check_stored(request)
    _check_options(request.options)
    _check_lora(request.lora)
    return request


def canonical_request(request: BundleRequest) -> bytes:
    """The request as it is stored, under its checksum, and as `Client` sends it."""
    return json.dumps(request.model_dump(mode="json")).encode()


def check_config(config: Mapping[str, Any], field: str) -> None:
    """Raises ServiceError 422 for a config from which no dense decoder can be built.

    Of one whose model transformers has to build, only what needs neither transformers nor PyTorch is checked here: what
    the built model shows is the job's error.
    """
    text = text_config(config)
    if text is None:
        raise invalid(field, "no model config (no 'model_type'); send the content of a config.json")
    try:
        if handwritten(text):
            decoder_shape(text)
        else:
            check(text)
        initial_deviation(text)
    except InputError as error:
        raise invalid(field, str(error)) from error


def _check_stored(request: BundleRequest) -> None:
    for name in request.stored:
        if not NAMES.fullmatch(name):
            raise invalid("stored", f"{name[:LONGEST]!r} is no name of a tensor; send those of the checkpoint")
    if request.stored and handwritten(request.config):
        family = request.config.get("model_type")
        raise invalid("stored", f"a {family} decoder is written by hand and needs no names; leave `stored` out")


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name not in ProfileOptions.model_fields or name in MEASURING:
            known = ", ".join(sorted(set(ProfileOptions.model_fields) - set(MEASURING)))
            raise invalid(f"options.{name[:LONGEST]}", f"not an option of tracing; there are {known}")
        try:
            ProfileOptions(**{name: value})
        except InputError as error:
            raise invalid(f"options.{name}", str(error)) from error


def _check_lora(settings: Mapping[str, Any] | None) -> None:
    if settings is None:
        return
    for name in settings:
        if name not in LoraConfig.__dataclass_fields__:
            raise invalid(f"lora.{name[:LONGEST]}", "no setting of an adapter; send those of the same tightfit")
    try:
        lora = TypeAdapter(LoraConfig).validate_python(settings)
    except ValidationError as error:
        raise _first_fault(error, "lora") from error
    except (InputError, ArithmeticError) as error:
        raise invalid("lora", str(error)) from error
    if max(lora.rank, *lora.rank_pattern.values(), 1) > LARGEST_RANK:
        raise invalid("lora.rank", f"ranks of at most {LARGEST_RANK} are traced; train with a smaller one")


def _first_fault(error: ValidationError, *within: str) -> ServiceError:
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part)[:LONGEST] for part in (*within, *fault["loc"]))
    return invalid(field, str(fault["msg"]))
