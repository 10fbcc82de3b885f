"""What a load takes is told, bounded and given back: memory, compilations, the time of a token."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest
import trio
from jax.experimental.compilation_cache import compilation_cache

from triton_trio.backends import ModelContext
from triton_trio.backends.jax import DeviceThread, JaxBackend
from triton_trio.backends.jax.generation import loading
from triton_trio.backends.jax.generation.engine import EngineStatistics, SlotPrograms
from triton_trio.backends.jax.generation.loading import LoadStatistics
from triton_trio.backends.jax.generation.programs import LlamaPrograms, ProgramMemory
from triton_trio.backends.jax.generation.schedule import Program
from triton_trio.config import load_model_config
from triton_trio.errors import InvalidArgument
from triton_trio.testing import Victim, sweep

from ..world import COUNTDOWN, COUNTDOWN_CONFIG, CPU, open_world, write_model
from .served import CHUNK, CONTEXT, alone, asks, drawn, machine, open_served, write_language_model

SMALL = {"slots": 1, "context": 32, "prefill_chunk": 8, "warmup": "true"}


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[str]:
    """A directory for compiled programs; what JAX had before comes back."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: jax.config.values[name] for name in names}
    yield str(tmp_path / "cache")
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


class Once:
    """Programs that are compiled for the first load only: what is left of a load is no matter of them."""

    def __init__(self) -> None:
        self._programs: LlamaPrograms | None = None

    def __call__(self, *arguments: Any) -> LlamaPrograms:
        if self._programs is None:
            made: Any = LlamaPrograms(*arguments)
            made.prefill, made.decode = functools.cache(made.prefill), functools.cache(made.decode)
            self._programs = made
        return self._programs


@asynccontextmanager
async def loaded(root: Path, backend: JaxBackend):  # type: ignore[no-untyped-def]
    """One slot, and what the load was."""
    directory = root / "llm"
    config = backend.auto_complete(load_model_config(directory), directory)
    async with backend.open_model(ModelContext(config, 1, directory, directory / "1")) as model:
        async with model.open_instance(CPU) as instance:
            statistics = instance.statistics()
            assert isinstance(statistics, EngineStatistics)
            assert statistics.load is not None
            yield statistics.load


async def test_every_program_runs_once_and_how_long_a_cancel_waits_is_published(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "triton_trio.jax")
    write_language_model(tmp_path, warmup="true", target_chunk_ms=1e-4)
    async with open_served(tmp_path) as served:
        load = served.engine.load
        assert load is not None
        assert load.compiles == 3  # an empty cache, a prefill, a decode
        assert load.params_bytes > 0
        assert load.cache_bytes >= served.engine.cache_bytes
        assert load.step_ms is not None
        assert load.prefill_ms is not None
        assert load.cancel_ms is not None
        assert load.cancel_ms >= 2 * max(load.step_ms, load.prefill_ms)
        assert (served.engine.prefills, served.engine.decodes) == (0, 0)
        # Nothing is left that a text could see.
        assert (await served.make(drawn(1))).bits == alone(1)
    warning, info = (record.getMessage() for record in caplog.records if record.name == "triton_trio.jax")
    assert warning.startswith("model 'llm': one token for 3 slot(s) takes ")
    assert "more than target_chunk_ms=0.0001: a cancel waits for no less, and for up to " in warning
    assert info.startswith("model 'llm' on cpu:0: 3 slots of 100 tokens; 0.1 MiB of parameters, 0.1 of KV cache, ")
    assert "a cancel waits for one token at least, for " in info


@pytest.mark.parametrize(
    ("ladder", "target", "cancel_ms"),
    [
        ((1,), 200e-3, 10.0),  # a program has one token, however much time it might take
        ((1, 2, 4), 200e-3, 16.0),  # it may have four
        ((1, 2, 4), 7e-3, 14.0),  # as many as fit
    ],
)
async def test_a_cancel_waits_at_most_for_two_of_the_longest_programs(
    monkeypatch: pytest.MonkeyPatch, ladder: tuple[int, ...], target: float, cancel_ms: float
) -> None:
    async def run_first(*_: object) -> tuple[list[float], list[float]]:
        return [4e-3, 2e-3, 1e-3], [9e-3, 3e-3, 5e-3]

    monkeypatch.setattr(loading, "run_first", run_first)
    programs: Any = SimpleNamespace(load=LoadStatistics(("cpu:0",), 0, 0, 0, 0, 0), decode=dict.fromkeys(ladder))
    await loading.warm_up("llm", programs, cast("Any", None), target, 10.0)
    assert (programs.load.step_ms, programs.load.prefill_ms) == pytest.approx((1.0, 3.0))
    assert programs.load.cancel_ms == pytest.approx(cancel_ms)


async def test_programs_are_measured_where_the_context_ends() -> None:
    """They take longer there than at its beginning."""
    ran: list[Program] = []

    class Watched(SlotPrograms):
        def run(self, program: Program) -> Any:
            ran.append(program)
            emitted = super().run(program)
            if program.steps:
                assert np.asarray(emitted.owner).all()
            return emitted

    made = machine()
    programs = Watched(made.programs, made.params, {CHUNK: made.prefill(CHUNK)}, {1: made.decode(1)})
    device = DeviceThread("cpu:0")
    await loading.run_first("llm", programs, device, 10.0)
    device.close()
    # Behind a piece is room for the steps that follow: 1, and three times 1.
    assert {(one.length, one.chunk.start) for one in ran if one.chunk is not None} == {(CHUNK, CONTEXT - CHUNK - 4)}
    assert [one.steps for one in ran if one.steps] == [1, 1, 1]


