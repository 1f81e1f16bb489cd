from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import (
    FEWEST_UNSAID,
    KIB,
    LARGEST,
    MIB,
    format_seconds,
    format_size,
    parse_rate,
    parse_seconds,
    parse_size,
    printable,
)

FORMS = "write plain bytes (367001600), 350MB, 1.5GB (powers of 1000) or 350MiB, 1.5GiB (powers of 1024)"
RATES = "write 100Mbit/s, 1Gbit/s, 12.5MB/s (powers of 1000) or 12MiB/s (powers of 1024)"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("367001600", 367_001_600),
        ("600MB", 600_000_000),
        ("600MiB", 600 * MIB),
        ("600 mib", 600 * MIB),
        (" 1.5GiB ", 3 << 29),
        ("1.5GB", 1_500_000_000),
        ("2TB", 2 * 10**12),
        ("64kB", 64_000),
        ("64KiB", 65_536),
        ("7B", 7),
        ("0.1MiB", 104_857),
        (str(LARGEST), LARGEST),
    ],
)
def test_parses(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MiB",
        "350M",
        "350 MiBs",
        "-1",
        "+1",
        "1e9",
        "0x10",
        "1,000MB",
        "1.5",
        "1.5B",
        ".5GB",
        "5.GB",
        "nan",
        "inf",
        "３５０MiB",
    ],
)
def test_rejects_other_forms(text):
    with pytest.raises(InputError) as caught:
        parse_size(text)
    assert str(caught.value) == f"{text!r} is not a size; {FORMS}"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["0", "0MiB", "0.0000001kB"])
def test_rejects_nothing(text):
    with pytest.raises(InputError) as caught:
        parse_size(text)
    assert str(caught.value) == f"{text!r} is no memory at all; {FORMS}"


@pytest.mark.parametrize("text", [str(LARGEST + 1), "9000000000TiB", "9" * 30])
def test_rejects_more_than_an_address_space(text):
    with pytest.raises(InputError) as caught:
        parse_size(text)
    assert str(caught.value) == f"{text!r} is more than any machine can address; {FORMS}"


@given(st.integers(1, LARGEST))
def test_plain_bytes_round_trip(size):
    assert parse_size(f"{size}B") == size
    assert size < FEWEST_UNSAID or parse_size(str(size)) == size


@pytest.mark.parametrize("text", ["300", "1", str(FEWEST_UNSAID - 1)])
def test_a_small_number_without_a_unit_is_asked_about(text):
    """Nobody trains in 300 bytes: the plan was refused as one that does not fit them."""
    with pytest.raises(InputError) as caught:
        parse_size(text)
    assert str(caught.value) == f"{text!r} has no unit: {text}MiB? write {text}MiB, or {text}B for so few bytes"


@given(st.integers(1, 1 << 50))
def test_printed_size_is_within_half_a_tenth(size):
    number, unit = format_size(size).split()
    whole = {"MiB": MIB, "KiB": KIB, "B": 1}[unit]
    assert abs(float(number) - size / whole) <= 0.05 + size / whole * 1e-12


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (-12, "-12 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (MIB, "1.0 MiB")]
)
def test_small_sizes_are_not_nothing(size, text):
    assert format_size(size) == text


@given(st.integers(1, 1 << 50))
def test_rounded_up_size_covers_and_parses_back(size):
    printed = parse_size(format_size(size, round_up=True))
    assert size <= printed
    assert printed - size < MIB / 10 + 1


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("100Mbit/s", 12_500_000.0),
        (" 100 mbit / s ", 12_500_000.0),
        ("1Gbit/s", 125_000_000.0),
        ("2.5kbit/s", 312.5),
        ("9bit/s", 1.125),
        ("12.5MB/s", 12_500_000.0),
        ("12MiB/s", 12.0 * MIB),
        ("1GiB/s", float(1 << 30)),
        ("7B/s", 7.0),
    ],
)
def test_parses_rates(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text",
    [
        "",
        "100",
        "100Mbit",
        "100Mbps",
        "100Mb/s",
        "100mb/s",
        "100MB",
        "MB/s",
        "100 /s",
        "-1MB/s",
        "1e3MB/s",
        "1MB/h",
        "１MB/s",
    ],
)
def test_rejects_what_is_no_rate(text):
    with pytest.raises(InputError) as caught:
        parse_rate(text)
    assert str(caught.value) == f"{text!r} is not a rate; {RATES}"


def test_rejects_rates_that_no_link_has():
    with pytest.raises(InputError) as caught:
        parse_rate("0Mbit/s")
    assert str(caught.value) == f"'0Mbit/s': nothing passes over such a link; {RATES}"
    with pytest.raises(InputError, match="'10000000000GB/s' is more than any link carries"):
        parse_rate("10000000000GB/s")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2ms", 0.002),
        (" 0.5 s ", 0.5),
        ("150us", 150e-6),
        ("150µs", 150e-6),
        ("150μs", 150e-6),
        ("40ns", 40e-9),
        ("0s", 0.0),
    ],
)
def test_parses_times(text, seconds):
    assert parse_seconds(text) == pytest.approx(seconds, rel=1e-15)


@pytest.mark.parametrize("text", ["", "2", "ms", "2MS", "2 min", "-2ms", "1e-3s", "2m", "nan", "２ms"])
def test_rejects_what_is_no_time(text):
    with pytest.raises(InputError) as caught:
        parse_seconds(text)
    assert str(caught.value) == f"{text!r} is not a time; write 2ms, 150us or 0.5s"


@given(st.text(max_size=12))
def test_never_anything_but_a_size_or_an_input_error(text):
    try:
        size = parse_size(text)
    except InputError as error:
        assert repr(text) in str(error)
    else:
        assert 0 < size <= LARGEST


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.65, "2.650 s"), (0.0123, "0.012 s"), (0.00412, "0.00412 s"), (0.001, "0.00100 s"), (0.0, "0.000 s")],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(40e-6, "40 µs"), (41e-6, "41 µs"), (1.25e-6, "1.25 µs"), (999.4e-6, "999.4 µs"), (3e-9, "0.003 µs")],
)
def test_microseconds_are_told_apart(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a µ → b", "a µ → b"), ("\x1b[31mRED\x1b[2J", r"\x1b[31mRED\x1b[2J"), ("x\ny\u202e", r"x\ny\u202e")],
)
def test_what_a_terminal_would_obey_is_written_out(text, shown):
    assert printable(text) == shown
