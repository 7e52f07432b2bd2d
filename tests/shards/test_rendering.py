"""A chat template is rendered as transformers renders it, and has no time and memory but what a conversation needs."""

import signal
import threading
import time
from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from gpt2x.tokenizers import rendering
from gpt2x.tokenizers.rendering import TemplateBoundError, compiled, render

TEMPLATES = [file.read_text() for file in sorted((Path(__file__).parents[2] / "tokenization").glob("*.jinja"))]
ORDINARY = [
    *TEMPLATES,
    "{{ bos_token }}{% for m in messages %}{{ '%s: %-9s|' % (m.role, m.content) }}{{ 'x' * 20 }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 ** 3 %}{{ ns.n }}{% endfor %}",
    "{{ messages | map(attribute='content') | join(' / ') | replace('a', 'bb') | indent(2) }}{{ 7 % 4 }}",
    "{{ messages | tojson(indent=2) }}{{ '{:>9}|{}'.format('x', messages[0].content) }}{{ 1700000000 | string }}",
    "{% set x %}{% for m in messages %}{{ m.content | trim | upper }}{% endfor %}{% endset %}{{ x.replace('A', '') }}",
    "{% for m in messages %}{% generation %}{{ m.content }}1234{% endgeneration %}{% endfor %}{{ '%d' | format(3) }}",
    "{% macro f(x) %}[{{ x.content.split('a') | join('1234567') }}]{% endmacro %}{{ f(messages[0]) ~ 1 }}",
    "{{ messages[0].content.ljust(9) }}{{ ', '.join(['a', 'b'] * 2) }}{{ range(3) | list }}{% if tools %}t{% endif %}",
]
CHAT = [{"role": "user", "content": " a 12345678 ünï \n{{ x }} "}, {"role": "assistant", "content": "banana\n"}]

AT_A_STROKE = [
    "{{ 'a' * 4000000000 }}",
    "{{ 4000000000 * 'a' }}",
    "{% set n = 4000000000 %}{{ 'a' * n }}",
    "{{ ['a'] * 4000000000 }}",
    "{{ 9 ** 9999999999 }}",
    "{% set n = namespace(x=9) %}{% for i in range(90) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x % 7 }}",
    "{{ '%4000000000d' % 1 }}",
    "{{ '%4000000000d' | format(1) }}",
    "{{ '%*d' % (4000000000, 1) }}",
    "{{ '{:4000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=4000000000) }}",
    "{{ 'a'.ljust(4000000000) }}",
    "{{ 'a' | center(4000000000) }}",
    "{{ 'a\n' | indent(4000000000) }}",
    "{{ [1] | batch(4000000000, 'x') | list }}",
    "{{ [1] | tojson(indent=4000000000) }}",
    "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
    "{% set x = 'a' * 1000000 %}{{ x | replace('a', x) }}",
    "{% set x = 'a' * 1000000 %}{{ x.join(range(100000) | map('string')) }}",
    "{% set x = 'a' * 1000000 %}{{ ([x] * 100000) | join }}",
    "{% set x = 'a' * 1000000 %}{{ ''.join([x] * 100000) }}",
    "{% set x = 'a' * 1000000 %}{% set y %}{% for i in range(100000) %}{{ x }}{% endfor %}{% endset %}",
    "{% set x = 'a' * 1000000 %}{% for i in range(100000) %}{{ x }}{% endfor %}",
    "{% set x = 'a' * 1000000 %}{{ ('%s' * 100000) % (x,) }}",
]
STEP_BY_STEP = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% for a in messages[0].content * 9999 %}{% for b in messages[0].content * 9999 %}{% endfor %}{% endfor %}",
    "{{ lipsum(n=4000000000) }}",
]


@pytest.mark.parametrize("source", ORDINARY)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_what_is_rendered_is_what_transformers_renders(source, add_generation_prompt):
    tracks = "generation %}" in source
    variables = {"add_generation_prompt": add_generation_prompt, "bos_token": "<s>", "eos_token": "</s>"}
    (text,), spans = render_jinja_template(
        [CHAT], chat_template=source, return_assistant_tokens_mask=tracks, **variables
    )
    assert render(source, CHAT, tracks=tracks, **variables) == (text, spans[0] if tracks else [])
    assert tracks is False or spans[0] != []


@pytest.mark.parametrize("source", AT_A_STROKE)
def test_what_would_take_all_memory_at_a_stroke_is_refused_before(source, monkeypatch):
    monkeypatch.setattr(rendering, "MOST_MEMORY", 400_000_000)
    start = time.monotonic()
    with pytest.raises(TemplateBoundError, match=r"^it (makes|repeats|formats|writes) "):
        render(source, CHAT, tracks=False)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("source", STEP_BY_STEP)
def test_what_does_not_end_is_ended(source, monkeypatch):
    monkeypatch.setattr(rendering, "LONGEST_S", 0.2)
    start = time.monotonic()
    with pytest.raises(TemplateBoundError, match=r"^it is not done after 0 s|^it writes more than 64,000,000"):
        render(source, CHAT, tracks=False)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("doubled", ["{% set n.x = n.x + n.x %}", "{% set n.x = n.x ~ n.x %}"])
def test_a_text_that_is_doubled_again_and_again_is_ended(doubled, monkeypatch):
    monkeypatch.setattr(rendering, "MOST_MEMORY", 50_000_000)
    monkeypatch.setattr(rendering, "TICK_S", 0.001)
    source = "{% set n = namespace(x='a') %}{% for i in range(40) %}" + doubled + "{% endfor %}{{ n.x | length }}"
    with pytest.raises(TemplateBoundError, match=r"^it takes more than 50,000,000 bytes of memory$"):
        render(source, CHAT, tracks=False)


def test_a_clock_that_somebody_else_has_set_goes_on():
    heard = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: heard.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.8)  # on a busy machine rendering may take a part of it
        assert render("{{ messages | length }}", CHAT, tracks=False) == ("2", [])
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.8
        assert heard.wait(2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_another_thread_renders_the_same():
    found = []
    thread = threading.Thread(target=lambda: found.append(render(TEMPLATES[0], CHAT, tracks=True)))
    thread.start()
    thread.join()
    assert found == [render(TEMPLATES[0], CHAT, tracks=True)]


@pytest.mark.parametrize(
    "source", ["{{ messages.append(1) }}", "{{ ''.__class__.x }}", "{{ raise_exception('unsafe') }}"]
)
def test_the_sandbox_stays(source):
    with pytest.raises(TemplateError, match="unsafe"):
        render(source, CHAT, tracks=False)


def test_what_is_no_jinja_is_no_template():
    with pytest.raises(TemplateError, match="Expected an expression"):
        compiled("{% for %}")