async def test_dtype_is_that_of_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And on a CPU of nothing else: the cache has float32, as without it."""
    for makes in ("prefill", "decode"):  # which takes seconds, and no program runs here
        monkeypatch.setattr(LlamaPrograms, makes, lambda programs, size: None)
    monkeypatch.setattr(ProgramMemory, "of", lambda compiled: ProgramMemory(0, 0, 0, 0, 0))
    loads = {}
    for name in ("float32", "bfloat16", "int8"):
        write_language_model(tmp_path / name, **SMALL | {"dtype": name, "warmup": "false"})
        async with loaded(tmp_path / name, JaxBackend()) as load:
            loads[name] = load
    for name, bytes_of_a_number in (("bfloat16", 2), ("int8", 1)):
        assert loads[name].cache_bytes == loads["float32"].cache_bytes
        ratio = loads[name].params_bytes / loads["float32"].params_bytes
        assert bytes_of_a_number / 4 < ratio < bytes_of_a_number / 4 + 0.15  # norms, and scales, are float32


async def test_what_does_not_fit_is_refused_with_its_figures(tmp_path: Path) -> None:
    write_language_model(tmp_path, **SMALL | {"slots": 64, "device_memory_limit_mb": 0.5})
    backend = JaxBackend()
    with pytest.raises(InvalidArgument) as caught:
        async with loaded(tmp_path, backend):
            pass
    assert caught.value.message.startswith("model 'llm' needs ")
    assert "MiB on cpu:0, more than device_memory_limit_mb=0.5: 0.1 MiB of parameters, " in caught.value.message
    assert "of KV cache for 64 slots of 32 tokens; set fewer slots" in caught.value.message
    assert backend.statistics() == ()


async def test_a_program_that_needs_too_much_is_named_and_a_cache_that_is_copied_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = ProgramMemory.of
    monkeypatch.setattr(ProgramMemory, "of", lambda compiled: replace(of(compiled), aliased=0, temporary=2 << 20))
    write_language_model(tmp_path, **SMALL | {"device_memory_limit_mb": 1})
    with pytest.raises(InvalidArgument, match=r", and 2\.0 while a piece of 8 tokens is made; set fewer slots"):
        async with loaded(tmp_path, JaxBackend()):
            pass
    assert caplog.records[0].getMessage().startswith("model 'llm': a piece of 8 tokens: only 0 of the ")


async def test_a_second_load_finds_its_programs_in_the_cache_and_can_be_left_anywhere(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_language_model(tmp_path, **SMALL)
    backend = JaxBackend()
    backend.configure({"compilation_cache_dir": cache})
    async with loaded(tmp_path, backend) as load:
        assert (load.compiles, load.compiles_cached) == (3, 0)
    monkeypatch.setattr(loading, "LlamaPrograms", Once())
    async with loaded(tmp_path, backend) as load:
        assert (load.compiles, load.compiles_cached) == (3, 3)
    await trio.to_thread.run_sync(gc.collect)
    arrays = len(jax.live_arrays())

    async def scenario(victim: Victim) -> None:
        with victim:
            async with loaded(tmp_path, backend):
                pass
        assert backend.statistics() == ()  # no thread
        await trio.to_thread.run_sync(
            gc.collect
        )  # in the thread that loaded, which forgets its result with its next job
        assert len(jax.live_arrays()) == arrays

    assert await sweep(scenario) > 20


async def test_a_step_models_second_load_too(tmp_path: Path, cache: str) -> None:
    context = write_model(tmp_path, COUNTDOWN, COUNTDOWN_CONFIG, max_batch_size=1, ladder=1)
    backend = JaxBackend()
    backend.configure({"compilation_cache_dir": cache})
    for first in (True, False):
        async with open_world(context, backend=backend) as world:
            assert world.placed.compiles > 2
            assert world.placed.compiles_cached == (0 if first else world.placed.compiles)

    async def scenario(victim: Victim) -> None:
        with victim:
            async with open_world(context, backend=backend):
                pass
        assert backend.statistics() == ()

    assert await sweep(scenario) > 20


async def test_settings_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="it has no setting 'cache', only compilation_cache_dir"):
        JaxBackend().configure({"cache": "x"})
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match=r"compilation_cache_dir '.*file' cannot be made: "):
        JaxBackend().configure({"compilation_cache_dir": str(tmp_path / "file")})


async def test_a_model_without_a_tokenizer_is_served_by_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_language_model(tmp_path, **SMALL | {"warmup": "false"})
    (tmp_path / "llm" / "1" / "tokenizer.json").unlink()
    async with open_served(tmp_path) as served:
        text = await served.make(asks([12, 13], max_tokens=5, ignore_eos=True))
        assert (len(text.ids), text.text, text.finish_reason) == (5, "", "length")
        for asked, what in (
            ({"text_input": np.array(["w12"], object)}, "text_input"),
            (asks([12], stop=["w13"]), "stop"),
        ):
            with pytest.raises(
                InvalidArgument, match=rf"{what} needs the model's tokenizer, and '.*' has no tokenizer\.js"
            ):
                await served.make(asked)
    assert "has no tokenizer.json: it serves input_ids only" in caplog.text
