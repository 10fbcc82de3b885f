"""A language model behind the server: slots that change owners."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import trio
import trio.testing

import triton_trio
from triton_trio import Reason, RequestCancelled
from triton_trio.backends.jax.generation import Tokenizer
from triton_trio.errors import InternalError, InvalidArgument, Unavailable
from triton_trio.testing import Victim, sweep
from triton_trio.testing.device import DeviceGate

from ..world import until
from .served import CHUNK, CONTEXT, SLOTS, Text, Watch, alone, asks, drawn, machine, open_served, write_language_model
from .test_weights import MODEL, TENSORS
from .tiny import log_softmax, prompt, reference_logits

# Texts


async def test_a_text_is_the_models_own_with_one_reader_or_many(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    lengths = {1: 1, 2: 16, 3: 17, 4: 60, 5: 20, 6: 33, 7: 70}
    async with open_served(tmp_path) as served:
        assert (await served.make(drawn(4, 60))).bits == alone(4, 60)
        texts = {number: Text() for number in lengths}
        async with trio.open_nursery() as readers:
            for number, length in lengths.items():
                readers.start_soon(served.read, served.model.request(drawn(number, length)), texts[number])
        assert {number: text.bits for number, text in texts.items()} == {
            number: alone(number, length) for number, length in lengths.items()
        }
        schedule = served.engine.schedule
        assert (schedule.generations, schedule.slots_in_use, schedule.evictions) == (8, 0, 0)
        assert schedule.tokens == 8 * 30
        assert schedule.prompt_tokens == 60 + sum(lengths.values())


async def test_chunks_of_several_tokens_make_the_same_text_and_only_when_nobody_waits(tmp_path: Path) -> None:
    write_language_model(tmp_path, ladder="1,4", target_chunk_ms=1000)
    gate = DeviceGate()
    async with open_served(tmp_path, gate=gate) as served:
        texts = {number: Text() for number in range(SLOTS + 1)}
        async with trio.open_nursery() as readers:
            await served.start(readers, *((served.model.request(drawn(n)), text) for n, text in texts.items()))
            gate.open()
        assert {number: text.bits for number, text in texts.items()} == {number: alone(number) for number in texts}
        last = max(number for number, steps in enumerate(gate.steps) if not steps)  # piece of the one who had to wait
        assert set(gate.steps[:last]) == {0, 1}
        assert 4 in gate.steps[last:]


@pytest.mark.parametrize("streamed", [True, False])
async def test_greedy_texts_are_an_unbatched_references_in_a_full_batch_that_others_leave(
    tmp_path: Path, streamed: bool
) -> None:
    write_language_model(tmp_path, "" if streamed else "model_transaction_policy { decoupled: false }\n")
    lengths = {1: 1, 2: 16, 3: 17, 4: 60, 5: 20, 6: 33, 7: 40, 8: 5, 9: 25}
    prompts = {number: prompt(number, length) for number, length in lengths.items()}
    async with open_served(tmp_path) as served:
        requests = {number: served.model.request(asks(ids, max_tokens=25)) for number, ids in prompts.items()}
        texts = {number: Text() for number in prompts}

        async def read(number: int) -> None:
            if streamed:
                await served.read(requests[number], texts[number])
                return
            with suppress(RequestCancelled):
                outputs = (await served.model.infer(requests[number])).outputs
                texts[number].ids = outputs["token_id"].tolist()
                texts[number].logs = outputs["log_probability"].tolist()
                texts[number].text = outputs["text_output"][0].decode()
                texts[number].finish_reason = outputs["finish_reason"][0].decode()

        async with trio.open_nursery() as readers:
            for number in prompts:
                readers.start_soon(read, number)
            for leaver in (2, 5, 7):  # executing, or still in the queue
                await until(lambda leaver=leaver: served.engine.decodes > 3 * leaver)
                requests[leaver].cancel(Reason.CLIENT_RESET)
    for number in set(prompts) - {2, 5, 7}:
        ids, logs, why = reference(prompts[number], 25)
        assert (texts[number].ids, texts[number].finish_reason) == (ids, why)
        assert texts[number].text == words(ids)
        np.testing.assert_allclose(texts[number].logs, logs, atol=5e-5)


def words(ids: list[int]) -> str:
    """What a text says that goes on behind others."""
    return "".join(f" w{token}" for token in ids)


def reference(ids: list[int], most: int) -> tuple[list[int], list[float], str]:
    """Greedy: the whole text through the whole model for each token, in float64."""
    made: list[int] = []
    logs: list[float] = []
    while len(made) < most:
        row = log_softmax(reference_logits(MODEL, TENSORS, ids + made)[-1])
        made.append(int(row.argmax()))
        logs.append(float(row.max()))
        if made[-1] in (7, 11):
            return made, logs, "stop"
    return made, logs, "length"


async def test_what_a_request_may_ask_for(tmp_path: Path) -> None:
    """Each setting comes through to the program, with its own effect."""
    write_language_model(tmp_path)
    async with open_served(tmp_path) as served:

        async def make(**settings: Any) -> tuple[list[int], list[float]]:
            text = await served.make(asks(prompt(1, 9), **settings))
            assert text.bits == machine().text(prompt(1, 9), chunk=CHUNK, **settings)
            return text.bits

        hot = {"temperature": 50.0, "max_tokens": 80}
        ids, _ = await make(**hot, seed=1)
        assert ids[-1] in (7, 11) and len(ids) < 80
        assert (await make(**hot, seed=2))[0] != ids
        later, _ = await make(**hot, seed=1, min_tokens=len(ids) + 5)
        assert not {7, 11} & set(later[: len(ids) + 4])
        greedy, _ = await make(max_tokens=10, min_tokens=10)
        assert (await make(max_tokens=10, min_tokens=10, temperature=2.0, top_k=1, seed=3))[0] == greedy
        assert (await make(max_tokens=10, min_tokens=10, temperature=2.0, top_p=0.01, seed=3))[0] == greedy
        assert (await make(max_tokens=10, min_tokens=10, temperature=2.0, seed=3))[0] != greedy


async def test_a_text_that_goes_on_begins_with_a_space_and_an_answer_does_not(tmp_path: Path) -> None:
    """Where words have their spaces in front: what comes behind the prompt is another text than what answers it."""
    write_language_model(tmp_path)
    async with open_served(tmp_path) as served:
        settings = {"max_tokens": np.array([5], np.int32), "ignore_eos": np.array([True])}
        text = await served.make(settings | {"text_input": np.array([b"w3 w5"], object)})
        assert text.text == words(text.ids)
        talk = np.array([b'[{"role": "user", "content": "w3 w5"}]'], object)
        text = await served.make(settings | {"messages": talk})
        assert " " + text.text == words(text.ids)


async def test_why_a_text_ends(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    async with open_served(tmp_path) as served:
        ids, _ = alone(2)
        text = await served.make(drawn(2))
        assert (text.text, text.finish_reason) == (words(ids), "length")

        stop = f"w{ids[9]} w{ids[10]}"
        text = await served.make(drawn(2) | asks([], stop=[b"never", stop.encode()], input_ids=prompt(2, 20)))
        assert text.finish_reason == "stop"
        assert text.text + stop == words(ids)[: len(text.text + stop)]
        assert stop not in text.text

        # Its row goes on until the device hears of it; the slot's next owner does not notice.
        assert (await served.make(drawn(4))).bits == alone(4)

        longest = b" ".join(b"w%d" % token for token in prompt(8, CONTEXT))
        text = await served.make({"text_input": np.array([longest], object)})
        assert len(text.ids) == 1  # there is room for no more

        text = await served.make(asks(prompt(8, CONTEXT - 2)))
        assert len(text.ids) <= 3
        ends = [served_ids for served_ids in (text.ids[-1:],) if served_ids[0] in (7, 11)]
        assert text.finish_reason == ("stop" if ends else "length")


async def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    async with open_served(tmp_path) as served:
        for inputs, words in (
            (asks(prompt(1, CONTEXT + 1)), f"has {CONTEXT + 1} tokens, and the model's context is {CONTEXT}"),
            (
                asks([3], text_input=b"w3"),
                "give one of text_input, messages, input_ids as the prompt, got text_input and",
            ),
            ({"max_tokens": np.array([3], np.int32)}, "as the prompt, got none"),
            (asks([]), "the prompt is empty"),
            (asks([96]), "token ids are 0 to 95, got 96 to 96"),
            (asks([3], max_tokens=0), "max_tokens must be 1 or more, got 0"),
            (asks([3], max_tokens=3, min_tokens=4), "min_tokens is 4, more than max_tokens, 3"),
            (asks([3], min_tokens=101), "min_tokens is 101, more than there is room for, 100"),
            (asks([3], temperature=float("nan")), "temperature must be 0 or more, got nan"),
            (asks([3], top_p=1.5), "top_p must be between 0 and 1, got 1.5"),
            (asks([3], top_p=1.0000001), "top_p must be between 0 and 1, got 1.0000001"),
            (asks([3], stop=[b""]), "a stop string is empty"),
            (asks([3], stop=[b"a"] * 33), "there are 33 stop strings, and a request may have 32"),
            (asks([3], stop=[b"a" * 2049]), "the stop strings have 2049 characters, and a request may have 2048"),
            (asks([3], stop=["\N{FOX FACE}".encode() * 3000]), "the stop strings have 12000 bytes"),
            ({"messages": np.array([b"[" * 3200], object)}, "messages is not JSON: maximum recursion depth"),
            ({"messages": np.array([b"[" * 3201], object)}, "messages has 3201 bytes; what has more than 3200 cannot"),
            (
                {"text_input": np.array([b"w3 " * 134], object)},
                "text_input has 402 bytes; what has more than 400 cannot",
            ),
            (
                {"messages": np.array([b'[{"role":"user","content":"%s"}]' % (b"w3 " * 133)], object)},
                "the conversation has 4.. characters; what has more than 400 cannot fit",
            ),
        ):
            with pytest.raises(InvalidArgument, match=words):
                await served.make(inputs)
        assert served.engine.schedule.generations == 0
        assert (await served.make(drawn(1))).bits == alone(1)


async def test_an_answer_has_the_outputs_of_the_configuration_and_no_others(tmp_path: Path) -> None:
    write_language_model(tmp_path, 'output [{ name: "finish_reason" data_type: TYPE_STRING dims: [1] }]\n')
    async with open_served(tmp_path) as served:
        async with served.model.open_responses(served.model.request(drawn(1))) as responses:
            answers = [response.outputs async for response in responses if response.outputs]
        assert {tuple(answer) for answer in answers} == {("finish_reason",)}


# Cancels


async def test_a_text_that_is_being_cut_is_left_at_once_and_nothing_waits_for_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog took the thread for the device, and gave up a device that had nothing to do."""
    write_language_model(tmp_path)
    monkeypatch.setattr("triton_trio.backends.jax.generation.instance.LONG", 100)
    began, go_on = trio.Event(), threading.Event()
    ended: list[str] = []
    token = trio.lowlevel.current_trio_token()
    encode = Tokenizer.encode

    def slow(self: Tokenizer, text: str) -> list[int]:
        if len(text) > 100:
            token.run_sync_soon(began.set)
            go_on.wait(10)
            ended.append(text)
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    async with open_served(tmp_path) as served:
        request = served.model.request({"text_input": np.array([b"w3 " * 50], object)})
        text = Text()
        try:
            async with trio.open_nursery() as readers:
                readers.start_soon(served.read, request, text)
                await began.wait()
                (instance,) = (each for each in served.model.instances if each.batch is not None)
                instance._backend.abandon()  # as the watchdog would
                assert not instance._backend.availability.why
                request.cancel(Reason.ADMIN)
                await served.idle()
                assert not ended  # or the thread was waited for, until it would wait no longer
                assert (await served.make(drawn(1))).bits == alone(1)
            assert isinstance(text.error, RequestCancelled)
        finally:
            go_on.set()


