"""Conversations as one text: the template that comes with a model, or ChatML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ....errors import InvalidArgument
from .extra import require

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ChatTemplate:
    """A Jinja template, rendered in Jinja's sandbox: it is part of a file that somebody else made.

    Args:
      source: None: ChatML.
      names: ``bos_token`` and ``eos_token``, as far as the model has them.
      where: the file, for messages.
    """

    def __init__(self, source: str | None, names: Mapping[str, str], where: str) -> None:
        self._source = CHATML if source is None else source
        self._names = dict(names)
        self._where = where
        self._compiled: Any = None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation, up to where the answer begins.

        Raises:
          InvalidArgument: a message is malformed, or the template fails on it.
        """
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
        errors = require("jinja2")
        try:
            text: str = self._template().render(
                messages=[dict(message) for message in messages], add_generation_prompt=True, **self._names
            )
        except InvalidArgument:
            raise
        except (errors.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as exc:
            raise InvalidArgument(f"{self._where}: its chat template fails on this conversation: {exc}") from None
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InvalidArgument(f"the conversation is not Unicode text: {exc}") from None
        return text

    def _template(self) -> Any:
        if self._compiled is None:
            sandbox = require("jinja2.sandbox")
            # Templates are written for these settings, which Transformers uses.
            environment = sandbox.ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
            )
            environment.globals["raise_exception"] = _refuse
            self._compiled = environment.from_string(self._source)
        return self._compiled


def _refuse(text: str) -> NoReturn:
    raise InvalidArgument(f"the model's chat template refuses this conversation: {text}")
