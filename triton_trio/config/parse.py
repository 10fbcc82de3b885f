"""Reading configurations: ``config.pbtxt``, text or JSON into a checked :class:`ModelConfig`."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from google.protobuf.message import Message

from ..descriptors import POOL
from ..errors import InvalidArgument
from .defaults import complete_backend, normalise
from .model_config import MESSAGE, ModelConfig
from .validate import validate

CONFIG_FILENAME = "config.pbtxt"


def load_model_config(model_dir: Path, *, strict: bool = False, override_json: str | None = None) -> ModelConfig:
    """The configuration of the model in ``model_dir``; blocking, for a worker thread.

    Args:
      model_dir: holds ``config.pbtxt`` and the version directories; its name is the model's.
      strict: no auto-complete: the file must exist, and inputs and outputs must be complete.
      override_json: taken instead of the file, as the ``config`` parameter of RepositoryModelLoad.

    Raises:
      InvalidArgument: what is wrong, in which file and line; for an override, in which field.
    """
    path = model_dir / CONFIG_FILENAME
    if override_json is not None:
        try:
            message = _read_json(override_json)
        except InvalidArgument as exc:
            raise InvalidArgument(f"Invalid config override: {exc}") from None
    else:
        message = _read_file(path, must_exist=strict)
    complete_backend(message, model_dir)
    config = _finish(message, complete=strict)
    if config.name != model_dir.name:
        raise InvalidArgument(
            f"unexpected directory name '{model_dir.name}' for model '{config.name}', directory name must equal model "
            "name"
        )
    return config


def parse_model_config(text: str, *, source: str = CONFIG_FILENAME) -> ModelConfig:
    """The configuration that ``text`` is, in protobuf's text format; ``source`` names it in errors."""
    return _finish(_read_text(text, source), complete=True)


def parse_model_config_json(text: str) -> ModelConfig:
    """The configuration that ``text`` is, in protobuf's JSON, with Triton's field names or camelCase ones."""
    return _finish(_read_json(text), complete=True)


def format_model_config(config: ModelConfig) -> str:
    """The text of a ``config.pbtxt``, with all defaults written out; maps in the order of their keys."""
    return text_format.MessageToString(config.message)


def _finish(message: Any, *, complete: bool) -> ModelConfig:
    normalise(message)
    validate(message, complete=complete)
    return ModelConfig.read(message)


def _read_file(path: Path, *, must_exist: bool) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if not must_exist:
            return MESSAGE()
        raise InvalidArgument(
            f"failed to read text proto from {path}: there is no such file, and auto-complete is off"
        ) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidArgument(f"failed to read text proto from {path}: {exc}") from None
    return _read_text(text, str(path))


def _read_text(text: str, source: str) -> Any:
    message = MESSAGE()
    try:
        text_format.Parse(text, message, descriptor_pool=POOL)
    except text_format.ParseError as exc:
        line, column = exc.GetLine(), exc.GetColumn()
        reason = re.sub(r"^\d+:\d+ : ", "", str(exc))
        raise InvalidArgument(
            f"failed to read text proto from {source}:{line}:{column}: {reason}{_suggest(reason)}"
        ) from None
    except RecursionError:
        raise InvalidArgument(f"failed to read text proto from {source}: nested too deeply") from None
    _check_enums(message, "", lambda reason: InvalidArgument(f"failed to read text proto from {source}: {reason}"))
    return message


def _read_json(text: str) -> Any:
    message = MESSAGE()
    try:
        if not isinstance(json.loads(text), dict):
            raise InvalidArgument("a model configuration in JSON must be an object: {...}")
        json_format.Parse(text, message, descriptor_pool=POOL)
    except json.JSONDecodeError as exc:
        raise InvalidArgument(f"not JSON: {exc}") from None
    except json_format.ParseError as exc:
        # Its further lines list every field there is.
        reason = str(exc).partition("\n")[0].rstrip(".") + "."
        raise InvalidArgument(f"{reason}{_suggest(reason)}") from None
    except RecursionError:
        raise InvalidArgument("nested too deeply") from None
    _check_enums(message, "", InvalidArgument)
    return message


def _check_enums(message: Any, path: str, error: Callable[[str], Exception]) -> None:
    """Refuse enum values without a name: proto3 keeps any number, and nothing could act on it."""
    for field, value in message.ListFields():
        where = f"{path}{field.name}"
        if field.enum_type is not None and value not in field.enum_type.values_by_number:
            raise error(f"{where} is {value}; it must be one of {', '.join(field.enum_type.values_by_name)}")
        if field.message_type is not None:
            for key, item in _items(field, value):
                _check_enums(item, f"{where}{key}.", error)


def _items(field: Any, value: Any) -> Iterable[tuple[str, Any]]:
    if field.message_type.GetOptions().map_entry:
        if field.message_type.fields_by_name["value"].message_type is not None:
            return ((f"[{key!r}]", value[key]) for key in value)
        return ()
    if isinstance(value, Message):
        return (("", value),)
    return ((f"[{index}]", item) for index, item in enumerate(value))


def _suggest(reason: str) -> str:
    """For a misspelt field or enum value: the one that was meant, if it is easy to guess."""
    enum = re.search(r"(?:value named (\w+)|enum value (\w+))", reason)
    field = re.search(r'type "([\w.]+)" has no field named "(\w+)"', reason)
    if field:
        word = field[2]
        names = list(POOL.FindMessageTypeByName(field[1]).fields_by_name)
    elif enum and (enum_type := re.search(r"[Ee]num type \"?([\w.]+\w)", reason)):
        word = enum[1] or enum[2]
        names = list(POOL.FindEnumTypeByName(enum_type[1]).values_by_name)
    else:
        return ""
    close = [name for name in names if name.endswith(f"_{word}")] or difflib.get_close_matches(word, names, 1)
    return f" Did you mean {close[0]}?" if close else ""