async def test_a_cancel_waits_for_two_programs_and_the_slot_goes_on(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    gate = DeviceGate()
    async with open_served(tmp_path, gate=gate) as served:
        requests = [served.model.request(drawn(number, 10, 60)) for number in range(SLOTS + 1)]
        texts = [Text() for _ in requests]
        async with trio.open_nursery() as readers:
            await served.start(readers, *zip(requests, texts, strict=True))
            await served.run_until(lambda: all(text.ids for text in texts[:SLOTS]))
            dispatched = gate.ended + 2
            await gate.wait_dispatched(dispatched)
            for request in requests[:SLOTS]:
                request.cancel(Reason.ADMIN)
            await trio.testing.wait_all_tasks_blocked()
            gate.let_end(2)
            await gate.wait_dispatched(dispatched + 1)
            assert gate.steps[dispatched] == 0  # the next program is the next owner's prompt
            gate.open()
        assert all(isinstance(text.error, RequestCancelled) for text in texts[:SLOTS])
        assert texts[SLOTS].bits == alone(SLOTS, 10, 60)
        schedule = served.engine.schedule
        assert (schedule.evictions, schedule.stale_tokens >= SLOTS) == (SLOTS, True)
        assert schedule.wasted_seconds > 0


async def test_with_late_enqueue_a_cancel_waits_for_one_program(tmp_path: Path) -> None:
    write_language_model(tmp_path, late_enqueue="true")
    gate = DeviceGate()
    async with open_served(tmp_path, gate=gate) as served:
        request = served.model.request(drawn(2, 10, 60))
        text = Text()
        async with trio.open_nursery() as readers:
            await served.start(readers, (request, text))
            # Nobody knows yet how long a token takes, and then one is known.
            await gate.wait_dispatched(2)
            gate.let_end()
            await until(lambda: served.engine.prefills == 1)
            await (
                trio.testing.wait_all_tasks_blocked()
            )  # the next turn is in line: a thread that the gate holds reads no mail
            gate.let_end()
            await gate.wait_held(1)
            assert (gate.ended, gate.dispatched) == (2, 3)
            request.cancel(Reason.ADMIN)
            gate.open()
        assert isinstance(text.error, RequestCancelled)
        await served.idle()
        assert gate.dispatched == 3
        assert (await served.make(drawn(3))).bits == alone(3)


async def test_a_long_prompt_is_left_between_its_pieces(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    gate = DeviceGate()
    async with open_served(tmp_path, gate=gate) as served:
        request = served.model.request(drawn(1, 90, 5))
        text = Text()
        async with trio.open_nursery() as readers:
            readers.start_soon(served.read, request, text)
            await gate.wait_dispatched(2)
            request.cancel(Reason.ADMIN)
            gate.open()
        await served.idle()
        assert gate.dispatched == 2  # of 6
        assert (await served.make(drawn(2))).bits == alone(2)


async def test_a_live_request_behind_ten_cancelled_prompts_is_next(tmp_path: Path) -> None:
    """The two pieces that were on the device end, and then it is the live one's turn."""
    write_language_model(tmp_path)
    gate = DeviceGate()
    async with open_served(tmp_path, gate=gate) as served:
        long = [served.model.request(drawn(number, 90, 5)) for number in range(10)]
        text = Text()
        async with trio.open_nursery() as readers:
            await served.start(readers, *((request, Text()) for request in long))
            await served.start(readers, (served.model.request(drawn(2, 16)), text))
            await gate.wait_dispatched(2)
            for request in long:
                request.cancel(Reason.ADMIN)
            await trio.testing.wait_all_tasks_blocked()
            gate.open()
        assert text.bits == alone(2, 16)
        assert gate.steps == [0, 0, 0] + [1] * 29


async def test_a_short_prompt_comes_before_the_rest_of_a_long_one(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    watch = Watch()
    async with open_served(tmp_path, gate=watch) as served:
        long, short = Text(), Text()
        async with trio.open_nursery() as readers:
            await served.start(readers, (served.model.request(drawn(2, 90, 5)), long))
            await watch.wait_dispatched(2)
            await served.start(readers, (served.model.request(drawn(3, 9, 5)), short))
            await served.run_until(lambda: short.ids)
            # The two that were on the device when it came, its own, and one whose end had to be heard of.
            assert watch.ended <= 4
            assert not long.ids
            watch.open()
        assert (long.bits, short.bits) == (alone(2, 90, 5), alone(3, 9, 5))


async def test_nothing_compiles_after_the_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_language_model(tmp_path, ladder="1,4", target_chunk_ms=1000)
    async with open_served(tmp_path) as served:
        jax.config.update("jax_log_compiles", True)
        try:
            for number in (1, 2):
                await served.make(drawn(number, 40) | asks(prompt(number, 40), top_k=5, top_p=0.5, stop=[b"w12 w13"]))
            assert not [record for record in caplog.records if "compil" in record.message.lower()]
            jax.jit(lambda x: x + number)(1.0)
            assert [record for record in caplog.records if "compil" in record.message.lower()]
        finally:
            jax.config.update("jax_log_compiles", False)
        assert served.engine.compiles == 3


async def test_law_7_a_cancel_at_every_scheduling_point(tmp_path: Path) -> None:
    """The neighbour's text is the same, the slots come back."""
    write_language_model(tmp_path)
    async with open_served(tmp_path) as served:

        async def scenario(victim: Victim) -> None:
            async def leave() -> None:
                with victim:
                    await served.make(drawn(3, 20, 4))

            text = Text()
            async with trio.open_nursery() as readers:
                readers.start_soon(served.read, served.model.request(drawn(2, 5, 6)), text)
                readers.start_soon(leave)
            assert text.bits == alone(2, 5, 6)
            await served.idle()

        # How many there are depends on how many tokens come at once.
        assert await sweep(scenario) > 5
        assert (await served.make(drawn(1))).bits == alone(1)


# Readers


async def test_b9_a_slow_reader_is_held_and_holds_nobody(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    async with open_served(tmp_path) as served:
        slow = served.model.request(drawn(2, 10, 90))
        async with served.model.open_responses(slow) as responses:
            first = await anext(responses)
            assert first.outputs["token_id"].tolist() == alone(2, 10)[0][:1]
            text = await served.make(drawn(3, 10, 90))
            assert len(text.ids) == 90
            await served.stands_still()
            assert served.engine.schedule.held == 1
            made = served.engine.schedule.tokens - 90
            assert made < 70
            rest = [response.outputs["token_id"].tolist() async for response in responses if response.outputs]
        assert sum(map(len, rest)) == 89


# Errors


async def test_c6_an_error_on_the_device_fails_the_texts_there_and_nobody_else(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    gate = DeviceGate()
    gate.fail(9, "RESOURCE_EXHAUSTED: out of memory")
    async with open_served(tmp_path, gate=gate) as served:
        texts = [Text() for _ in range(SLOTS + 2)]
        async with trio.open_nursery() as readers:
            await served.start(readers, *((served.model.request(drawn(n)), text) for n, text in enumerate(texts)))
            await gate.wait_dispatched(2)
            gate.open()
        for text in texts[:SLOTS]:
            assert isinstance(text.error, InternalError)
            assert "RESOURCE_EXHAUSTED: out of memory" in str(text.error)
        for number in range(SLOTS, SLOTS + 2):
            assert texts[number].bits == alone(number)
        assert served.engine.resets == 1


@pytest.mark.parametrize("grace", [0.0, 30.0])
async def test_an_unload_ends_texts_after_its_grace_and_the_model_comes_back(tmp_path: Path, grace: float) -> None:
    write_language_model(tmp_path)
    gate = DeviceGate()
    explicit: dict[str, Any] = {"explicit": True, "load_models": ["llm"], "unload_grace": grace}
    async with open_served(tmp_path, gate=gate, **explicit) as served:
        text = Text()
        async with trio.open_nursery() as readers:
            readers.start_soon(served.read, served.model.request(drawn(1)), text)
            await gate.wait_dispatched(2)
            await served.advance(6)
            if grace:
                gate.open()
            async with trio.open_nursery() as unloading:
                unloading.start_soon(served.server.unload_model, "llm")
                if not grace:
                    await until(lambda: text.error is not None)
                    gate.open()
        await served.server.load_model("llm")
        if grace:
            assert text.bits == alone(1)
        else:
            assert isinstance(text.error, Unavailable)
            assert "being unloaded" in text.error.message
        assert (await served.make(drawn(2))).bits == alone(2)


# Configuration


@pytest.mark.parametrize(
    ("config", "parameters", "words"),
    [
        ("max_batch_size: 4\n", {}, "max_batch_size must be 0, got 4"),
        ("", {"slots": 0}, "parameter slots in config.pbtxt must be a number of slots"),
        ("", {"ladder": "2,4"}, "with 1, got '2,4'"),
        ("", {"weights": "elsewhere"}, "no model weights at"),
        ("", {"model_format": "gpt"}, "must be 'llama'"),
        ("instance_group [{ count: 2 kind: KIND_CPU }]\n", {}, "leave count at 1"),
        ('input [{ name: "prompt" data_type: TYPE_STRING dims: [1] }]\n', {}, "has no input 'prompt'"),
        ('output [{ name: "text_output" data_type: TYPE_INT32 dims: [1] }]\n', {}, "must be TYPE_STRING"),
    ],
)
async def test_configurations_that_cannot_be(
    tmp_path: Path, config: str, parameters: dict[str, object], words: str
) -> None:
    write_language_model(tmp_path, config, **parameters)
    with pytest.raises(triton_trio.TritonError, match=words):
        async with open_served(tmp_path):
            pass
