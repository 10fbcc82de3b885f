"""Where instances are, how many, and which of them gets a request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

import pytest
from trio.testing import wait_all_tasks_blocked

from tests.callers import calling
from triton_trio import InvalidArgument, Outcome
from triton_trio.backends import ModelContext, Placement
from triton_trio.config import InstanceGroup, ModelConfig, parse_model_config
from triton_trio.instance import InstanceState
from triton_trio.testing import ScriptedBackend, scripted_config
from triton_trio.testing.fixtures import Serve
from triton_trio.testing.scripted import ScriptedInstance, ScriptedModel


def grouped(*groups: str) -> str:
    config = scripted_config()
    return config.replace("instance_group [{ count: 1, kind: KIND_CPU }]", "") + "".join(
        f"\ninstance_group {{ {group} }}" for group in groups
    )


class ModelSpy(ScriptedModel):
    def __init__(self, backend: Spy) -> None:
        super().__init__(backend)
        self._spy = backend

    def open_instance(  # type: ignore[override]
        self, placement: Placement
    ) -> AbstractAsyncContextManager[ScriptedInstance]:
        self._spy.placements.append(placement)
        return super().open_instance(placement)


class Spy(ScriptedBackend):
    """Remembers its placements.  Has ``gpus`` GPUs."""

    def __init__(self, gpus: int = 0) -> None:
        super().__init__(automatic=True)
        self.gpus = gpus
        self.placements: list[Placement] = []

    def place(self, group: InstanceGroup, config: ModelConfig) -> InstanceGroup:
        if group.kind == "KIND_AUTO" and self.gpus:
            return replace(group, kind="KIND_GPU", gpus=group.gpus or tuple(range(self.gpus)))
        return super().place(group, config)

    @asynccontextmanager
    async def open_model(self, context: ModelContext) -> AsyncIterator[ScriptedModel]:
        async with super().open_model(context):
            yield ModelSpy(self)


@pytest.mark.parametrize(
    ("groups", "gpus", "placements"),
    [
        ([], 0, ["m_0 CPU 0"]),
        ([], 2, ["m_0 GPU 0", "m_1 GPU 1"]),
        (["count: 2"], 0, ["m_0_0 CPU 0", "m_0_1 CPU 1"]),
        (["kind: KIND_CPU count: 2"], 1, ["m_0_0 CPU 0", "m_0_1 CPU 1"]),
        (["kind: KIND_GPU gpus: [0, 2] count: 2"], 3, ["m_0_0 GPU 0", "m_0_1 GPU 0", "m_0_2 GPU 2", "m_0_3 GPU 2"]),
        (["gpus: 1"], 2, ["m_0_0 GPU 1"]),
        (["kind: KIND_MODEL"], 2, ["m_0_0 MODEL 0"]),
        (['name: "a"', 'name: "b" kind: KIND_CPU'], 1, ["a_0 GPU 0", "b_0 CPU 0"]),
    ],
)
async def test_instance_groups(serve: Serve, groups: list[str], gpus: int, placements: list[str]) -> None:
    backend = Spy(gpus)
    async with serve({"m": grouped(*groups)}, backend):
        pass
    found = [f"{place.name} {place.kind.removeprefix('KIND_')} {place.device}" for place in backend.placements]
    assert found == placements


async def test_clients_see_what_KIND_AUTO_has_become(serve: Serve) -> None:
    async with serve({"m": grouped("count: 2")}, Spy(gpus=2)) as server:
        (group,) = server.model("m").config.instance_groups
        assert (group.kind, group.gpus, group.count) == ("KIND_GPU", (0, 1), 2)
        (shown,) = server.model("m").config.message.instance_group
        assert list(shown.gpus) == [0, 1]


async def test_KIND_AUTO_without_GPUs_is_the_CPU(serve: Serve) -> None:
    async with serve({"m": grouped("")}, Spy()) as server:
        (group,) = server.model("m").config.instance_groups
        assert group.kind == "KIND_CPU"
    with pytest.raises(InvalidArgument, match="m_0 of model m has kind KIND_CPU but specifies one or more GPUs"):
        async with serve({"m": grouped("gpus: 1")}, Spy()):
            pytest.fail("there is no such GPU")


async def test_with_a_strict_config_too(serve: Serve) -> None:
    async with serve({"m": grouped("")}, Spy(), strict_config=True) as server:
        assert server.model("m").config.instance_groups[0].kind == "KIND_CPU"


@pytest.mark.parametrize(
    ("platform", "kind", "gpus", "placed"),
    [
        ("cpu", "KIND_AUTO", (), ("KIND_CPU", ())),
        ("gpu", "KIND_AUTO", (), ("KIND_GPU", (0, 1))),
        ("gpu", "KIND_AUTO", (1,), ("KIND_GPU", (1,))),
        ("gpu", "KIND_GPU", (), ("KIND_GPU", (0, 1))),
        ("gpu", "KIND_CPU", (), ("KIND_CPU", ())),
        ("tpu", "KIND_AUTO", (), ("KIND_MODEL", ())),
        ("cpu", "KIND_GPU", (), ("KIND_GPU", ())),  # refused when it is opened, with the devices there are
    ],
)
def test_where_the_jax_backend_places_a_group(
    monkeypatch: pytest.MonkeyPatch, platform: str, kind: str, gpus: tuple[int, ...], placed: tuple[object, ...]
) -> None:
    jax = pytest.importorskip("jax")
    from triton_trio.backends.jax import JaxBackend

    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "local_devices", lambda backend: ["one", "two"])
    config = parse_model_config('name: "m" backend: "jax"')
    group = JaxBackend().place(InstanceGroup(kind=kind, gpus=gpus), config)
    assert (group.kind, group.gpus) == placed


async def test_a_request_goes_to_the_instance_that_is_ready_first(serve: Serve) -> None:
    backend = ScriptedBackend()
    async with serve({"m": scripted_config(instances=3)}, backend) as server, calling(server.model("m")) as callers:
        await callers.call_all("abcde")
        first, second, third = (execution.instance for execution in backend.executions)
        assert {first, second, third} == {"m_0_0", "m_0_1", "m_0_2"}
        backend.executions[1].finish()
        await wait_all_tasks_blocked()
        backend.executions[2].finish()
        await wait_all_tasks_blocked()
        assert [(e.instance, *e.members) for e in backend.executions[3:]] == [(second, "d"), (third, "e")]
        for execution in backend.running:
            execution.finish()
    assert all(call.outcome is Outcome.OK for call in callers.calls)


async def test_the_one_that_has_been_idle_longest_is_woken(serve: Serve) -> None:
    backend = ScriptedBackend(automatic=True)
    async with serve({"m": scripted_config(instances=2)}, backend) as server, calling(server.model("m")) as callers:
        await callers.call_all("abcd")
    served = [execution.instance for execution in backend.executions]
    assert served[:2] == served[2:]
    assert set(served) == {"m_0_0", "m_0_1"}


async def test_a_passive_instance_is_loaded_and_gets_no_work(serve: Serve) -> None:
    backend = Spy()
    backend.automatic = False
    config = grouped('name: "active" kind: KIND_CPU', 'name: "passive" kind: KIND_CPU passive: true')
    async with serve({"m": config}, backend) as server, calling(server.model("m")) as callers:
        assert [placement.name for placement in backend.placements] == ["active_0", "passive_0"]
        assert backend.open_instances == 2
        assert [(i.name, i.state) for i in server.model("m").statistics().instances] == [
            ("active_0", InstanceState.IDLE)
        ]
        await callers.call_all("ab")
        assert [execution.instance for execution in backend.running] == ["active_0"]
        backend.automatic = True
        backend.executions[0].finish()
    assert [execution.instance for execution in backend.executions] == ["active_0"] * 2


async def test_a_passive_instance_needs_no_resources(serve: Serve) -> None:
    limits = 'rate_limiter { resources { name: "R" count: 9 } }'
    config = grouped("kind: KIND_CPU", f"kind: KIND_CPU passive: true {limits}")
    async with serve({"m": config}, rate_limit="execution_count") as server:
        limiter = server.statistics().rate_limiter
        assert limiter is not None
        assert limiter.resources == ()


async def test_a_model_with_passive_instances_only_is_refused(serve: Serve) -> None:
    with pytest.raises(InvalidArgument, match="every instance group is passive, so nobody would serve its requests"):
        async with serve({"m": grouped("passive: true")}, Spy()):
            pytest.fail("nobody would serve it")
