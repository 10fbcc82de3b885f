"""A language model of random numbers, in a model repository; and its texts as one reader would have them."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import trio
import trio.testing

import triton_trio
from triton_trio.backends.jax import DeviceStatistics, JaxBackend
from triton_trio.backends.jax.device import Turn
from triton_trio.backends.jax.generation import SlotSpec
from triton_trio.backends.jax.generation.engine import EngineStatistics, SlotTurn
from triton_trio.instance import InstanceState
from triton_trio.request import InferenceRequest
from triton_trio.scheduled_model import ScheduledModel
from triton_trio.server import InferenceServer
from triton_trio.testing import assert_quiescent
from triton_trio.testing.device import DeviceGate

from ..world import until
from .test_weights import MODEL, TENSORS, write_directory
from .tiny import Machine, params_of, prompt

SLOTS = 3
CHUNK = 16
CONTEXT = 100


def write_language_model(root: Path, config: str = "", **parameters: object) -> None:
    """Token 12 is the word ``w12``.  Tokens are made one at a time, unless ``ladder`` says otherwise."""
    version = root / "llm" / "1"
    version.mkdir(parents=True)
    write_directory(version)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{number}": number for number in range(MODEL.vocab_size)}, unk_token="w0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(version / "tokenizer.json"))
    settings = {"model_format": "llama", "slots": SLOTS, "context": CONTEXT, "prefill_chunk": CHUNK, "ladder": 1}
    # One program runs and one is queued, whatever time it is.
    settings |= {"warmup": "false", "late_enqueue": "false"}
    text = 'name: "llm" backend: "jax"\n' + config
    for key, value in (settings | parameters).items():
        text += f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
    (version.parent / "config.pbtxt").write_text(text)


def asks(ids: Sequence[int], **settings: Any) -> dict[str, np.ndarray]:
    """The inputs of a request."""
    inputs: dict[str, np.ndarray] = {"input_ids": np.array(ids, np.int32)}
    types: dict[str, Any] = {"temperature": np.float32, "top_p": np.float32, "seed": np.uint64, "stop": object}
    types |= {"stream": np.bool_, "ignore_eos": np.bool_, "text_input": object, "messages": object}
    for name, value in settings.items():
        inputs[name] = np.array(value if isinstance(value, list) else [value], types.get(name, np.int32))
    return inputs


def drawn(number: int, length: int = 20, tokens: int = 30) -> dict[str, np.ndarray]:
    """A request of its own kind: every second one draws its tokens."""
    return asks(prompt(number, length), max_tokens=tokens, ignore_eos=True, temperature=float(number % 2), seed=number)


@cache
def machine() -> Machine:
    """The same programs, without requests."""
    spec = SlotSpec(MODEL, SLOTS, CONTEXT, (7, 11), block=CONTEXT)
    return Machine(spec, params_of(MODEL, TENSORS))


@cache
def alone(number: int, length: int = 20, tokens: int = 30) -> tuple[list[int], list[float]]:
    """What ``drawn(number)`` gets when nobody else is there."""
    return machine().text(
        prompt(number, length),
        chunk=CHUNK,
        max_tokens=tokens,
        min_tokens=tokens,
        temperature=float(number % 2),
        seed=number,
    )


class Watch(DeviceGate):
    """A gate that knows for whom each program works, and that can be waited for while the event loop stands still."""

    def __init__(self) -> None:
        super().__init__()
        #: The owners of the slots that each program works for, in the order of their dispatch.
        self.owners: list[tuple[int, ...]] = []
        self._in_slot: dict[int, int] = {}
        self._waits = 0
        self._heard = threading.Condition()

    def dispatch(self, turn: Turn) -> bool:
        dispatched = super().dispatch(turn)
        if dispatched and isinstance(turn, SlotTurn) and turn.program is not None:
            self.owners.append(tuple(row.owner for row in turn.program.rows))
            self._in_slot |= {row.slot: row.owner for row in turn.program.rows}
        return dispatched

    def owner_in(self, slot: int | None) -> int:
        """For whom a program worked last there; 0 for nobody."""
        return 0 if slot is None else self._in_slot.get(slot, 0)

    def wait(self, turn: Turn) -> None:
        if isinstance(turn, SlotTurn):
            with self._heard:
                self._waits += 1
                self._heard.notify_all()
        super().wait(turn)

    def block_until_waiting_for(self, program: int) -> None:
        """Sync: until the device thread waits for the ``program``-th (from 1), and so has decided what comes behind."""
        with self._heard:
            assert self._heard.wait_for(lambda: self._waits >= program, timeout=10)


class Text:
    """What one reader got."""

    def __init__(self) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.logs: list[float] = []
        self.finish_reason = ""
        self.error: triton_trio.TritonError | None = None

    @property
    def bits(self) -> tuple[list[int], list[float]]:
        return self.ids, self.logs


class Served:
    """A server with the model."""

    def __init__(self, server: InferenceServer, backend: JaxBackend, gate: DeviceGate | None) -> None:
        self.server = server
        self.backend = backend
        self.gate = gate

    @property
    def model(self) -> ScheduledModel:
        model = self.server.model("llm")
        assert isinstance(model, ScheduledModel)
        return model

    @property
    def device(self) -> DeviceStatistics:
        (statistics,) = self.backend.statistics()
        return statistics

    @property
    def engine(self) -> EngineStatistics:
        backend = self.model.instances[0].statistics().backend
        assert isinstance(backend, EngineStatistics)
        return backend

    async def read(self, request: InferenceRequest, text: Text | None = None) -> Text:
        """Read to the end."""
        text = text or Text()
        try:
            async with self.model.open_responses(request) as responses:
                async for response in responses:
                    if response.outputs:
                        text.text += response.outputs["text_output"][0].decode()
                        text.ids += response.outputs["token_id"].tolist()
                        text.logs += response.outputs["log_probability"].tolist()
                        text.finish_reason = response.outputs["finish_reason"][0].decode()
        except triton_trio.TritonError as exc:
            text.error = type(exc)(*exc.args)
        return text

    async def make(self, inputs: dict[str, np.ndarray]) -> Text:
        """One text; raises its error."""
        text = await self.read(self.model.request(inputs))
        if text.error is not None:
            raise text.error
        return text

    def slot_of(self, request: InferenceRequest) -> int | None:
        """None if it has none."""
        batches = enumerate(instance.batch for instance in self.model.instances)
        members = ((slot, member) for slot, batch in batches if batch is not None for member in batch.members)
        return next((slot for slot, member in members if member.request is request), None)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Whatever happens in the block, programs end afterwards: leaving waits for the device."""
        try:
            yield
        finally:
            if self.gate is not None:
                self.gate.open()

    async def start(self, readers: trio.Nursery, *texts: tuple[InferenceRequest, Text]) -> None:
        """Readers in this order, each one once the one before has its slot or waits for one."""
        for request, text in texts:
            readers.start_soon(self.read, request, text)
            await until(lambda request=request: request.place is not None)

    async def advance(self, programs: int) -> None:
        """Let so many programs end, one after the other; two are on the device again."""
        assert self.gate is not None
        for _ in range(programs):
            ended = self.gate.ended + 1
            self.gate.let_end()
            await until(lambda ended=ended: self.engine.prefills + self.engine.decodes == ended)
            await self.gate.wait_dispatched(ended + 2)

    async def run_until(self, condition: Callable[[], object]) -> None:
        """Let programs end, one after the other, as long as needed; everybody has heard of the last one then."""
        assert self.gate is not None
        while not condition():
            if self.gate.ended < self.gate.dispatched:
                ended = self.gate.ended + 1
                self.gate.let_end()
                await until(lambda ended=ended: self.engine.prefills + self.engine.decodes >= ended)
                await trio.testing.wait_all_tasks_blocked()
            else:
                time.sleep(50e-6)  # noqa: ASYNC251 - as until() does
                await trio.lowlevel.checkpoint()

    async def stands_still(self) -> None:
        """Until no device has anything to do."""
        await until(lambda: not self._at_work)

    @property
    def _at_work(self) -> bool:
        return any(device.jobs for device in self.backend.statistics())

    async def idle(self) -> None:
        """Until every slot that is left waits for a request, and the device too."""
        model = self.model
        able = [instance for instance in model.instances if instance.state is not InstanceState.QUARANTINED]
        await until(lambda: model.scheduler.idle_instances == len(able) and not self._at_work)


@asynccontextmanager
async def open_served(root: Path, *, gate: DeviceGate | None = None, **settings: Any) -> AsyncIterator[Served]:
    """The block ends within 60 seconds, and quiescent."""
    backend = JaxBackend(executor=gate.executor) if gate is not None else JaxBackend()
    with trio.fail_after(60):
        async with triton_trio.open_server(root, backends={"jax": lambda: backend}, **settings) as server:
            served = Served(server, backend, gate)
            with served.opened():
                yield served
            if server.ready:
                await served.idle()
                assert_quiescent(server)
