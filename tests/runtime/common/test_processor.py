"""What the kernel tells of the processor, on machines that are not here."""

from __future__ import annotations

import io

import pytest

from tightfit.runtime.common import processor

X86 = "processor\t: 0\nmodel name\t: AMD EPYC 7B13\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nmodel name\t: other\nflags\t\t: fpu\n"
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd bf16 svebf16\nCPU implementer\t: 0x41\n"


@pytest.fixture
def told(monkeypatch):
    """Have /proc/cpuinfo say `text`; None: there is none."""

    def say(text):
        def opened(path, **_):
            assert path == "/proc/cpuinfo"
            if text is None:
                raise FileNotFoundError(path)
            return io.StringIO(text)

        monkeypatch.setattr(processor, "open", opened, raising=False)
        processor.features.cache_clear()

    yield say
    processor.features.cache_clear()


def test_x86_by_its_first_processor(told):
    told(X86)
    assert processor.features() == {"fpu", "avx2", "fma"}
    assert processor.cpu_name() == "AMD EPYC 7B13"


def test_arm_names_features_and_no_model(told):
    told(ARM)
    assert processor.features() == {"fp", "asimd", "bf16", "svebf16"}
    assert processor.cpu_name()


def test_no_such_file(told):
    told(None)
    assert processor.features() == frozenset()
    assert processor.cpu_name()
