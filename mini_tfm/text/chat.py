"""Chat templates: messages to the text that a model was trained on, by the Jinja template that its tokenizer carries.

A template comes from a file, so it runs in Jinja's sandbox, without access to what objects can do, and its text has a limit.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mini_tfm.errors import InvalidType, InvalidValue

MAX_TEMPLATE = 1 << 18  # characters
MAX_CHAT = 1 << 26


def chat_text(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
    source: str = "",
) -> str:
    """The text of a chat, in which the names of special tokens stand for these tokens.

    messages: mappings with "role" ("system", "user", "assistant", ...) and "content", oldest first. special_tokens: the names that
    a template may use, such as bos_token. Raises InvalidType, InvalidValue naming `source` where the template refuses the messages.
    """
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidType(f"messages[{number}]: expected a mapping with the texts 'role' and 'content', got {message!r:.80}")
    if not messages:
        raise InvalidValue("messages: expected at least one")
    if len(template) > MAX_TEMPLATE:
        raise InvalidValue(f"{source}: chat_template: expected at most {MAX_TEMPLATE} characters, got {len(template)}")
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise InvalidValue("chat: templates are run by the jinja2 package: pip install jinja2") from error

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    pieces, length = [], 0
    try:
        rendering = environment.from_string(template).generate(
            messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **special_tokens
        )
        for piece in rendering:
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHAT:
                raise InvalidValue(f"{source}: chat_template: makes more than {MAX_CHAT} characters")
    except InvalidValue:
        raise
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise InvalidValue(f"{source}: chat_template: {error}") from error
    return "".join(pieces)
