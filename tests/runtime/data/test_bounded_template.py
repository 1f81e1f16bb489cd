"""A chat template is a stranger's program: whatever it does ends, in bounded memory, with a text or with an
InputError.
"""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import byte_level_tokenizer

from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data import bounded_template
from tightfit.runtime.data.chat import ChatTemplate

TALK = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "It is."}]
TOKENIZER = byte_level_tokenizer()


def rendered(template: str, messages=TALK) -> str:
    return ChatTemplate(Vocabulary(tokenizer=TOKENIZER, chat_template=template)).render(
        messages, generation_prompt=False
    )


@pytest.fixture(autouse=True)
def bounded(monkeypatch):
    """Few steps, so that templates end soon; more memory than they may take, and a minute, end the test."""

    def late(*_):
        raise BaseException("still rendering")  # noqa: TRY002  not to be caught

    monkeypatch.setattr(bounded_template, "STEPS", 100_000)
    before, (_, hard) = resource.getrlimit(resource.RLIMIT_AS)[0], resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 30), hard))
    signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, (before, hard))


LARGE = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}",
    "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{% for x in range(99999) recursive %}{% if loop.depth < 9 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s * 9 %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s.replace('a', n.s) %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s | replace('a', n.s) %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s.join([n.s, n.s]) %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = [n.s, n.s] | join(n.s) %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = '%s%s' % (n.s, n.s) %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = '{0}{0}'.format(n.s) %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set t %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = t %}{% endfor %}",
    "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s | tojson }}",
    "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s | string | length }}",
    ("{% set n = namespace(s=[1], t=[1]) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% set n.t = [n.t, n.t] %}{% endfor %}"
    "{% if n.s == n.t %}{% endif %}"),
    "{% set n = namespace(s=(1,)) %}{% for i in range(99) %}{% set n.s = (n.s, n.s) %}{% endfor %}{% set d = {n.s: 1} %}",
    "{% set n = namespace(s=(1,)) %}{% for i in range(99) %}{% set n.s = (n.s, n.s) %}{% endfor %}{{ {1: 2}[n.s] }}",
    "{% set n = namespace(s=(1,)) %}{% for i in range(99) %}{% set n.s = (n.s, n.s) %}{% endfor %}{{ {1: 2}.get(n.s) }}",
    "{% set n = namespace() %}{% set n.s = [n] %}{{ n }}",
    "{% set n = namespace(s=3) %}{% for i in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "{{ 10 ** 10 ** 10 }}", "{{ 7 ** 999999999 }}", "{{ 9.0 ** 9999 }}", "{{ 'ab' * 9999999999 }}", "{{ [1] * 9999999999 }}",
    "{{ 9999999999 * 'ab' }}", "{{ 'a'.center(9999999999) }}", "{{ 'a'.zfill(9999999999) }}", "{{ 'a'.ljust(9999999999) }}",
    "{{ 'a' | center(9999999999) }}", "{{ 'a\nb' | indent(9999999999) }}", "{{ '%09999999999d' % 1 }}", "{{ '%*d' % (9999999999, 1) }}",
    "{{ '{:9999999999}'.format(1) }}", "{{ '{:{}}'.format(1, 9999999999) }}", "{{ '{x:>9999999999}'.format_map({'x': 1}) }}",
    "{{ [1] | tojson(indent=9999999999) }}", "{{ 1.5 | round(9999999999, 'ceil') }}", "{{ lipsum(9999999999) }}",
    "{{ [1] | batch(9999999999, 'x') | list }}", "{{ [1] | slice(9999999999) | list }}", "{{ (1).to_bytes(9999999999, 'big') }}",
    "{{ 'a'.encode().center(9999999999) }}", "{{ '\t'.expandtabs(9999999999) }}", "{{ 'a'.translate({97: 'bb'}) }}",
    "{% for i in range(99999) %}{% for c in 'ab' * 5000 %}{% endfor %}{% endfor %}",
    "{% set s = 'ab' * 40000 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "{% set s = 'ab' * 40000 %}{% for i in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "{% set s = 'ab' * 40000 %}{% for i in range(99999) %}{% if 'x' in s %}{% endif %}{% endfor %}",
    "{% set s = 'ab' * 40000 %}{% for i in range(99999) %}{% if 'x' is in s %}{% endif %}{% endfor %}",
    "{% set s = 'ab' * 40000 %}{% for i in range(99999) %}{% set t = s | upper %}{% endfor %}",
    "{% set s = 'ab' * 40000 %}{% for i in range(99999) %}{% set t = s.split('b') %}{% endfor %}",
    "{% for i in range(99999) %}{{ '" + "x" * 5000 + "' }}{% endfor %}",
    "{% for i in range(99999) %}" + "x" * 5000 + "{% endfor %}",
    "{{ range(99999) | map('string') | map('upper') | select | list | map('length') | list }}",
    "{% filter upper %}{% for i in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfilter %}",
]  # fmt: skip
FAILING = [
    "{{ 9.0 ** 60 ** 60 }}", "{{ 1 // 0 }}", "{{ 1 % 0 }}", "{{ messages[0].content.index('zz') }}", "{{ none() }}", "{{ x.y.z }}",
    "{{ messages.append(1) }}", "{{ messages.__class__ }}", "{{ ().__class__.__mro__ }}", "{{ [1] + 'a' }}", "{{ -'a' }}", "{{ 'a' - 1 }}",
    "{{ dict(1) }}", "{{ 1 < 'a' }}", "{{ {[1]: 2} }}", "{{ 'é' | int(base=99) }}", "{{ '%d' % 'a' }}", "{{ '{'.format() }}",
    "{{ '{0}'.format() }}", "{{ '\ud800' }}", "{{ [{}, {}] | sort }}", "{{ messages | tojson(indent='x', separators=3) }}",
    "{% include 'x' %}", "{% import 'x' as y %}", "{{ range(10 ** 9) }}", "{{ strftime_now(3) }}", "{{ raise_exception() }}",
    "{{ self.x() }}", "{{ joiner().x() }}", "{{ cycler() }}", "{{ 1 | nothing }}", "{{ 1 is nothing }}", "{% nothing %}", "{{", "{% for %}",
    "(" * 5000, "{{ " + "(" * 5000 + ")" * 5000 + " }}", "{{ " + "[" * 5000 + "]" * 5000 + " }}", "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "{{ 1" + " + 1" * 20000 + " }}", "{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "x" * ((1 << 20) + 1),
]  # fmt: skip


def renders_little_or_is_refused(template):
    try:
        text = rendered(template)
    except InputError as error:
        assert str(error).startswith("the model's chat template ")
    else:
        assert len(text) < 1 << 22


@pytest.mark.parametrize("template", [*LARGE, *FAILING])
def test_no_template_takes_for_ever_or_fails_otherwise(template):
    """Those of `LARGE` are refused by their count: what Python would make of them does not fit into the memory of the
    test.
    """
    renders_little_or_is_refused(template)


@pytest.mark.parametrize("template", [one for one in LARGE if "range(99" in one])
def test_what_is_too_much_is_told_with_its_line(template):
    with pytest.raises(
        InputError, match=r"\(it takes more time or memory than a template may\) in its line 3$|up to|\(there is no"
    ):
        rendered("\n\n" + template)


NUMBERS = st.sampled_from(["0", "1", "2", "64", "99999", "9999999999", "n.i", "(0 - 5)"])
TEXTS = st.recursive(
    st.sampled_from(["'ab'", "n.s", "messages[0].content", "n.l", "[n.l, n.l]", "messages", "{'a': n.l}", "(n.l, n.s)"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "~", "*", "%", "//", "**", "==", "in"]), inner | NUMBERS).map("({0[0]} {0[1]} {0[2]})".format),
        st.tuples(
            inner,
            st.sampled_from(
                ["upper", "list", "string", "tojson", "length", "join", "replace('a',n.s)", "join(n.s)", "indent(9)", "first", "last", "reverse", "map('string')", "sort", "unique", "int", "round", "items", "batch(9)", "center(99)", "wordcount", "dictsort", "default(n.s)", "selectattr('a')"]
            ),
        ).map("({0[0]} | {0[1]})".format),
        st.tuples(
            inner,
            st.sampled_from(
                ["replace('a',n.s)", "join(n.l)", "split('a')", "center(n.i)", "ljust(n.i)", "format(n.s)", "zfill(n.i)", "strip()", "items()", "get('a')", "splitlines()", "count('a')", "index(1)", "partition('a')", "title()", "encode()", "copy()"]
            ),
        ).map("{0[0]}.{0[1]}".format),
        st.tuples(inner, NUMBERS).map("{0[0]}[{0[1]}:]".format),
    ),
    max_leaves=4,
)  # fmt: skip
PROGRAMS = st.recursive(
    st.one_of(
        TEXTS.map("{{{{ {0} }}}}".format),
        TEXTS.map("{{% set n.s = {0} %}}".format),
        TEXTS.map("{{% set n.l = {0} %}}".format),
        NUMBERS.map("{{% set n.i = {0} * n.i + 2 %}}".format),
        st.just("{{ f(n.l) }}"),
    ),
    lambda inner: st.one_of(
        st.tuples(NUMBERS, inner, inner).map("{{% for x in range({0[0]}) %}}{0[1]}{0[2]}{{% endfor %}}".format),
        st.tuples(TEXTS, inner, inner).map("{{% for x in {0[0]} %}}{0[1]}{0[2]}{{% endfor %}}".format),
        st.tuples(inner, inner).map("{{% set n.s %}}{0[0]}{0[1]}{{% endset %}}".format),
        st.tuples(TEXTS, inner).map("{{% if {0[0]} %}}{0[1]}{{% endif %}}".format),
    ),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(PROGRAMS, st.lists(PROGRAMS, max_size=3))
def test_every_program_ends_with_a_text_or_an_input_error(inner, rest):
    template = (
        "{% set n = namespace(s='ab', l=[1], i=3) %}"
        f"{{% macro f(a) %}}{inner}{{% endmacro %}}{{% for y in range(50) %}}{''.join(rest)}{{% endfor %}}{{{{ f(n.s) }}}}"
    )
    renders_little_or_is_refused(template)


def test_long_conversations_are_rendered(monkeypatch):
    """The steps grow with what is rendered: a template that goes through everything some twenty times takes any
    length.
    """
    monkeypatch.setattr(bounded_template, "STEPS", 10_000)
    template = (
        "{% for m in messages %}" + "{% if '<x>' in m.content.strip() %}{{ m.content.split('<x>')[0] }}{% endif %}" * 8
    )
    template += "{{ m.role ~ m.content | trim }}{% endfor %}"
    long = [{"role": "user", "content": "word " * 2000}] * 100
    assert rendered(template, long) == ("user" + ("word " * 2000).strip()) * 100


def test_the_methods_and_filters_of_published_templates_are_there():
    """What the templates of Qwen3, Llama 3.1, Mistral, Gemma 3, SmolLM3 and gpt-oss ask for."""
    template = """{%- set ns = namespace(i=0, multi=true) -%}{%- for m in messages[::-1] -%}{%- set ns.i = ns.i + loop.index0 -%}{%- endfor -%}
{%- macro f(a, b='x') -%}{{ a | tojson(indent=4) }}{{ b }}{{ caller() if caller else '' }}{%- endmacro -%}
{%- for m in messages -%}{%- set c = m.content.split('</think>')[-1].lstrip('\\n').rstrip() -%}{{ loop.last }}{{ loop.length }}{{ loop.previtem is defined }}
{{- c | trim | upper | length }}{{ m | items | list | length }}{{ m.get('x', 'no') }}{{ '%s' % c }}{{ '{}!'.format(c) }}{{ "a" ~ 1 ~ c }}
{{- ['a', 'b'] | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ c.startswith('I') }}{{ c | replace('g', 'G') }}
{{- m is mapping }}{{ m.content is string }}{{ (m.role == 'user') != (loop.index0 % 2 == 0) }}{{ '-' * 3 }}{{ f(m) }}{{ strftime_now('%Y') }}
{{- m.keys() | list }}{{ messages | map(attribute='role') | unique | list }}{% if loop.index > 9 %}{{ raise_exception('no') }}{% endif %}
{%- endfor -%}{%- call f([1]) -%}called{%- endcall -%}{{ ns.i }}"""  # fmt: skip
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from tightfit.runtime.data.chat import DAY, _to_json

    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = _to_json
    plain.globals["strftime_now"] = DAY.strftime
    assert rendered(template) == plain.from_string(template).render(messages=TALK)
    assert isinstance(plain, jinja2.Environment)
