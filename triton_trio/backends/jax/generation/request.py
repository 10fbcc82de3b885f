"""The tensors of a language model: what a request may ask for, and what the answers have."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....config import ModelConfig, TensorSpec
from ....errors import InvalidArgument
from ....tensor import Array
from .config import SlotSpec
from .schedule import Settings
from .tokenizer import Tokenizer

INPUTS: tuple[TensorSpec, ...] = tuple(
    TensorSpec(name, datatype, dims, optional=True)
    for name, datatype, dims in (
        ("text_input", "BYTES", (1,)),  #: a plain text to go on with
        ("messages", "BYTES", (1,)),  #: or a conversation: JSON, [{"role": "user", "content": "..."}]
        ("input_ids", "INT32", (-1,)),  #: or tokens
        ("max_tokens", "INT32", (1,)),
        ("min_tokens", "INT32", (1,)),
        ("temperature", "FP32", (1,)),
        ("top_k", "INT32", (1,)),
        ("top_p", "FP32", (1,)),
        ("seed", "UINT64", (1,)),
        ("stop", "BYTES", (-1,)),
        ("ignore_eos", "BOOL", (1,)),
        ("stream", "BOOL", (1,)),
    )
)
#: An answer has the tokens that have come since the last one.
OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text_output", "BYTES", (1,)),
    TensorSpec("token_id", "INT32", (-1,)),
    TensorSpec("log_probability", "FP32", (-1,)),
    TensorSpec("finish_reason", "BYTES", (1,)),  #: ``stop`` or ``length`` with the last ones, until then empty
)
_PROMPTS = ("text_input", "messages", "input_ids")
#: Stop strings of one request, and characters of all of them: each is looked for with each token.
MOST_STOPS, MOST_STOP_CHARACTERS = 32, 2048
#: Bytes of ``messages`` for each byte that a prompt may have: JSON may write a character as six, and names roles.
_JSON = 8


def complete(config: ModelConfig) -> ModelConfig:
    """With the tensors that config.pbtxt leaves out; it streams, unless config.pbtxt says otherwise."""
    silent = not config.message.HasField("model_transaction_policy")
    return config.replace(
        inputs=config.inputs or INPUTS, outputs=config.outputs or OUTPUTS, decoupled=True if silent else None
    )


def check(config: ModelConfig) -> None:
    """Raises :exc:`InvalidArgument` if config.pbtxt contradicts what a language model has."""
    where = f"model '{config.name}'"
    if config.max_batch_size:
        raise InvalidArgument(
            f"{where}: a language model batches by itself, one text in each of its slots: max_batch_size must be 0, "
            f"got {config.max_batch_size}; the parameter slots says how many run side by side"
        )
    if config.sequence_batching is not None:
        raise InvalidArgument(f"{where}: a language model has no sequences; send the conversation with each request")
    for kind, specs, known in (("input", config.inputs, INPUTS), ("output", config.outputs, OUTPUTS)):
        by_name = {spec.name: spec for spec in known}
        for spec in specs:
            ours = by_name.get(spec.name)
            if ours is None:
                raise InvalidArgument(
                    f"{where}: a language model has no {kind} '{spec.name}'; it has {', '.join(by_name)}"
                )
            if (spec.datatype, spec.dims) != (ours.datatype, ours.dims):
                raise InvalidArgument(
                    f"{where}: {kind} '{spec.name}' must be {ours.config_datatype} with dims {list(ours.dims)}, "
                    f"got {spec.config_datatype} with {list(spec.dims)}"
                )


@dataclass(frozen=True, slots=True)
class TextRequest:
    """What one request asks for, checked."""

    prompt: np.ndarray  #: int32
    continues: bool  #: the text goes on where the prompt ends, and is no answer to it
    settings: Settings
    stops: tuple[str, ...]
    stream: bool

    @classmethod
    def read(cls, inputs: Mapping[str, Array], spec: SlotSpec, tokenizer: Tokenizer, label: str) -> TextRequest:
        """Raises :exc:`InvalidArgument` with ``label`` in front for what cannot be done."""
        try:
            return cls._read(inputs, spec, tokenizer)
        except InvalidArgument as exc:
            raise InvalidArgument(f"{label}{exc}") from None

    @classmethod
    def _read(cls, inputs: Mapping[str, Array], spec: SlotSpec, tokenizer: Tokenizer) -> TextRequest:
        name, prompt = _prompt(inputs, spec, tokenizer)
        if not len(prompt):
            raise InvalidArgument("the prompt is empty; there is nothing to go on with")
        if len(prompt) > spec.context:
            trained = spec.context >= spec.config.context
            raise InvalidArgument(
                f"the prompt has {len(prompt)} tokens, and the model's context is {spec.context}"
                + (", all it was trained for; " if trained else "; ")
                + ("shorten it" if trained else "shorten it, or load the model with a larger parameter context")
            )
        vocabulary = spec.config.vocab_size
        if prompt.min() < 0 or prompt.max() >= vocabulary:
            raise InvalidArgument(f"token ids are 0 to {vocabulary - 1}, got {prompt.min()} to {prompt.max()}")
        # The first token is made from the prompt's last position, so it needs no room of its own.
        room = spec.context - len(prompt) + 1
        asked = int(_number(inputs, "max_tokens", room, least=1))
        most = min(asked, room)
        fewest = int(_number(inputs, "min_tokens", 0, least=0))
        if fewest > asked:
            limit = "max_tokens" if "max_tokens" in inputs else "there is room for"
            raise InvalidArgument(f"min_tokens is {fewest}, more than {limit}, {asked}")
        if _flag(inputs, "ignore_eos", default=False):
            fewest = most
        settings = Settings(
            max_tokens=most,
            min_tokens=min(fewest, most),
            temperature=_number(inputs, "temperature", 0.0, least=0),
            top_k=int(_number(inputs, "top_k", 0, least=0)),
            top_p=_number(inputs, "top_p", 1.0, least=0, most=1),
            seed=int(inputs["seed"][0]) if "seed" in inputs else int.from_bytes(os.urandom(4), "little"),
        )
        stops = _stops(inputs)
        if stops:
            tokenizer.check_text("stop")
        return cls(prompt, name != "messages", settings, stops, _flag(inputs, "stream", default=True))


def _stops(inputs: Mapping[str, Array]) -> tuple[str, ...]:
    given = inputs.get("stop", ())
    if len(given) > MOST_STOPS:
        raise InvalidArgument(f"there are {len(given)} stop strings, and a request may have {MOST_STOPS}")
    if (size := sum(map(len, given))) > 4 * MOST_STOP_CHARACTERS:  # before anything is decoded
        raise InvalidArgument(f"the stop strings have {size} bytes, and a request may have {MOST_STOP_CHARACTERS}")
    stops = tuple(_text("stop", item) for item in given)
    if "" in stops:
        raise InvalidArgument("a stop string is empty; every text would end before it begins")
    if (size := sum(map(len, stops))) > MOST_STOP_CHARACTERS:
        raise InvalidArgument(f"the stop strings have {size} characters, and a request may have {MOST_STOP_CHARACTERS}")
    return stops


def _prompt(inputs: Mapping[str, Array], spec: SlotSpec, tokenizer: Tokenizer) -> tuple[str, np.ndarray]:
    """Which of the three it is, and its tokens."""
    given = [name for name in _PROMPTS if name in inputs]
    if len(given) != 1:
        raise InvalidArgument(
            f"give one of {', '.join(_PROMPTS)} as the prompt, got {' and '.join(given) if given else 'none'}"
        )
    (name,) = given
    if name == "input_ids":
        return name, np.asarray(inputs[name], np.int32)
    tokenizer.check_text(name)
    most = spec.context * (tokenizer.longest + 1)  # where a space is no part of a token
    _check_size(name, inputs[name][0], most * (_JSON if name == "messages" else 1), spec)
    text = _text(name, inputs[name][0])
    if name == "messages":
        text = tokenizer.render(_messages(text))
        _check_size("the conversation", text, most, spec)
    return name, np.array(tokenizer.encode(text), np.int32)


def _check_size(what: str, text: str | bytes, most: int, spec: SlotSpec) -> None:
    # Before it is looked at: cutting takes time and memory, and what cannot fit shall have neither.
    if len(text) > most:
        raise InvalidArgument(
            f"{what} has {len(text)} {'characters' if isinstance(text, str) else 'bytes'}; what has more than {most} cannot "
            f"fit into the model's context of {spec.context} tokens"
        )


def _messages(text: str) -> list[Any]:
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidArgument(f"messages is not JSON: {exc}") from None
    if not isinstance(messages, list):
        raise InvalidArgument('messages must be a JSON list: [{"role": "user", "content": "..."}]')
    return messages


def _text(name: str, item: Any) -> str:
    try:
        return bytes(item).decode() if not isinstance(item, str) else item
    except UnicodeDecodeError as exc:
        raise InvalidArgument(f"{name} is not UTF-8: {exc}") from None


def _number(
    inputs: Mapping[str, Array], name: str, default: float, *, least: float, most: float | None = None
) -> float:
    if name not in inputs:
        return default
    value = float(inputs[name][0])
    # Written so that NaN is refused, too.
    if not (least <= value < float("inf") and (most is None or value <= most)):
        wanted = f"{least} or more" if most is None else f"between {least} and {most}"
        # As NumPy writes it: all digits that float32 has, or 1.0000001 were 1.
        raise InvalidArgument(f"{name} must be {wanted}, got {inputs[name][0]!s}")
    return value


def _flag(inputs: Mapping[str, Array], name: str, *, default: bool) -> bool:
    return bool(inputs[name][0]) if name in inputs else default


def answer(
    text: str, tokens: Sequence[int], log_probabilities: Sequence[float], finish_reason: str
) -> dict[str, Array]:
    """The outputs of one response."""
    return {
        "text_output": np.array([text.encode()], object),
        "token_id": np.array(tokens, np.int32),
        "log_probability": np.array(log_probabilities, np.float32),
        "finish_reason": np.array([finish_reason.encode()], object),
    }
