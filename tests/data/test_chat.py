"""Chats, against what Transformers makes of the same template and messages."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from isoforward.base.errors import BadInput
from isoforward.data.chat import chat_text
from isoforward.data.tokenizer import Tokenizer
from tests.data.kinds import BPE

CHATML = """{%- for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\nYou help.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
LLAMA_3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if tools is not none %}{{- raise_exception('no tools') }}{%- endif %}"""
OTHERS = """{% set ns = namespace(count=0) %}{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% generation %}{{ message | tojson }}{% endgeneration %}
{% set ns.count = ns.count + 1 %}{% endfor %}{{ ns.count }} {{ pad_token }}{{ unk_token is defined }}"""
MESSAGES = [
    {"role": "system", "content": "Speak <like> a king."},
    {"role": "user", "content": '  What "light"?\n'},
    {"role": "assistant", "content": "The sun."},
    {"role": "user", "content": "é 日本"},
]


def chatty(template: str | None) -> Tokenizer:
    backend = Backend.from_str(BPE.backend.to_str())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<s>"])
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    return Tokenizer(backend, [backend.token_to_id("<|im_end|>")], named=named, chat_template=template)


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, OTHERS], ids=["chatml", "llama 3", "others"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_chat_has_the_text_and_the_ids_that_transformers_gives(template: str, count: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = chatty(template)
    ours.save(tmp_path / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(MESSAGES[:count], tokenize=False, add_generation_prompt=True)
    assert chat_text(ours, MESSAGES[:count]) == text
    ids = theirs.apply_chat_template(MESSAGES[:count], add_generation_prompt=True, return_dict=False)
    assert ours.encode(text, special=True) == ids
    assert Tokenizer.load(tmp_path / "tokenizer.json").chat_template == template


def test_json_in_a_template_takes_the_separators_order_and_indent_that_transformers_takes(tmp_path: Path) -> None:
    """As Qwen's and Mistral's templates write tools, say."""
    transformers = pytest.importorskip("transformers")
    template = (
        "{{ messages | tojson(separators=(',', ':')) }}{{ messages[0] | tojson(indent=1, sort_keys=true) }}"
        "{{ messages[-1].content | tojson(ensure_ascii=true) }}"
    )
    ours = chatty(template)
    ours.save(tmp_path / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = chat_text(ours, MESSAGES)
    assert text == theirs.apply_chat_template(MESSAGES, tokenize=False)
    assert text.startswith('[{"role":"system","content":"Speak <like> a king."},{')


def test_of_several_templates_the_default_is_taken() -> None:
    tokenizer = chatty(None)
    tokenizer.chat_template = [{"name": "tools", "template": "b"}, {"name": "default", "template": "a"}]
    assert chat_text(tokenizer, MESSAGES) == "a"


def test_without_a_template_it_is_said_what_to_do() -> None:
    with pytest.raises(BadInput, match="no chat_template; leave out chat=true"):
        chat_text(chatty(None), MESSAGES)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for x in %}", "Expected an expression"),
        ("{{ messages[9].content.strip() }}", "no element 9"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ],
)
def test_a_template_that_fails_or_reaches_out_of_its_sandbox_is_refused(template: str, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        chat_text(chatty(template), MESSAGES)
