"""Limits of the shell: each command runs in a process of its own under one, and what it tells is looked at."""

import json
import resource
import subprocess
import sys

import pytest
from places import ROOT

from tightfit.runtime.common import limits
from tightfit.runtime.common.limits import allocating, limited, memory_advice
from tightfit.runtime.common.units import MIB

TOLD = "the address space of this process is limited to {} (ulimit -v {})"
WAY = ", and PyTorch and the solvers reserve far more than they use; start it from a shell without this limit"


def under(size, *words, cwd=ROOT, program=("-m", "tightfit.runtime.cli.main")):
    return subprocess.run(
        [sys.executable, *program, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "words",
    [
        ("profile", "examples/models/nothing", "--json"),
        ("plan", "examples/bare-graph.json", "--memory", "1GiB", "--json"),
        ("compare", "examples/bare-graph.json", "--memory", "1GiB", "--json"),
    ],
    ids=lambda words: words[0],
)
def test_a_command_that_cannot_load_its_libraries_says_which_limit_keeps_it_from_it(words):
    """Of 200 MiB not one of them loads PyTorch or a solver. (`run` needs neither before its training process
    starts.)
    """
    ended = under(200 * MIB, *words)
    error = json.loads(ended.stdout)["error"]
    told = TOLD.format("200.0 MiB", 204800)
    assert error["message"] == f"memory could not be had ({error['kind']}); {told}{WAY}"
    assert ended.returncode == error["exit_code"] == 4
    first, last = ended.stderr.splitlines()
    assert first == f"tightfit: {told}, hardly enough to load PyTorch and a solver"
    assert last == f"tightfit: {error['message']}"


CHILD_FAILS = """
import sys
from tightfit.runtime.common.errors import RunError
from tightfit.runtime.cli import main
from tightfit.runtime.session import launch

def prepared(*arguments, **options):
    raise RunError("the training process was ended by SIGABRT: what(): std::bad_alloc; no checkpoint was saved yet")

launch.prepared = prepared
main.main(sys.argv[1:])
"""


def test_what_a_run_s_process_dies_of_is_told_with_the_limit_that_it_inherits(work, tmp_path):
    words = ("run", work / "plan.json", "--data", "random", "--steps", 1, "-o", tmp_path / "out")
    ended = under(3072 * MIB, *words, program=("-c", CHILD_FAILS))
    died = "the training process was ended by SIGABRT: what(): std::bad_alloc; no checkpoint was saved yet"
    assert ended.stderr.splitlines()[-1] == f"tightfit: {died}; {TOLD.format('3072.0 MiB', 3145728)}{WAY}"
    assert "hardly" not in ended.stderr
    assert ended.returncode == 4


@pytest.fixture
def limit(monkeypatch):
    """Let `ulimit -v` and `-d` be these."""

    def be(space=resource.RLIM_INFINITY, data=resource.RLIM_INFINITY):
        found = {resource.RLIMIT_AS: space, resource.RLIMIT_DATA: data}
        monkeypatch.setattr(limits.resource, "getrlimit", lambda number: (found[number], found[number]))

    return be


def test_without_a_limit_nothing_is_told(limit):
    limit()
    assert limited() is limited(hardly_enough=True) is None
    assert memory_advice("MemoryError: ", unexpected=True) is None


def test_the_limit_that_there_is_is_told(limit):
    limit(data=100 * MIB)
    assert (
        limited()
        == limited(hardly_enough=True)
        == "the data segment of this process is limited to 100.0 MiB (ulimit -d 102400)"
    )
    limit(space=1 << 40, data=400 * MIB)
    assert limited() == "the address space of this process is limited to 1048576.0 MiB (ulimit -v 1073741824)"
    assert limited(hardly_enough=True) is None


def test_an_error_of_another_kind_is_no_lack_of_memory_unless_the_limit_was_nearly_reached(limit):
    limit(space=1 << 50)
    assert memory_advice("KeyError: 'x'", unexpected=True) is None
    assert memory_advice("OSError: [Errno 12] Cannot allocate memory", unexpected=False) == f"{limited()}{WAY}"
    limit(space=1 * MIB)  # far below what this process holds
    assert memory_advice("SystemError: error return without exception set", unexpected=True) == f"{limited()}{WAY}"
    assert memory_advice("InputError: no such file", unexpected=False) is None


def test_who_asks_for_more_than_is_allowed_gets_no_memory():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with allocating(64 * MIB):
        bytearray(32 * MIB)
        with allocating(1 << 40), pytest.raises(MemoryError):
            bytearray(128 * MIB)
        with pytest.raises(MemoryError):
            bytearray(128 * MIB)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    bytearray(128 * MIB)
