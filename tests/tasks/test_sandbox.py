"""Templates render in bounded time, memory and depth; what prompts really use goes on as it did."""

from __future__ import annotations

import resource

import pytest

from amlora_dist.errors import UserError
from amlora_dist.tasks.prompts import PromptTemplate, compile_template, render_value, variables_of
from amlora_dist.tasks.texts import NoTextError

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) BODY %}x{% endfor %}{% endfor %}"
STEPS = "it takes too many steps, or makes too long a text"
NUMBER = "is the largest"
WIDTH = "a width that is too large"
INTO = "it calls macros or loops inside themselves without end"
GROW = "{% set x = 'xxxxxxxxxx' %}"
BOMBS = {
    "nested loops": (LOOPS.replace("BODY", ""), STEPS),
    "nested loops without a step": (LOOPS.replace("BODY", "if false"), STEPS),
    "a recursive loop": ("{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}", INTO),
    "a text multiplied": ("{{ 'x' * 10**9 }}", STEPS),
    "a list multiplied": ("{{ [1] * 10**9 }}", STEPS),
    "a power": ("{{ 2 ** (10**9) }}", "a number of thousands of digits"),
    "lorem ipsum": ("{{ lipsum(n=10**6) }}", "'lipsum' is undefined"),
    "a recursive macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", INTO),
    "a macro that branches": ("{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}", INTO),
    "a macro of much text": (
        "{% macro m() %}" + "x" * 9999 + "{% endmacro %}{% for i in range(9999) %}{{ m() }}{% endfor %}", STEPS
    ),
    "a text doubled by ~": (GROW + "{% set x = x ~ x %}" * 60 + "{{ x }}", STEPS),
    "a text doubled by +": (GROW + "{% set x = x + x %}" * 60 + "{{ x }}", STEPS),
    "a text doubled by blocks": (GROW + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60 + "{{ x }}", STEPS),
    "a text doubled in a loop": (
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}", STEPS
    ),
    "a list doubled": (GROW + "{% set x = [x, x] %}" * 60 + "{{ x }}", STEPS),
    "a dictionary doubled": (GROW + "{% set x = {'a': x, 'b': x} %}" * 60 + "{{ x }}", STEPS),
    "lists in lists": (
        "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
        "lists into lists",
    ),
    "a filter's width": ("{{ 'x' | center(10**9) }}", NUMBER),
    "a method's width": ("{{ 'x'.ljust(10**9) }}", NUMBER),
    "a block's width": ("{% filter center(10**9) %}x{% endfilter %}", NUMBER),
    "a percent's width": ("{{ '%1000000000s' % 'x' }}", WIDTH),
    "a percent's width by value": ("{{ '%*s' % (10**9, 'x') }}", WIDTH),
    "a width of the filter format": ("{{ '%1000000000s' | format('x') }}", WIDTH),
    "a width of the method format": ("{{ '{:{w}}'.format('x', w=10**9) }}", WIDTH),
    "many fills": ("{{ [1] | batch(10**9, 'x') | list }}", NUMBER),
    "many slices": ("{{ [1] | slice(10**9) | list }}", NUMBER),
    "spaces of JSON": ("{{ [1] * 999 | tojson(indent=10**6) }}", NUMBER),
    "a replacement that grows": (GROW + "{% set x = x * 999 %}{{ x.replace('x', x) | replace('x', x) }}", STEPS),
    "a join that grows": ("{{ range(99999) | map('string') | join('x' * 9999) }}", STEPS),
    "tabs": ("{{ ('\t' * 99999).expandtabs(1000) }}", STEPS),
    "a search that is quadratic": ("{% set x = 'a' * 400000 %}{{ x.rfind('b' ~ 'a' * 200000) }}", STEPS),
    "a comparison that is long": (
        "{% set x = 'a' * 500000 %}{% set y = 'a' * 500000 %}{% for i in range(9999) %}{{ x == y }}{% endfor %}", STEPS
    ),
    "slices of a long text": (
        "{% set x = 'a' * 500000 %}{% for i in range(9999) %}{% set y = x[1:] %}{% endfor %}", STEPS
    ),
    "a refund": ("{{ [1] | map('tick ', -10**9) | list }}" + LOOPS.replace("BODY", ""), NUMBER),
    "too many brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "too much of it inside each other"),
    "too many blocks": ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "too much of it inside each other"),
    "too many digits": ("{{ " + "9" * 5000 + " }}", "too long a number"),
    "blocks that call themselves": ("{% block a %}{{ self.a() }}{% endblock %}", "may not use templates inside templates"),
    "an unknown filter": ("{{ text | urlize }}", "may not use the filter 'urlize'"),
    "attributes by filter": ("{{ text | attr('__class__') }}", "may not use the filter 'attr'"),
    "half of a character": (r"{{ '\ud83d' }}", "half of a character"),
    "a macro as text": ("{% macro m() %}{% endmacro %}{{ m }}", "found a value of type Macro"),
    "an iterator as text": ("{{ [1] | map('string') }}", "found a value of type generator"),
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_template_bomb_is_reported_in_one_message_within_bounds(case: str) -> None:
    source, message = BOMBS[case]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="prompt template of") as caught:
        PromptTemplate(source, task="colours").render_text("It rains.")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10, "bounded memory (KiB)"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for one in options %}{{ loop.index }}. {{ one }}\n{% endfor %}", "1. wet\n2. dry\n"),
        ("{% for one in options if one != 'dry' %}{{ one }}{% else %}none{% endfor %}", "wet"),
        ("{{ options | join(', ') }} {{ options | map('upper') | join('/') }} {{ options | length }}", "wet, dry WET/DRY 2"),
        ("{% set n = namespace(k=0) %}{% for one in options %}{% set n.k = n.k + 1 %}{% endfor %}{{ n.k }}", "2"),
        ("{% macro line(x) %}- {{ x }}{% endmacro %}{{ line(text) }} {{ text ~ 1 }}", "- It rains. It rains.1"),
        ("{{ text.upper().strip('.') }} {{ text | wordcount }} {{ text[:2] }}", "IT RAINS 2 It"),
        ("{{ '%s|%5.1f' % (kind, 2) }} {{ '{:>4}'.format(kind) }} {{ '%s' | format(1) }}", "sky|  2.0  sky 1"),
        ("{{ fields.get('a', 'none') }} {{ fields | tojson }} {{ question or 'no question' }}", "none {} no question"),
        ("{% if 'rain' in text and question is none %}yes{% endif %}", "yes"),
        ("{% for k in range(3) %}{{ loop.cycle('a', 'b') }}{{ ', ' if not loop.last }}{% endfor %}", "a, b, a"),
        ("{{ options }} {{ none }} {{ 2 ** 10 }} {{ 7 // 2 }}", "['wet', 'dry'] None 1024 3"),
    ],
)
def test_templates_that_prompts_use_render_as_jinja_renders_them(source: str, text: str) -> None:
    made = PromptTemplate(source, task="weather", options=["wet", "dry"], kind="sky")
    assert made.render_text("It rains.") == text


