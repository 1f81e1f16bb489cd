"""The versions that tests and linting run with are those of .ci/lock.txt, which `make lock` brings up to date."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement
from places import ROOT

LOCK = ROOT / ".ci" / "lock.txt"


def requirements():
    """What the tests' environment asks for, the extras that it names among it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts, extras = list(project["dependencies"]), ["test", "dev"]
    while extras:
        for text in project["optional-dependencies"][extras.pop()]:
            if own := re.fullmatch(r"tightfit\[(.*)\]", text):
                extras += own[1].split(",")
            else:
                texts.append(text)
    return [one for one in map(Requirement, texts) if one.marker is None or one.marker.evaluate()]


def test_every_requirement_is_locked_to_a_version_that_it_allows():
    locked = {}
    for line in LOCK.read_text().splitlines():
        if line and not line.startswith("#"):
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate():
                (locked[one.name],) = (specifier.version for specifier in one.specifier)
    asked = requirements()
    assert len(asked) > 20
    for one in asked:
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        assert name in locked, f"{name}: run `make lock`"
        assert one.specifier.contains(locked[name]), f"{one}: {locked[name]} is locked; run `make lock`"
