"""Between the wire's inference messages and the server's requests: straight-line code, for this is the hot path.

Inputs are arrays over the very bytes of the message; outputs are copied once, into the bytes that leave.  Texts and
their order of precedence are Triton's, since clients match on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import trio

from .._pb import inference as pb
from ..errors import InternalError, InvalidArgument, NotFound, Unavailable, Unsupported
from ..model import Model
from ..request import InferenceRequest, InferenceResponse, ParameterValue
from ..server import InferenceServer
from ..tensor import classification, datatype_of, from_contents, from_raw, to_raw
from .stream import Stream

EMPTY_FINAL = "triton_enable_empty_final_response"
FINAL_RESPONSE = "triton_final_response"

#: Names of outputs that are wanted as classes, and how many.
Classes = Mapping[str, int]

_NO_CLASSES: Classes = {}
#: Parameters that the protocol gives a meaning of their own, and the fields that may carry them.
_TYPED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "sequence_id": (("int64_param", "string_param"), "int64_param or string_param"),
    "sequence_start": (("bool_param",), "bool_param"),
    "sequence_end": (("bool_param",), "bool_param"),
    "priority": (("int64_param", "uint64_param"), "int64_param or uint64_param"),
    "timeout": (("int64_param",), "int64_param"),
    EMPTY_FINAL: (("bool_param",), "bool_param"),
}
_CUSTOM: tuple[str, ...] = ("int64_param", "bool_param", "string_param", "double_param")
# Messages are never changed once they are made, so the two that every stream response needs are made once.
_FINAL = {True: pb.InferParameter(bool_param=True), False: pb.InferParameter(bool_param=False)}


def parse_version(text: str) -> int | None:
    """The version in a request; empty means the latest, None."""
    if not text:
        return None
    if not text.removeprefix("-").isdecimal() or len(text) > 18:
        raise InvalidArgument(
            f"failed to get model version from specified version string '{text}' (details: stol), "
            "version should be an integral value > 0"
        )
    version = int(text)
    if version < 0:
        raise InvalidArgument(f"invalid model version specified '{text}' , version should be an integral value > 0")
    return version


class Inference:
    """Runs the inference messages of one server."""

    def __init__(self, server: InferenceServer) -> None:
        self._server = server
        self._labels: WeakKeyDictionary[Model, Mapping[str, tuple[str, ...]]] = WeakKeyDictionary()

    def model(self, message: pb.ModelInferRequest) -> Model:
        """The model that ``message`` asks for; raises :exc:`TritonError` with what the client is to read."""
        if self._server.draining:
            raise Unavailable("GRPC server is shutting down and has stopped accepting new requests.")
        return self._server.model(message.model_name, parse_version(message.model_version))

    async def infer_unary(self, stream: Stream[pb.ModelInferRequest, pb.ModelInferResponse]) -> None:
        """The handler of ModelInfer: an RPC that serves one request and nothing else, so its scope is the request's.

        **Cancellation:** as :meth:`infer`.  If the client is still there, it reads the request's own words.
        """
        message = await stream.recv_message()
        if message is None:
            return
        model = self._unary_model(message)
        request, classes = decode_request(message, stream.cancel_scope)
        try:
            response = await model.infer(request)
        except trio.Cancelled:
            stream.cancel_message = request.ended_error().message
            raise
        if classes:
            response = await self.classify(model, response, classes)
        await stream.send_message(encode_response(response))

    def _unary_model(self, message: pb.ModelInferRequest) -> Model:
        model = self.model(message)
        if model.config.decoupled:
            raise Unsupported("ModelInfer RPC doesn't support models with decoupled transaction policy")
        return model

    async def infer(self, message: pb.ModelInferRequest, *, stream: bool = False) -> pb.ModelInferResponse:
        """The one response to ``message``, in a scope of its own; ``stream`` as for :func:`encode_response`.

        Raises:
          TritonError: what is wrong with the request, or happened to it.

        **Cancellation:** as :meth:`triton_trio.Model.infer`.  The request is in its queue before the first checkpoint.
        """
        model = self._unary_model(message)
        request, classes = decode_request(message)
        response = await model.infer(request)
        if not classes:
            return encode_response(response, stream=stream)
        return encode_response(await self.classify(model, response, classes), stream=stream)

    async def classify(self, model: Model, response: InferenceResponse, classes: Classes) -> InferenceResponse:
        """``response`` with the outputs in ``classes`` as their highest values, in text form.

        **Cancellation:** while label files are read, which happens once a model; nothing is left behind.
        """
        labels = self._labels.get(model)
        if labels is None:
            labels = self._labels[model] = await trio.to_thread.run_sync(_read_labels, model)
        response.outputs = {
            name: classification(array, classes[name], labels.get(name, ()), batched=model.config.max_batch_size > 0)
            if name in classes
            else array
            for name, array in response.outputs.items()
        }
        return response


def _read_labels(model: Model) -> dict[str, tuple[str, ...]]:
    labels = {}
    for output in model.config.outputs:
        if output.label_filename:
            path = model.context.model_directory / output.label_filename
            try:
                labels[output.name] = tuple(path.read_text(encoding="utf-8").splitlines())
            except (OSError, UnicodeDecodeError) as exc:
                raise InternalError(
                    f"model '{model.name}': cannot read label_filename of output '{output.name}': {exc}"
                ) from None
    return labels


def decode_request(
    message: pb.ModelInferRequest, scope: trio.CancelScope | None = None
) -> tuple[InferenceRequest, Classes]:
    """The request in ``message``, whose arrays are views of the message's bytes; ``scope`` as for the request.

    Raises:
      InvalidArgument: a parameter of the wrong type, a tensor without data or with data of the wrong size.
      NotFound: a tensor in shared memory; this server has no shared-memory regions.
    """
    priority = timeout = 0
    sequence_id: int | str = 0
    sequence_start = sequence_end = False
    parameters: dict[str, ParameterValue] | None = None
    if message.parameters:
        parameters = {name: _parameter(name, value) for name, value in message.parameters.items()}
        priority = int(parameters.pop("priority", 0))
        timeout = int(parameters.pop("timeout", 0))
        parameters.pop(EMPTY_FINAL, None)
        if "sequence_id" in parameters:
            correlation_id = parameters.pop("sequence_id")
            assert isinstance(correlation_id, int | str)
            sequence_id = correlation_id
            sequence_start = bool(parameters.pop("sequence_start", False))
            sequence_end = bool(parameters.pop("sequence_end", False))
        if priority < 0:
            raise InvalidArgument("invalid value for 'priority', expected value >= 0.")

    model, label = message.model_name, message.id
    raw = message.raw_input_contents
    inputs = {}
    taken = 0
    for tensor in message.inputs:
        name = tensor.name
        if name in inputs:
            raise InvalidArgument(f"[request id: {label or '<id_unknown>'}] input '{name}' already exists in request")
        if tensor.parameters:
            _refuse_shared_memory(tensor.parameters)
        if tensor.contents is not None:
            if raw:
                raise InvalidArgument(
                    "contents field must not be specified when using raw_input_contents for "
                    f"'{name}' for model '{model}'"
                )
            inputs[name] = from_contents(
                tensor.datatype, tensor.shape, tensor.contents, name=name, model=model, request_id=label
            )
        elif taken < len(raw):
            inputs[name] = from_raw(tensor.datatype, tensor.shape, raw[taken], name=name, model=model, request_id=label)
            taken += 1
        else:
            raise InvalidArgument(f"unable to find data for input tensor '{name}' for model '{model}' in request.")

    classes = _NO_CLASSES
    outputs: tuple[str, ...] = ()
    if message.outputs:
        outputs = tuple(output.name for output in message.outputs)
        if len(set(outputs)) < len(outputs):
            twice = next(name for name in outputs if outputs.count(name) > 1)
            raise InvalidArgument(f"[request id: {label or '<id_unknown>'}] output '{twice}' already exists in request")
        classes = {
            output.name: count
            for output in message.outputs
            if output.parameters and (count := _class_count(output.parameters))
        }
    request = InferenceRequest(
        inputs,
        requested_outputs=outputs,
        request_id=label,
        priority=priority,
        timeout_us=max(timeout, 0),
        parameters=parameters,
        sequence_id=sequence_id,
        sequence_start=sequence_start,
        sequence_end=sequence_end,
        scope=scope,
    )
    return request, classes


def encode_response(response: InferenceResponse, *, stream: bool = False) -> pb.ModelInferResponse:
    """The message of ``response``: raw contents only, one entry for each output.

    In a ``stream`` every response says whether it is the request's last.
    """
    outputs = []
    raw: list[Any] = []  # views, where there is nothing to convert: the codec makes the only copy
    for name, array in response.outputs.items():
        outputs.append(
            pb.ModelInferResponseInferOutputTensor(name=name, datatype=datatype_of(array), shape=list(array.shape))
        )
        raw.append(to_raw(array))
    message = pb.ModelInferResponse(
        model_name=response.model_name,
        model_version=str(response.model_version),
        id=response.request_id,
        outputs=outputs,
        raw_output_contents=raw,
    )
    if response.parameters:
        message.parameters = {name: _encode_parameter(value) for name, value in response.parameters.items()}
    if stream:
        message.parameters[FINAL_RESPONSE] = _FINAL[response.final]
    return message


def encode_error(message: pb.ModelInferRequest, text: str) -> pb.ModelStreamInferResponse:
    """How an error travels inside a stream: with its request's id, and never empty, which clients read as success."""
    return pb.ModelStreamInferResponse(
        error_message=text or "unknown error",
        infer_response=pb.ModelInferResponse(
            model_name=message.model_name,
            model_version=message.model_version,
            id=message.id,
            parameters={FINAL_RESPONSE: _FINAL[True]},
        ),
    )


