from __future__ import annotations

import pytest
from synthetic import small_chain

from tightfit.planner.fleet.description import read_description
from tightfit.planner.fleet.schema import Link
from tightfit.profiles.io import save_profile
from tightfit.profiles.options import MOST_ACCUMULATED
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import MIB

WHOLE = """
micro_batches = 16

[[member]]
name = "laptop"
profile = "profiles/laptop.json"
memory = "320MiB"
link = "100Mbit/s"
latency = "2ms"

[[member]]
name = "phone"
profile = "phone.json"
memory = 262144000
up = "20Mbit/s"
down = "10MB/s"
"""
MEMBER = """
[[member]]
name = "laptop"
profile = "phone.json"
memory = "320MiB"
link = "1MB/s"
"""


@pytest.fixture(scope="module")
def profile():
    return small_chain(3, layers=2)


@pytest.fixture
def read(tmp_path, profile):
    """Reads a description that is given as text, beside two profiles."""
    (tmp_path / "profiles").mkdir()
    save_profile(profile, tmp_path / "profiles" / "laptop.json")
    save_profile(profile, tmp_path / "phone.json")

    def call(text, micro_batches=None):
        (tmp_path / "fleet.toml").write_bytes(text.encode() if isinstance(text, str) else text)
        found = read_description(tmp_path / "fleet.toml", micro_batches=micro_batches)
        assert not found.of_rounds
        return found.members, found.count

    return call


@pytest.fixture
def refused(read, tmp_path):
    """What is said of a description that is refused, after the file's name."""

    def call(text):
        with pytest.raises(InputError) as caught:
            read(text)
        named, _, told = str(caught.value).partition(": ")
        assert named == str(tmp_path / "fleet.toml")
        return told.replace(str(tmp_path), "HERE")

    return call


def test_a_whole_description(read, profile):
    (laptop, phone), micro_batches = read(WHOLE)
    assert micro_batches == 16
    assert (laptop.name, laptop.profile, laptop.budget_bytes) == ("laptop", profile, 320 * MIB)
    assert laptop.link == Link(up_bytes_per_second=12.5e6, down_bytes_per_second=12.5e6, latency_seconds=0.002)
    assert (phone.name, phone.budget_bytes) == ("phone", 262_144_000)
    assert phone.link == Link(up_bytes_per_second=2.5e6, down_bytes_per_second=1e7, latency_seconds=0.0)


def test_members_with_one_profile_share_it(read):
    members, _ = read(f"micro_batches = 1{MEMBER}{MEMBER.replace('laptop', 'desk')}")
    assert members[0].profile is members[1].profile


