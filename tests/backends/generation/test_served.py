"""A language model behind the server: slots that change owners."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import trio
import trio.testing

import triton_trio
from triton_trio import Reason, RequestCancelled
from triton_trio.errors import InternalError, InvalidArgument
from triton_trio.testing import Victim, sweep
from triton_trio.testing.device import DeviceGate

from .served import CONTEXT, SLOTS, Text, alone, asks, drawn, open_served, write_language_model
from .tiny import prompt

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


async def test_chunks_of_several_tokens_make_the_same_text(tmp_path: Path) -> None:
    write_language_model(tmp_path, ladder="1,4", target_chunk_ms=1000)
    async with open_served(tmp_path) as served:
        for number in (1, 2):
            assert (await served.make(drawn(number))).bits == alone(number)
        engine = served.engine
        assert engine.steps > 2 * engine.decodes


async def test_a_text_that_is_not_streamed_comes_whole(tmp_path: Path) -> None:
    write_language_model(tmp_path, "model_transaction_policy { decoupled: false }\n")
    async with open_served(tmp_path) as served:
        ids, logs = alone(2)
        response = await served.model.infer(served.model.request(drawn(2)))
        assert response.outputs["token_id"].tolist() == ids
        assert response.outputs["log_probability"].tolist() == logs
        assert response.outputs["text_output"][0].decode() == " ".join(f"w{token}" for token in ids)
        assert response.outputs["finish_reason"][0] == b"length"


async def test_why_a_text_ends(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    async with open_served(tmp_path) as served:
        ids, _ = alone(2)
        text = await served.make(drawn(2))
        assert (text.text, text.finish_reason) == (" ".join(f"w{token}" for token in ids), "length")

        stop = f"w{ids[9]} w{ids[10]}"
        text = await served.make(drawn(2) | asks([], stop=[b"never", stop.encode()], input_ids=prompt(2, 20)))
        assert text.finish_reason == "stop"
        assert text.text + stop == " ".join(f"w{token}" for token in ids)[: len(text.text + stop)]
        assert stop not in text.text

        # Its row goes on until the device hears of it; the slot's next owner does not notice.
        assert (await served.make(drawn(4))).bits == alone(4)

        longest = b" ".join(b"w%d" % token for token in prompt(8, CONTEXT)) + b" " * 9000
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
            (asks([3], temperature=float("nan")), "temperature must be 0 or more, got nan"),
            (asks([3], top_p=1.5), "top_p must be between 0 and 1, got 1.5"),
            (asks([3], stop=[b""]), "a stop string is empty"),
        ):
            with pytest.raises(InvalidArgument, match=words):
                await served.make(inputs)
        assert served.engine.schedule.generations == 0
        assert (await served.make(drawn(1))).bits == alone(1)


# Cancels


@pytest.mark.parametrize("ended", [0, 1, 2, 5, 6, 12, 30])
async def test_law_7_survivors_are_bit_equal_whenever_others_leave(tmp_path: Path, ended: int) -> None:
    """Prompts of two pieces: the device is at the first piece, at the last, between two tokens, or at another prompt."""
    write_language_model(tmp_path)
    gate = DeviceGate()
    async with open_served(tmp_path, gate=gate) as served:
        requests = [served.model.request(drawn(number)) for number in range(6)]
        texts = [Text() for _ in requests]
        async with trio.open_nursery() as readers:
            await served.start(readers, *zip(requests, texts, strict=True))
            await gate.wait_dispatched(2)
            await served.advance(ended)
            requests[1].cancel(Reason.ADMIN)  # has a slot
            requests[4].cancel(Reason.ADMIN)  # is in the queue
            gate.open()
        for number in (0, 2, 3, 5):
            assert texts[number].bits == alone(number)
        for number in (1, 4):
            assert isinstance(texts[number].error, RequestCancelled)
            assert texts[number].ids == alone(number)[0][: len(texts[number].ids)]
        assert texts[4].ids == []


async def test_a_cancel_waits_for_two_programs_and_the_slot_goes_on(tmp_path: Path) -> None:
    write_language_model(tmp_path, slots=1)
    gate = DeviceGate()
    async with open_served(tmp_path, gate=gate) as served:
        requests = [served.model.request(drawn(number, 10, 60)) for number in range(2)]
        texts = [Text(), Text()]
        async with trio.open_nursery() as readers:
            readers.start_soon(served.read, requests[0], texts[0])
            await gate.wait_dispatched(2)
            await served.advance(10)
            await served.start(readers, (requests[1], texts[1]))
            requests[0].cancel(Reason.ADMIN)
            await trio.testing.wait_all_tasks_blocked()
            gate.let_end(2)
            # The next program is the next owner's prompt.
            await gate.wait_dispatched(13)
            assert gate.steps[:13] == [0] + [1] * 11 + [0]
            gate.open()
        assert isinstance(texts[0].error, RequestCancelled)
        assert len(texts[1].ids) == 60
        schedule = served.engine.schedule
        assert (schedule.evictions, schedule.stale_tokens >= 2) == (1, True)
        assert schedule.wasted_seconds > 0


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


async def test_nothing_compiles_after_the_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_language_model(tmp_path, ladder="1,2", target_chunk_ms=1000)
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
    write_language_model(tmp_path, context=128)
    async with open_served(tmp_path) as served:
        slow = served.model.request(drawn(2, 10, 110))
        async with served.model.open_responses(slow) as responses:
            first = await anext(responses)
            assert first.outputs["token_id"].tolist() == alone(2, 10)[0][:1]
            text = await served.make(drawn(3, 10, 110))
            assert len(text.ids) == 110
            await served.stands_still()
            assert served.engine.schedule.held == 1
            made = served.engine.schedule.tokens - 110
            assert made < 80
            rest = [response.outputs["token_id"].tolist() async for response in responses if response.outputs]
        assert sum(map(len, rest)) == 109


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


async def test_an_unload_ends_texts_and_the_model_comes_back(tmp_path: Path) -> None:
    write_language_model(tmp_path)
    gate = DeviceGate()
    async with open_served(tmp_path, gate=gate, explicit=True, load_models=["llm"]) as served:
        text = Text()
        async with trio.open_nursery() as readers:
            readers.start_soon(served.read, served.model.request(drawn(1)), text)
            await gate.wait_dispatched(2)
            await served.advance(6)
            gate.open()
            await served.server.unload_model("llm")
        await served.server.load_model("llm")
        assert text.error is not None or text.bits == alone(1)
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
