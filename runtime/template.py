"""The checkpoint's chat template, rendered as transformers 5 renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from vlm_edge.errors import TemplateError

Message = Mapping[str, Any]


class ChatTemplate:
    """A Jinja chat template of a checkpoint.

    Args:
        source: the template's text.
        special_tokens: bos_token, eos_token, image_token ..., which the template sees as variables.

    Raises:
        TemplateError: the text is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"it is not valid Jinja ({error})") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as one text.

        Args:
            messages: role and content, passed as they are (see `takes_parts`, `takes_strings`).
            add_generation_prompt: end with what opens the assistant's turn.

        Raises:
            TemplateError: the template refuses the conversation, in its own words.
        """
        try:
            return self._template.render(
                messages=_with_reasoning(_plain(list(messages))),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # the template is a program: it can fail in any way
            raise TemplateError(str(error) or type(error).__name__) from error

    @cached_property
    def takes_parts(self) -> bool:
        """Whether it reads content given as a list of parts, which is how LLaVA's place images."""
        return self._shows([{"type": "text", "text": _PROBE}])

    @cached_property
    def takes_strings(self) -> bool:
        """Whether it reads content given as a string; a template for parts drops such text silently."""
        return self._shows(_PROBE)

    def _shows(self, content: Any) -> bool:
        try:
            text = self.render([{"role": "user", "content": content}])
        except TemplateError:
            return False
        # A template for strings may print the list itself, with its keys.
        return _PROBE in text.lower() and "'text'" not in text and '"text"' not in text


_PROBE = "vlmedgeprobe"


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers.utils.chat_template_utils: templates come from the Hub and are not trusted."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Dict:
    """`dict(...)` without handing out the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Refuses names that start with an underscore, a way out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a name may be "self"
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return str(caller())


def _plain(value: Any) -> Any:
    """JSON types only, so that no object with methods reaches the template."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # without a subclass's methods
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _with_reasoning(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A message's reasoning under each name that templates read (as `_alias_reasoning_fields`)."""
    found = []
    for message in messages:
        names = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((message[n] for n in names if message.get(n) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        found.append(message)
    return found
