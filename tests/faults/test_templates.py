"""Chat templates that count for ever, or make texts and lists without an end: each is refused, and takes little."""

import resource
import time

import pytest
from tiny import tiny_tokenizer

from griffin_offload.errors import PromptError
from griffin_offload.model.chat_template import ChatTemplate

pytestmark = pytest.mark.fault

MESSAGES = [{"role": "user", "content": "hello"}]
GROWS = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
ENDLESS = {
    "a range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "loops within loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a macro twice in itself": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a recursive loop": "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "a text repeated": "{{ 'a' * 10 ** 10 }}",
    "a list repeated": "{{ [0] * 10 ** 10 }}",
    "a power": "{{ 7 ** (10 ** 9) }}",
    "a width of %": "{{ '%10000000000d' % 1 }}",
    "a width of % that is a value": "{{ '%*d' % (10 ** 10, 1) }}",
    "a width of format": "{{ '{:>10000000000}'.format(1) }}",
    "a width of format that is a value": "{{ '{:>{}}'.format(1, 10 ** 10) }}",
    "a filter's width": "{{ 'a' | center(10 ** 10) }}",
    "a filter's width by map": "{{ range(9) | map('center', 10 ** 10) | join }}",
    "a method's width": "{{ 'a'.ljust(10 ** 10) }}",
    "tabs": "{{ '\t'.expandtabs(10 ** 10) }}",
    "bytes of a number": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "batch": "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "indent": "{{ ('a\n' * 100000) | indent(10 ** 6) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "replace as a method": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "join": "{{ (['a' * 100000] * 1000) | join }}",
    "join as a method": "{{ ('b' * 100000).join(range(99999) | map('string')) }}",
    "a text doubled": GROWS.replace("START", "'ab'").replace("STEP", "ns.x ~ ns.x"),
    "a text added to itself": GROWS.replace("START", "'ab'").replace("STEP", "ns.x + ns.x"),
    "lists of lists": GROWS.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"),
    "objects of objects": GROWS.replace("START", "{}").replace("STEP", "{'a': ns.x, 'b': ns.x}"),
    "namespaces of namespaces": GROWS.replace("START", "1").replace("STEP", "namespace(a=ns.x, b=ns.x)"),
    "a long text in a loop": "{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
    "a long text in a block": "{% set x %}{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}{% endset %}",
    "sums of lists": "{{ ([[1] * 1000] * 1000) | sum(start=[]) | length }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "itself": "a" * 2**21,
}  # fmt: skip


@pytest.mark.parametrize("what", ENDLESS)
def test_a_template_without_an_end_is_refused(what: str) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" + ENDLESS[what]
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(PromptError, match=r"chat template (is refused|refused the conversation)"):
        ChatTemplate(tokenizer, "m").encode(MESSAGES, check=lambda text: None)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 2**10  # KiB


def test_what_templates_of_models_do_is_as_transformers_renders_it() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{%- set ns = namespace(found=false, text='') %}{{- bos_token }}"
        "{%- for message in messages %}{%- set content = message.content | trim %}"
        "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
        "{%- if loop.first or loop.last %}{%- set ns.found = true %}"
        "{%- set ns.text = ns.text ~ loop.index %}{%- endif %}"
        "{{- '<|' + message.role + '|>' ~ content | replace('a', 'b') }}{%- endfor %}"
        "{%- for tool in tools or [] %}{{- tool | tojson(indent=2) }}{%- endfor %}"
        "{%- macro m(a, b=2) %}{{ a * b }}{% endmacro %}{{ m(2) }}"
        "{{ messages[::-1] | map(attribute='role') | join(', ') }}"
        "{{ ns.text }}{{ 'x: %s, {}' % 3 }}{{ '{:02d}'.format(7) }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    )  # fmt: skip
    messages = [
        {"role": "system", "content": "be kind"},
        *({"role": role, "content": f"<think>no</think>\nbanana {role}"} for role in ("user", "assistant") * 20),
        {"role": "user", "content": "a" * 300_000},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    ours = ChatTemplate(tokenizer, "m").apply(messages, tools=tools, tokenize=False)
    assert ours == tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
