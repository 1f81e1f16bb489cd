"""Which PyTorch `make` installs: the build for the CPU where an index has it at once, and else what pip takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import venv
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from places import ROOT

WHEEL = "torch-2.13.0+cpu-py3-none-any.whl"
SECONDS = 60
"""which take in that the machine is busy: an index is given 15"""
FOLDER = "torch-2.13.0+cpu.dist-info"


@pytest.fixture
def python(tmp_path):
    """The Python of an environment with nothing but pip, borrowed from the tests' own."""
    venv.create(tmp_path / "environment", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    (tmp_path / "borrowed").mkdir()
    (tmp_path / "borrowed" / "pip").symlink_to(Path(find_spec("pip").origin).parent)
    (site / "pip.pth").write_text(f"{tmp_path / 'borrowed'}\n")
    return tmp_path / "environment" / "bin" / "python"


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("torch/version.py", "__version__ = '2.13.0+cpu'\n")
        archive.writestr("torch/__init__.py", "from torch.version import __version__\n")
        archive.writestr(f"{FOLDER}/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+cpu\n")
        archive.writestr(f"{FOLDER}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{FOLDER}/RECORD", "")
    return path


class Index:
    """An index of packages that has one PyTorch, or never answers (`hangs`)."""

    def __init__(self, wheel, *, hangs=False):
        self.asked = []
        index, ended = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                index.asked.append(self.path)
                if hangs:
                    ended.wait(600)
                    return
                page = f'<a href="/{WHEEL.replace("+", "%2B")}">{WHEEL}</a>'.encode()
                body = page if self.path == "/torch/" else wheel.read_bytes()
                self.send_response(200)
                self.send_header("Content-Type", "text/html" if body is page else "application/zip")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._ended, self._server = ended, ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()


def install(python, url, **variables):
    """Run the script as `make` does; what it says, and the version of PyTorch that is there then."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        ["sh", ROOT / ".ci" / "install-torch.sh", python, url],
        env=environment | {"PIP_CONFIG_FILE": "/dev/null"} | variables,
        capture_output=True, text=True, check=True, timeout=SECONDS,
    )  # fmt: skip
    found = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip(), found.stdout.strip()


def test_the_build_for_the_cpu_where_the_index_answers(python, wheel):
    with Index(wheel) as index:
        said = f"PyTorch: the build for the CPU, from {index.url}"
        assert install(python, index.url) == (said, "2.13.0+cpu")
        index.asked.clear()
        assert install(python, index.url) == ("", "2.13.0+cpu")  # there already
        assert index.asked == []


@pytest.mark.slow
def test_an_index_that_does_not_answer_is_not_waited_for(python, wheel):
    with Index(wheel, hangs=True) as index:
        said = f"PyTorch: the build that pip takes by itself, as {index.url} does not answer"
        assert install(python, index.url) == (said, "")
        assert index.asked == ["/torch/"]
    said = f"PyTorch: the build that pip takes by itself, as {index.url} does not answer"
    assert install(python, index.url) == (said, "")  # nobody listens there any more


def test_a_build_that_cannot_be_installed_leaves_it_to_pip(python, wheel):
    wheel.write_bytes(b"an error page")
    with Index(wheel) as index:
        said = f"PyTorch: the build that pip takes by itself, as none could be installed from {index.url}"
        assert install(python, index.url) == (said, "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PIP_EXTRA_INDEX_URL", "http://127.0.0.1:1/another"),
        ("PIP_FIND_LINKS", "wheels"),
        ("PIP_CONFIG_FILE", "[install]\nconstraint = versions.txt\n"),
    ],
)
def test_what_pip_is_told_is_left_as_it_is(name, value, python, wheel, tmp_path):
    if name == "PIP_CONFIG_FILE":
        (tmp_path / "pip.conf").write_text(value)
        value = str(tmp_path / "pip.conf")
    with Index(wheel) as index:
        said = "PyTorch: the build that pip's configuration leads to"
        assert install(python, index.url, **{name: value}) == (said, "")
        assert index.asked == []


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_installs_pytorch_before_what_needs_it(target, tmp_path):
    command = ["make", "--dry-run", target, f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}"]
    steps = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 0 < steps.index("-m venv") < steps.index("sh .ci/install-torch.sh") < steps.index("/pip install")
