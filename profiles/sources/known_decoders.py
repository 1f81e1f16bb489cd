"""What decoders consist of that are not written by hand (`tightfit.profiles.models.decoder_facts`): as a machine elsewhere has said and
the cache has kept, or as transformers builds them here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tightfit.profiles.models.decoder_facts import DecoderFacts
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.runtime.common.files import cache_directory, kept, write_whole


def decoder_facts(config: Mapping[str, Any], stored: Sequence[str]) -> DecoderFacts:
    """The facts of a config's decoder whose checkpoint has the names `stored`. Raises InputError for what transformers does not build, or
    where it is not installed.
    """
    return kept_facts(config, stored) or built_by_transformers(config, stored)


def built_by_transformers(config: Mapping[str, Any], stored: Sequence[str]) -> DecoderFacts:
    from tightfit.profiles.models.transformers_decoder import facts

    return facts(config, stored)


def kept_facts(config: Mapping[str, Any], stored: Sequence[str]) -> DecoderFacts | None:
    """What `keep_facts` has kept; None if that is nothing."""
    return kept(_place(config, stored), DecoderFacts.model_validate_json)


def keep_facts(config: Mapping[str, Any], stored: Sequence[str], facts: DecoderFacts) -> None:
    """Keep what another machine says of a decoder, so that transformers does not have to build it here."""
    write_whole(_place(config, stored), facts.model_dump_json())


def _place(config: Mapping[str, Any], stored: Sequence[str]) -> Path:
    text = json.dumps([PROFILE_VERSION, config, sorted(stored)], sort_keys=True)
    return cache_directory() / "decoders" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
