"""The identity backend: ``OUTPUTn`` is ``INPUTn``.  Triton's QA uses one like it to test everything but the model.

Control inputs of a sequence are ignored, and its states stay what they are.  Parameters in config.pbtxt:
``execute_delay_ms`` makes every execution take that long, and lets go at any moment.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from ..errors import InvalidArgument
from .base import Backend, BackendInstance, BackendModel, ModelContext, Placement

if TYPE_CHECKING:
    from ..batch import Batch


class IdentityInstance(BackendInstance):
    def __init__(self, outputs: dict[str, str], delay: float) -> None:
        self._outputs = outputs
        self._delay = delay

    async def execute(self, batch: Batch) -> None:
        if self._delay:
            await trio.sleep(self._delay)
        for member in batch.members:
            inputs = member.inputs
            batch.respond(member, {out: inputs[name] for out, name in self._outputs.items() if name in inputs})


class IdentityModel(BackendModel):
    def __init__(self, context: ModelContext) -> None:
        config = context.config
        batching = config.sequence_batching
        added = {spec.name for spec in batching.added_inputs} if batching is not None else ()
        states = {state.output_name: state.input_name for state in batching.states} if batching is not None else {}
        inputs = [spec.name for spec in config.inputs if spec.name not in added]
        outputs = [spec.name for spec in config.outputs if spec.name not in states]
        if len(inputs) != len(outputs):
            raise InvalidArgument(
                f"model '{config.name}': the identity backend needs as many outputs as inputs, "
                f"config.pbtxt has {len(inputs)} inputs and {len(outputs)} outputs"
            )
        self._outputs = dict(zip(outputs, inputs, strict=True)) | states
        text = config.parameters.get("execute_delay_ms", "0")
        try:
            self._delay = float(text) / 1e3
        except ValueError:
            raise InvalidArgument(
                f"model '{config.name}': parameter execute_delay_ms must be a number of milliseconds, got '{text}'"
            ) from None

    @asynccontextmanager
    async def open_instance(self, placement: Placement) -> AsyncIterator[IdentityInstance]:
        yield IdentityInstance(self._outputs, self._delay)


class IdentityBackend(Backend):
    @asynccontextmanager
    async def open_model(self, context: ModelContext) -> AsyncIterator[IdentityModel]:
        yield IdentityModel(context)
