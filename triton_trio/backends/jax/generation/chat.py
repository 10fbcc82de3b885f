"""Conversations as one text: the template that comes with a model, or ChatML."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ....errors import InvalidArgument
from ..device import LOGGER
from .extra import require

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ChatTemplate:
    """A Jinja template, rendered in Jinja's sandbox: it is part of a file that somebody else made.

    Args:
      source: a text, or its bytes in UTF-8; None: ChatML.  What is no template keeps nothing from being loaded:
        conversations are refused, and told why.
      names: ``bos_token`` and ``eos_token``, as far as the model has them.
      where: the file, for messages.
    """

    def __init__(self, source: object, names: Mapping[str, str], where: str) -> None:
        self._names = dict(names)
        self._where = where
        self._problem = ""  #: why no conversation can be rendered
        environment = _environment()
        try:
            self._compiled = environment.from_string(CHATML if source is None else _checked(source))
        except Exception as exc:  # noqa: BLE001  # it becomes a program, and Python's compiler has a say, too
            self._problem = f"{where}: its chat template cannot be used: {_reason(exc)}"
            LOGGER.warning("%s; conversations (messages) are refused", self._problem)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation, up to where the answer begins.

        Raises:
          InvalidArgument: a message is malformed, or the template fails on it.
        """
        if self._problem:
            raise InvalidArgument(self._problem)
        if not messages:
            raise InvalidArgument("a conversation has one message or more, got none")
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise InvalidArgument(
                    f"message {number} of the conversation is not an object with 'role' and 'content'"
                )
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise InvalidArgument(f"message {number} of the conversation has no text '{key}'")
        try:
            text: str = self._compiled.render(
                messages=[dict(message) for message in messages], add_generation_prompt=True, **self._names
            )
        except InvalidArgument:
            raise
        except Exception as exc:  # noqa: BLE001  # a template is somebody else's program
            raise InvalidArgument(
                f"{self._where}: its chat template fails on this conversation: {_reason(exc)}"
            ) from None
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InvalidArgument(f"the conversation is not Unicode text: {exc}") from None
        return text


def _checked(source: object) -> str:
    if isinstance(source, bytes):
        return source.decode()
    if not isinstance(source, str):
        raise InvalidArgument(f"it must be a text, got {source!r:.40}")
    return source


def _reason(exc: Exception) -> str:
    """Why, to somebody who does not see where."""
    errors = require("jinja2")
    if isinstance(exc, errors.TemplateSyntaxError):
        return f"line {exc.lineno}: {exc}"
    return str(exc) if isinstance(exc, errors.TemplateError | InvalidArgument) else f"{type(exc).__name__}: {exc}"


def _environment() -> Any:
    """Jinja as Transformers sets it up, for which templates are written."""
    extension, nodes = require("jinja2.ext").Extension, require("jinja2.nodes")

    class Generation(extension):  # type: ignore[misc, valid-type]
        """``{% generation %}``: what the model has said, marked for training; here it is text like any other."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = require("jinja2.sandbox").ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = time.strftime
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(value: Any, **settings: Any) -> str:
    # Jinja's own is for HTML: it escapes what a model shall read as it is.
    return json.dumps(value, **{"ensure_ascii": False} | settings)


def _refuse(text: str) -> NoReturn:
    raise InvalidArgument(f"the model's chat template refuses this conversation: {text}")