def wants_empty_final(message: pb.ModelInferRequest) -> bool:
    """Whether the client wants to be told of the end even if the model's last response has no outputs."""
    parameter = message.parameters.get(EMPTY_FINAL)
    return parameter is not None and bool(parameter.bool_param)


def _parameter(name: str, message: pb.InferParameter) -> ParameterValue:
    typed = _TYPED.get(name)
    if typed is None:
        if name.startswith("triton_"):
            raise InvalidArgument(
                "parameter keys starting with 'triton_' are reserved for Triton usage. "
                f"Only the following keys starting with 'triton_' are allowed: {EMPTY_FINAL}"
            )
        fields, expected = _CUSTOM, "int64_param, bool_param, or string_param"
    else:
        fields, expected = typed
    for field in fields:
        value: ParameterValue | None = getattr(message, field)
        if value is not None:
            return value
    raise InvalidArgument(f"invalid value type for '{name}' parameter, expected {expected}.")


def _encode_parameter(value: ParameterValue) -> pb.InferParameter:
    # bool first: it is an int, too.
    if isinstance(value, bool):
        return _FINAL[value]
    if isinstance(value, int):
        return pb.InferParameter(int64_param=value)
    if isinstance(value, float):
        return pb.InferParameter(double_param=value)
    return pb.InferParameter(string_param=value)


def _class_count(parameters: Mapping[str, pb.InferParameter]) -> int:
    wanted = parameters.get("classification")
    if wanted is not None:
        if "shared_memory_region" in parameters:
            raise InvalidArgument("output can't set both 'shared_memory_region' and 'classification'")
        if wanted.int64_param is None:
            raise InvalidArgument("invalid value type for 'classification' parameter, expected int64_param")
        if wanted.int64_param <= 0:
            raise InvalidArgument("invalid value for 'classification' parameter, expected >= 0")
        return wanted.int64_param
    _refuse_shared_memory(parameters)
    return 0


def _refuse_shared_memory(parameters: Mapping[str, pb.InferParameter]) -> None:
    region = parameters.get("shared_memory_region")
    if region is not None:
        raise NotFound(f"Unable to find shared memory region: '{region.string_param or ''}'")
