"""Ensembles in one line each, and what runs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trio.testing import wait_all_tasks_blocked

from triton_trio import InferenceServer
from triton_trio.testing import Execution, ScriptedBackend, scripted_config


def tensors(side: str, names: str, dims: str = "2") -> str:
    return "".join(f'{side} {{ name: "{name}" data_type: TYPE_FP32 dims: [ {dims} ] }}\n' for name in names.split())


def step(model: str, inputs: str, outputs: str, *, version: int = -1) -> str:
    """``inputs`` and ``outputs`` as ``tensor`` (of INPUT0, OUTPUT0) or as ``tensor=OTHER_NAME``, several with spaces."""
    text = f'step {{ model_name: "{model}" model_version: {version} '
    for field, default, pairs in (("input_map", "INPUT0", inputs), ("output_map", "OUTPUT0", outputs)):
        for pair in pairs.split():
            tensor, _, name = pair.partition("=")
            text += f'{field} {{ key: "{name or default}" value: "{tensor}" }} '
    return text + "}\n"


def ensemble_config(
    *steps: str,
    inputs: str = "INPUT0",
    outputs: str = "OUTPUT0",
    max_batch_size: int = 0,
    max_inflight_requests: int = 0,
    more: str = "",
) -> str:
    """The config.pbtxt of an ensemble of FP32 tensors of two elements."""
    return (
        f'platform: "ensemble" max_batch_size: {max_batch_size}\n'
        + tensors("input", inputs)
        + tensors("output", outputs)
        + "ensemble_scheduling {\n"
        + f"max_inflight_requests: {max_inflight_requests}\n"
        + "".join(steps)
        + "}\n"
        + more
    )


def join_config(max_batch_size: int = 0, more: str = "") -> str:
    """A scripted model with two inputs, and each of them as an output."""
    inputs, outputs = tensors("input", "INPUT0 INPUT1"), tensors("output", "OUTPUT0 OUTPUT1")
    return f'backend: "scripted" max_batch_size: {max_batch_size}\n{inputs}{outputs}' + (
        f"instance_group [{{ count: 1, kind: KIND_CPU }}]\n{more}"
    )


#: ``pre``, then ``left`` beside the ensemble ``inner`` (``one``, then ``two``), then ``join``.
FAMILY: Mapping[str, str] = {
    **{name: scripted_config(max_batch_size=4) for name in ("pre", "left", "one", "two")},
    "join": join_config(4),
    "inner": ensemble_config(step("one", "INPUT0", "x"), step("two", "x", "OUTPUT0"), max_batch_size=4),
    "family": ensemble_config(
        step("pre", "INPUT0", "a"),
        step("left", "a", "l"),
        step("inner", "a", "r"),
        step("join", "l r=INPUT1", "OUTPUT0 OUTPUT1=OUTPUT1"),
        outputs="OUTPUT0 OUTPUT1",
        max_batch_size=4,
    ),
}


class Steps:
    """The executions of all models, by model."""

    def __init__(self, backend: ScriptedBackend) -> None:
        self.backend = backend

    def of(self, model: str) -> list[Execution]:
        return [each for each in self.backend.executions if each.instance.startswith(f"{model}_")]

    @property
    def running(self) -> list[str]:
        """The models that execute something now."""
        return sorted(execution.instance.split("_")[0] for execution in self.backend.running)

    async def finish_first(self, model: str) -> None:
        """Let the first that runs there end."""
        next(each for each in self.of(model) if not each.ended.is_set()).finish()
        await wait_all_tasks_blocked()

    async def finish(self, *models: str) -> None:
        """Let what runs there end, and wait until what follows has begun."""
        for model in models:
            self.of(model)[-1].finish()
        await wait_all_tasks_blocked()

    async def finish_everything(self) -> None:
        while self.backend.running:
            await self.finish(*self.running)


def in_flight(server: InferenceServer) -> dict[str, int]:
    """The models that have live requests, and how many."""
    return {model.name: model.in_flight for model in server.statistics().models if model.in_flight}


def outcomes(server: InferenceServer, names: Sequence[str]) -> dict[str, dict[str, int]]:
    return {name: {key.value: n for key, n in server.model(name).counters.outcomes.items()} for name in names}


def reasons(server: InferenceServer) -> dict[str, set[tuple[str, str]]]:
    """Of each model, why and at what stage requests were cancelled."""
    return {model.name: set(model.counters.reasons) for model in server.repository.loaded() if model.counters.reasons}
