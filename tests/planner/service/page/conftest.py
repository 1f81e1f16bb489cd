"""What the browser tests of the page's places share.

Pictures are kept in the folder that TIGHTFIT_PICTURES names, or in the test's own.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from places_of_the_page import serving
from synthetic import decoder_like


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A service of this file's tests, with an open folder that is empty."""
    with serving(tmp_path_factory.mktemp("page"), tmp_path_factory.mktemp("root")) as service:
        yield service


@pytest.fixture(scope="module")
def decoder(served):
    """The id of a profile that is uploaded to it: a decoder of two layers, whose curve takes seconds."""
    return served.upload(decoder_like(2))


@pytest.fixture
def measuring(tmp_path, work, measured):
    """A service that has measured the tiny model before, so that it measures another adapter of it sooner; its open
    folder is `work`.
    """
    shutil.copytree(measured, tmp_path / "data")
    with serving(tmp_path, work) as service:
        yield service


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = Path(os.environ.get("TIGHTFIT_PICTURES") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