def test_another_number_of_micro_batches_can_be_asked_for(read):
    assert read(WHOLE, 5)[1] == 5
    assert read(MEMBER, 5)[1] == 5
    with pytest.raises(InputError, match=r"^'micro_batches' is 0; give a whole number from 1 to 65536$"):
        read(WHOLE, 0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (MEMBER, "'micro_batches' is missing; say how many make a step, as in micro_batches = 16"),
        ("micro_batches = 4", "it names no member; describe each device of the fleet under a line [[member]]"),
        ("micro_batches = 4\nmember = []", "it names no member; describe each device of the fleet under a line [[member]]"),
        ("micro_batches = 4\n[member]\nname = 'a'", "it names no member; describe each device of the fleet under a line [[member]]"),
        ("micro_batch = 4" + MEMBER, "no key is called 'micro_batch'; there are micro_batches, steps, member, server"),
        *(
            (f"micro_batches = {value}{MEMBER}", f"'micro_batches' is {shown}; give a whole number from 1 to {MOST_ACCUMULATED}")
            for value, shown in (("0", "0"), ("true", "True"), ("2.0", "2.0"), ("'4'", "'4'"), ("65537", "65537"))
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_whole_is_named(refused, text, told):
    assert refused(text) == told


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('name = "laptop"\n', "", "member 1: 'name' is missing; give a name, as in name = \"laptop\""),
        ('name = "laptop"', "name = 7", "member 1: 'name' is 7, not a text in quotes; give a name, as in name = \"laptop\""),
        ('"laptop"', '"a/b"', "member 'a/b': 'name': 'a/b' is no name for files; use letters, digits, '-' and '_', and '.' inside"),
        ('"laptop"', '"laptop\\n"', "member 'laptop\\n': 'name': 'laptop\\n' is no name for files; use letters, digits, '-' and '_', and '.' inside"),
        ('"laptop"', f'"{"n" * 101}"', f"member '{'n' * 101}': 'name': '{'n' * 101}' is no name for files; use letters, digits, '-' and '_', and '.' inside"),
        ('profile = "phone.json"\n', "", "member 'laptop': 'profile' is missing; give the file of its profile: profile = \"laptop.json\""),
        ("phone.json", "x.json", "member 'laptop': 'profile': HERE/x.json: No such file or directory; make a profile with `tightfit profile MODEL -o HERE/x.json`"),
        ('memory = "320MiB"\n', "", "member 'laptop': 'memory' is missing; give the budget of its processes: memory = \"320MiB\""),
        ("320MiB", "320M", "member 'laptop': 'memory': '320M' is not a size; write plain bytes (367001600), 350MB, 1.5GB (powers of 1000) or 350MiB, 1.5GiB (powers of 1024)"),
        ('"320MiB"', "true", "member 'laptop': 'memory' is True, not a text in quotes; give the budget of its processes: memory = \"320MiB\""),
        ('"320MiB"', "0", "member 'laptop': 'memory': '0' is no memory at all; write plain bytes (367001600), 350MB, 1.5GB (powers of 1000) or 350MiB, 1.5GiB (powers of 1024)"),
        ('link = "1MB/s"\n', "", "member 'laptop': 'up' is missing; give the bandwidth of its connection: link = RATE, or up = RATE and down = RATE where they differ"),
        ("link =", "up =", "member 'laptop': 'down' is missing; give the bandwidth of its connection: link = RATE, or up = RATE and down = RATE where they differ"),
        ("1MB/s", "1Mb/s", "member 'laptop': 'link': '1Mb/s' is not a rate; write 100Mbit/s, 1Gbit/s, 12.5MB/s (powers of 1000) or 12MiB/s (powers of 1024)"),
        ('link = "1MB/s"', 'link = "1MB/s"\nup = "1MB/s"', "member 'laptop': 'link' is for both ways, so 'up' and 'down' cannot stand beside it; give the bandwidth of its connection: link = RATE, or up = RATE and down = RATE where they differ"),
        ('link = "1MB/s"', 'link = "1MB/s"\nlatency = 0.002', "member 'laptop': 'latency' is 0.002, not a text in quotes; give a time: latency = \"2ms\""),
        ('link = "1MB/s"', 'link = "1MB/s"\nlatency = "2"', "member 'laptop': 'latency': '2' is not a time; write 2ms, 150us or 0.5s"),
        ("memory =", "memry =", "member 'laptop': no key is called 'memry'; there are name, profile, memory, link, up, down, latency, weight"),
        (MEMBER, MEMBER + MEMBER, "member 'laptop': another member has the same 'name'; each needs a name of its own"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_member_is_named(refused, old, new, told):
    assert old in MEMBER
    assert refused(f"micro_batches = 4{MEMBER.replace(old, new)}") == told


def test_the_member_that_is_wrong_is_named(refused):
    second = MEMBER.replace("laptop", "phone").replace("320MiB", "much")
    assert refused(f"micro_batches = 4{MEMBER}{second}").startswith("member 'phone': 'memory': 'much' is not a size")


def test_what_is_no_description(read, refused, tmp_path):
    assert refused("micro_batches = ").startswith("not TOML (Invalid value")
    assert refused(b"\xff") == "byte 0 is not text; write the description of the fleet as TOML"
    assert refused("a = " + "[" * 100_000).startswith("not TOML")
    with pytest.raises(
        InputError, match=r"none.toml: No such file or directory; `tightfit fleet plan --help` says what"
    ):
        read_description(tmp_path / "none.toml")
    with pytest.raises(InputError, match="Is a directory"):
        read_description(tmp_path)
