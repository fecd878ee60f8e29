"""A model's own chat template: messages to the text that it was trained on.

A template is a program in Jinja. It runs in Jinja's sandbox, under what Transformers offers to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from isoforward.base.errors import BadInput
from isoforward.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, str]  # role and content


def chat_text(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """What stands before the model's answer to `messages`, special tokens spelled out.

    BadInput where there is no template, or where it refuses these messages.
    """
    template = template_of(tokenizer)
    if template is None:
        raise BadInput(
            "chat: the model's tokenizer has no chat_template; leave out chat=true, or put one beside its "
            "tokenizer.json as chat_template.jinja"
        )
    from jinja2 import TemplateError

    try:
        return str(
            environment()
            .from_string(template)
            .render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokenizer.named)
        )
    except TemplateError as error:
        raise BadInput(f"chat: the model's chat_template fails: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise BadInput(f"chat: the model's chat_template fails: {type(error).__name__}: {error}") from error


def template_of(tokenizer: Tokenizer) -> str | None:
    """Of several by name, the one called default."""
    found = tokenizer.chat_template
    if isinstance(found, list):
        return next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found


def environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what training learns from; here its body is text like any other."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(  # as Transformers has it; Jinja's own escapes HTML
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox
