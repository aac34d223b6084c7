"""Whatever a template does, it ends soon and small."""

import resource
import threading
import time
from datetime import UTC, datetime
from itertools import count

import pytest

from text.sandbox import Limits
from text.template import ChatTemplate, TemplateError

NOW = datetime(2025, 3, 4, tzinfo=UTC)
LIMITS = Limits(time_s=0.15)


def grow(step: str, start: str = "'ab'") -> str:
    """A template that does something sixty times to `ns.x`."""
    loop = "{% set ns = namespace(x=" + start + ") %}{% for i in range(60) %}"
    return loop + step + "{% endfor %}"


SLOW = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(9999) %}{{ j if i > j }}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "{% for i in range(9) recursive %}{{ loop(range(9)) if loop.depth < 99 }}{% endfor %}",
    "{% set b = range(99999)|list %}{{ range(99999)|reject('in', b)|list }}",
    "{% set b = range(99999)|list %}{% for i in range(99999) if -i in b %}{% endfor %}",
    "{% set b = range(99999)|list %}{% for i in range(99999) if b == b[1:] + [i] %}{% endfor %}",
    "{{ range(99999)|batch(1)|sum(start=[]) }}",
    "{{ ('a ' * 8000000)|title }}",
    "{{ ('a ' * 8000000)|sort }}",
    "{{ 1.5|round(10**9, 'ceil') }}",
    "{{ 9 ** (9 ** 9) }}",
]
LARGE = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{{ 10**9 * ['x'] }}",
    "{{ 'x'|center(10**9) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'['ljust'](10**9) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d'|format(10**9, 1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10**9) }}",
    "{{ [1]|batch(10**9, 0)|list }}",
    "{{ [1]|slice(10**9)|list }}",
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ 'a'|indent(10**9, true) }}",
    "{{ [[1]]|tojson(indent=10**9) }}",
    "{% autoescape 'x'|center(10**10) %}{{ 'x' * 10**10 }}{% endautoescape %}",
    "{% for i in range(99999) %}{{ 'x' * 1000000 }}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{% for j in range(9999) %}" + "x" * 9999 + "{% endfor %}"
    "{% endfor %}{% endset %}",
    grow("{% set ns.x = ns.x ~ ns.x %}"),
    grow("{% set ns.x = ns.x + ns.x %}"),
    grow("{% set ns.x = ns.x * 2 %}"),
    grow("{% set ns.x = ns.x * ns.x %}", start="12"),
    grow("{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x }}",
    grow("{% set ns.x = (ns.x, ns.x) %}") + "{{ ns.x == [ns.x] }}",
    grow("{% set ns.x = {'a': ns.x, 'b': ns.x} %}") + "{{ ns.x|tojson }}",
    grow("{% set ns.x = dict(a=ns.x, b=ns.x) %}") + "{{ ns.x }}",
    grow("{% set ns.x = namespace(a=ns.x, b=ns.x) %}") + "{{ ns.x }}",
    grow("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    grow("{% set ns.x = ns.x.replace('a', ns.x) %}"),
    grow("{% set ns.x = ns.x|replace('a', ns.x) %}"),
    grow("{% set ns.x = ns.x.join([ns.x, ns.x, ns.x]) %}"),
    grow("{% set ns.x = '{0}{0}'.format(ns.x) %}"),
    grow("{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("source", SLOW + LARGE)
def test_it_ends_within_a_second_and_without_much_memory(source: str) -> None:
    template = ChatTemplate({"default": source}, {}, limits=LIMITS)
    started, memory = time.thread_time(), peak_bytes()

    with pytest.raises(TemplateError) as error:
        template.render([], now=NOW)

    assert "\n" not in str(error.value)
    assert time.thread_time() - started < 1
    assert peak_bytes() - memory < 300_000_000


def test_time_is_what_the_given_clock_says() -> None:
    ticks = count()
    source = "{% for i in range(9999) %}{% endfor %}done"

    slow = ChatTemplate({"default": source}, {}, clock=lambda: float(next(ticks)))
    still = ChatTemplate({"default": source}, {}, clock=lambda: 0.0)

    with pytest.raises(TemplateError, match=r"takes longer than 0\.5 s"):
        slow.render([], now=NOW)
    assert still.render([], now=NOW) == "done"


def test_long_honest_prompts_are_rendered() -> None:
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}{{ m | tojson }}<|end|>{% endfor %}"
    )
    template = ChatTemplate({"default": source}, {})
    many = [{"role": "user", "content": "hello world"}] * 3_000
    long = [{"role": "user", "content": "word " * 300_000}]

    assert len(template.render(many, now=NOW)) > 60_000
    assert len(template.render(long, now=NOW)) > 4_000_000


def test_output_has_a_limit_of_its_own() -> None:
    template = ChatTemplate(
        {"default": "{{ 'x' * 90 }}{{ 'y' * 20 }}"}, {}, limits=Limits(max_chars=100)
    )

    with pytest.raises(TemplateError, match="longer than 100 characters"):
        template.render([], now=NOW)


def test_renderings_in_several_threads_have_budgets_of_their_own() -> None:
    template = ChatTemplate({"default": "{% for i in range(500) %}{{ i % 10 }}{% endfor %}"}, {})
    texts: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: texts.extend(template.render([], now=NOW) for _ in range(20))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert texts == ["0123456789" * 50] * 80