def test_work_grows_with_the_text_so_that_a_long_one_is_no_bomb() -> None:
    text = "word " * 1_000_000
    assert PromptTemplate("{{ text | trim | replace('\n', ' ') }}!").render_text(text) == text.rstrip() + "!"
    labels = [f"label {number}" for number in range(1000)]
    options = PromptTemplate("{% for one in options %}{{ one | title }}, {% endfor %}{{ text }}", options=labels)
    assert options.render_text(text).endswith("Label 999, " + text)


def test_one_bomb_leaves_the_next_template_its_whole_budget() -> None:
    good = PromptTemplate("{% for k in range(9999) %}x{% endfor %}")
    for _ in range(30):
        with pytest.raises(UserError):
            PromptTemplate("{{ 'x' * 10**9 }}").render_text("")
        assert good.render_text("") == "x" * 9999


def test_value_over_columns_writes_texts_and_numbers_only() -> None:
    def value(source: str, **columns: object) -> str:
        return render_value(compile_template(source, where="here"), columns, where="here")

    assert value("{{ a }} {{ b }} {{ c.text[0] }}{{ d }}", a="x", b=2, c={"text": ["y"]}, d=None) == "x 2 y"
    for source, found in (("{{ c }}", "a dictionary"), ("{{ c.text }}", "a list"), ("{{ c.text ~ 'x' }}", "a list")):
        with pytest.raises(NoTextError, match=found):
            value(source, c={"text": ["y"]})


def test_variables_of_a_template_are_those_it_reads_from_outside() -> None:
    assert variables_of("{{ a }}{% for x in b.c if d %}{{ x ~ e[0] }}{% endfor %}") == {"a", "b", "d", "e"}
    assert variables_of("{{ a") == set()
