"""The worker's side: one model, its instances, and what the server asks of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ...config import ModelConfig
from ...errors import InternalError, TritonError, no_panic
from ...scopes import Reason, SequenceEnd, SequenceEndCause
from ..availability import Availability
from ..base import Backend, BackendInstance, BackendModel, ModelContext, Placement
from .hosted import HostedBatch
from .messages import (
    Cancel,
    Close,
    EndSequence,
    Execute,
    GivenUp,
    Hello,
    InstanceOpened,
    Leave,
    Look,
    Message,
    ModelOpened,
    OpenInstance,
    OpenModel,
    Refused,
    Report,
    Taken,
    Waiting,
    cut,
    write_error,
)
from .plain import read_config, write_statistics

if TYPE_CHECKING:
    from .connection import Connection

LOGGER = logging.getLogger("triton_trio.worker")

#: Seconds for the last words (log lines) to leave.
LAST_WORDS = 1.0
#: Messages that are read before other tasks run.
TURN = 16


class Host:
    """Serves one model of ``backend`` to the server at the other end of ``connection``."""

    def __init__(self, backend: Backend, connection: Connection) -> None:
        self._backend = backend
        self._connection = connection
        self._waiting = 0
        self._config: ModelConfig | None = None
        self._version = 0
        self._model: BackendModel | None = None
        self._instances: dict[str, BackendInstance] = {}
        self._batches: dict[int, HostedBatch] = {}
        self._opening = trio.CancelScope()
        self._send_wanted, self._wanted = trio.open_memory_channel[OpenModel | OpenInstance](1)

    async def run(self) -> None:
        """Serve until the server says so, which it does when no execution is left, or until it is gone.

        **Cancellation:** model and instances are closed.
        """
        async with trio.open_nursery() as nursery:
            # Owner of the three: this nursery; ended here, when everything is closed.
            nursery.start_soon(self._connection.write, name="writer")
            nursery.start_soon(self._read, nursery, name="reader")
            self._connection.post(Hello())
            try:
                with self._opening:
                    await self._serve(nursery)
            finally:
                with trio.move_on_after(LAST_WORDS, shield=True):
                    await self._connection.wait_written()
                nursery.cancel_scope.cancel(reason="worker closed")

    # Opening: all in one task, for what is opened last is closed first

    async def _serve(self, nursery: trio.Nursery) -> None:
        async with AsyncExitStack() as stack:
            async for wanted in self._wanted:
                if isinstance(wanted, OpenModel):
                    self._config, self._version = read_config(wanted.config), wanted.version
                assert self._config is not None
                failed = f"load failed for model '{self._config.name}'"  # the server's own words
                try:
                    with no_panic(failed):
                        opened = await self._open(stack, wanted, self._config, nursery)
                except TritonError as exc:
                    self._connection.post(Refused(write_error(exc)))
                except (Exception, SystemExit, BaseExceptionGroup) as exc:
                    if not _is_error(exc):
                        raise
                    LOGGER.exception("opening failed")
                    error = InternalError(f"{failed}: {type(exc).__name__}: {exc}")
                    self._connection.post(Refused(write_error(error)))
                else:
                    self._connection.post(opened)

    async def _open(
        self, stack: AsyncExitStack, wanted: OpenModel | OpenInstance, config: ModelConfig, nursery: trio.Nursery
    ) -> Message:
        if isinstance(wanted, OpenModel):
            context = ModelContext(
                config,
                wanted.version,
                Path(wanted.model_directory),
                Path(wanted.version_directory),
                waiting=lambda: self._waiting,
            )
            model = self._model = await stack.enter_async_context(self._backend.open_model(context))
            return ModelOpened(
                [(kind, device, model.lanes(Placement("", kind, device))) for kind, device in _on(config)]
            )
        assert self._model is not None
        placement = Placement(wanted.name, wanted.kind, wanted.device)
        instance = await stack.enter_async_context(self._model.open_instance(placement))
        self._instances[wanted.name] = instance
        self._report(wanted.name)
        if instance.availability is not None:
            # Owner: the host's nursery, with which it ends.
            nursery.start_soon(self._watch_device, instance.availability, name=f"device of {wanted.name}")
        return InstanceOpened(wanted.name)

    async def _watch_device(self, availability: Availability) -> None:
        while not availability.why:
            with availability.while_ready():
                await trio.sleep_forever()
            await availability.wait()
        self._connection.post(GivenUp(cut(availability.why)))

    # What comes

    async def _read(self, nursery: trio.Nursery) -> None:
        count = 0
        while True:
            message = await self._connection.receive()
            if message is None or isinstance(message, Close):
                self._opening.cancel(reason="the server has closed this worker")
                return
            self._receive(message, nursery)
            count += 1
            if count % TURN == 0:
                await trio.lowlevel.checkpoint()

    def _receive(self, message: Message, nursery: trio.Nursery) -> None:
        match message:
            case OpenModel() | OpenInstance():
                self._send_wanted.send_nowait(message)
            case Execute():
                self._begin(message, nursery)
            case Leave(execution, member, reason) if execution in self._batches:
                self._batches[execution].leave_index(member, Reason(reason))
            case Cancel(execution) if execution in self._batches:
                self._batches[execution].scope.cancel_scope.cancel(reason=Reason.MODEL_UNLOADING.value)
            case Taken(execution, member, count) if execution in self._batches:
                self._batches[execution].taken(member, count)
            case EndSequence(instance):
                self._end_sequence(self._instances[instance], message)
            case Waiting(count):
                self._waiting = count
            case Look(instance):
                self._report(instance)
            case _:
                return  # of an execution that has ended meanwhile

    def _begin(self, message: Execute, nursery: trio.Nursery) -> None:
        assert self._config is not None
        batch = self._batches[message.execution] = HostedBatch(
            message,
            self._connection,
            model_name=self._config.name,
            version=self._version,
            decoupled=self._config.decoupled,
            process=nursery.cancel_scope,
        )
        # Owner: the host's nursery; ends with the execution, cancelled by its batch's scope.
        nursery.start_soon(self._execute, message.execution, batch, name=f"execution on {message.instance}")

    async def _execute(self, number: int, batch: HostedBatch) -> None:
        assert self._config is not None
        name = self._config.name
        error: TritonError | None = None
        try:
            # The scope inside: what a model raises comes alone only without the cancels of the model's own tasks.
            with no_panic(f"model '{name}' failed"), batch.scope.cancel_scope:
                await self._instances[batch.name].execute(batch)
        except TritonError as exc:
            error = type(exc)(*exc.args)  # without the frames, which hold tensors
        except (Exception, SystemExit, BaseExceptionGroup) as exc:  # whatever a model raises is that request's error
            if not _is_error(exc):
                raise
            LOGGER.exception("model %s version %d failed in execute", name, self._version)
            error = InternalError(f"model '{name}' failed: {type(exc).__name__}: {exc}")
        finally:
            del self._batches[number]
        # Not where something else has passed, a cancel from outside: to the server the end without an error is that of a
        # whole answer.  The process is about to end then, and its loss answers everybody.
        batch.post_ended(error)

    def _end_sequence(self, instance: BackendInstance, end: EndSequence) -> None:
        reason = None if end.reason is None else Reason(end.reason)
        try:
            instance.on_sequence_end(SequenceEnd(end.sequence_id, end.generation, SequenceEndCause(end.cause), reason))
        except Exception:
            LOGGER.exception("on_sequence_end of instance %s failed", end.instance)

    def _report(self, name: str) -> None:
        self._connection.post(Report(name, write_statistics(self._instances[name].statistics())))


def _is_error(exc: BaseException) -> bool:
    """Whether it is a model's, or a group of such: not with a cancel in it, which must go on."""
    return not isinstance(exc, BaseExceptionGroup) or exc.split((Exception, SystemExit))[1] is None


def _on(config: ModelConfig) -> Iterable[tuple[str, int]]:
    """Where instances may be: kinds and devices."""
    return dict.fromkeys((group.kind, device) for group in config.instance_groups for device in group.devices)
