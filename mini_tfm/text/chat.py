"""Chat templates: messages to the text that a model was trained on, by the Jinja template that its tokenizer carries.

A template comes from a file, so it runs in Jinja's sandbox, without access to what objects can do, and what it does and makes has a limit.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mini_tfm.errors import InvalidType, InvalidValue

MAX_TEMPLATE = 1 << 18  # characters
MAX_CHAT = 1 << 26
MAX_STEPS = 1_000_000
MAX_NUMBER = 1 << 20


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
    except ImportError as error:
        raise InvalidValue("chat: templates are run by the jinja2 package: pip install jinja2") from error
    pieces, length = [], 0
    try:
        rendering = _bounded(template).generate(
            messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **special_tokens
        )
        for piece in rendering:
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHAT:
                raise InvalidValue(f"{source}: chat_template: makes more than {MAX_CHAT} characters")
    except InvalidValue:
        raise
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError) as error:
        raise InvalidValue(f"{source}: chat_template: {error}") from error
    return "".join(pieces)


class _Budget:
    """What a template may do: steps of loops and calls, and characters and items that it makes on the way."""

    def __init__(self) -> None:
        self.steps, self.made = MAX_STEPS, MAX_CHAT

    def spend(self, made: int) -> None:
        self.steps, self.made = self.steps - 1, self.made - made
        if self.steps < 0 or self.made < 0:
            raise ValueError(f"does more than {MAX_STEPS} steps, or makes more than {MAX_CHAT} characters")

    def result(self, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise ValueError(f"a number beyond {MAX_NUMBER}")
        self.spend(len(value) if isinstance(value, str | list | tuple) else 0)
        return value

    def items(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(0)
            yield value


def _bounded(template: str) -> Any:
    """The compiled template, all of whose loops, calls, filters and operators are counted."""
    from jinja2 import TemplateError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    budget = _Budget()

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "-", "*", "**", "%", "/", "//"})

        def call(self, context: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(call, "__name__", "") in ("format", "format_map") and _WIDTH.search(str(call.__self__)):
                raise ValueError("format: makes too much")
            return budget.result(super().call(context, call, *args, **kwargs))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(one) for one in (left, right) if isinstance(one, str | list | tuple)]
            if operator == "*" and sizes:
                budget.spend(max(0, sizes[0] * (right if isinstance(right, int) else left)))
            if (operator == "**" and right > 64) or (operator == "%" and isinstance(left, str) and _WIDTH.search(left)):
                raise ValueError(f"{operator}: makes too much")
            return budget.result(super().call_binop(context, operator, left, right))

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def counted(function: Callable) -> Callable:
        return functools.wraps(function)(lambda *args, **kwargs: budget.result(function(*args, **kwargs)))

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    for name in ("center", "format", "indent", "urlize", "wordwrap", "batch", "slice"):  # widths that are not counted
        environment.filters.pop(name)
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.filters = {name: counted(function) for name, function in environment.filters.items()}
    environment.filters |= {_RESULT: budget.result, _ITEMS: budget.items}
    environment.globals.pop("lipsum")
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    tree = environment.parse(template)
    bound = lambda node, name: nodes.Filter(node, name, [], [], None, None, lineno=1, environment=environment)  # noqa: E731
    for loop in tree.find_all(nodes.For):
        loop.iter = bound(loop.iter, _ITEMS)
    for block in tree.find_all(nodes.AssignBlock):
        block.filter = bound(block.filter, _RESULT)
    for joined in list(tree.find_all(nodes.Concat)):
        joined.nodes = [bound(nodes.Concat(joined.nodes, lineno=1, environment=environment), _RESULT)]
    for number in tree.find_all(nodes.Const):
        budget.result(number.value)
    return environment.template_class.from_code(environment, environment.compile(tree), environment.make_globals(None))


_RESULT, _ITEMS = "result of the template", "items of the template"  # no template can name them
_WIDTH = re.compile(r"\d{5}|\*")
