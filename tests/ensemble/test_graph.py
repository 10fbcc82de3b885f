"""Steps that fit together, and steps that do not: in Triton's words."""

from __future__ import annotations

import pytest

from tests.ensemble.world import ensemble_config, join_config, step
from triton_trio import InvalidArgument
from triton_trio.config import ModelConfig, parse_model_config
from triton_trio.ensemble.graph import Graph
from triton_trio.testing import scripted_config


def graph(config: str, **models: str) -> Graph:
    ensemble = parse_model_config(f'name: "e" {config}')
    assert ensemble.ensemble_scheduling is not None
    return Graph(
        ensemble, [model(each.model_name, models[each.model_name]) for each in ensemble.ensemble_scheduling.steps]
    )


def model(name: str, config: str) -> ModelConfig:
    return parse_model_config(f'name: "{name}" {config}')


ONE = scripted_config()
OTHER_TYPE = ONE.replace("FP32", "INT64")
CHAIN = [step("a", "INPUT0", "x"), step("b", "x", "OUTPUT0")]
STREAM = scripted_config(decoupled=True)
OPTIONAL = join_config().replace('name: "INPUT1"', 'name: "INPUT1" optional: true')


@pytest.mark.parametrize(
    ("config", "models", "message"),
    [
        (
            ensemble_config(step("a", "INPUT0=X", "OUTPUT0")),
            {"a": ONE},
            "in ensemble e, ensemble tensor INPUT0 is mapping to non-existing input X in model a",
        ),
        (
            ensemble_config(step("a", "INPUT0", "OUTPUT0")),
            {"a": join_config()},
            "in ensemble e, input INPUT1 in model a is not mapped to any ensemble tensors",
        ),
        (
            ensemble_config(step("a", "INPUT0", "OUTPUT0=Y")),
            {"a": ONE},
            "in ensemble e, ensemble tensor OUTPUT0 is mapped from non-existing output Y in model a",
        ),
        (
            ensemble_config(*CHAIN),
            {"a": ONE.replace("OUTPUT0", "OUT"), "b": ONE},
            "in ensemble e, ensemble tensor x is mapped from non-existing output OUTPUT0 in model a",
        ),
        (
            ensemble_config(step("a", "INPUT0", "OUTPUT0")),
            {"a": OTHER_TYPE},
            "in ensemble e, ensemble tensor INPUT0: inconsistent data type: TYPE_FP32 is inferred from model e while "
            "TYPE_INT64 is inferred from model a",
        ),
        (
            ensemble_config(*CHAIN),
            {"a": ONE, "b": ONE.replace('"INPUT0", data_type: TYPE_FP32', '"INPUT0", data_type: TYPE_INT64')},
            "in ensemble e, ensemble tensor x: inconsistent data type: TYPE_FP32 is inferred from model a while "
            "TYPE_INT64 is inferred from model b",
        ),
        (
            ensemble_config(step("a", "INPUT0", "OUTPUT0")),
            {"a": scripted_config(dims=[3])},
            "in ensemble e, ensemble tensor INPUT0: inconsistent shape: [2] is inferred from model e while [3] is inferred "
            "from model a",
        ),
        (
            ensemble_config(step("a", "INPUT0", "OUTPUT0"), max_batch_size=4),
            {"a": scripted_config(dims=[2, 1], max_batch_size=4)},
            "in ensemble e, ensemble tensor INPUT0: inconsistent shape: [-1,2] is inferred from model e while [-1,2,1] is "
            "inferred from model a",
        ),
        (
            ensemble_config(step("a", "INPUT0", "OUTPUT0"), max_batch_size=4),
            {"a": scripted_config(max_batch_size=2)},
            "ensemble e allows maximum batch size 4, but it contains model a which only allows maximum batch size to be 2",
        ),
        (
            ensemble_config(step("s", "INPUT0", "x"), step("j", "x INPUT0=INPUT1", "OUTPUT0")),
            {"s": STREAM, "j": join_config()},
            "in ensemble e, step of model 'j' receives inputs originated from different decoupled models",
        ),
        (
            ensemble_config(step("s", "INPUT0", "x"), step("t", "INPUT0", "y"), step("j", "x y=INPUT1", "OUTPUT0")),
            {"s": STREAM, "t": STREAM, "j": join_config()},
            "in ensemble e, step of model 'j' receives inputs originated from different decoupled models",
        ),
        (
            ensemble_config(step("s", "INPUT0", "OUTPUT0"), step("a", "INPUT0", "P"), outputs="OUTPUT0 P"),
            {"s": STREAM, "a": ONE},
            "in ensemble e, step of model 'e' receives inputs originated from different decoupled models",
        ),
    ],
)
def test_what_does_not_fit(config: str, models: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        graph(config, **models)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("config", "models"),
    [
        (ensemble_config(*CHAIN), {"a": scripted_config(dims=[-1]), "b": ONE}),
        (ensemble_config(step("a", "INPUT0", "OUTPUT0")), {"a": OPTIONAL}),
        # The batch dimension may be a part of the shape.
        (ensemble_config(step("a", "INPUT0", "OUTPUT0"), max_batch_size=4), {"a": scripted_config(dims=[-1, 2])}),
        (ensemble_config(step("a", "INPUT0", "OUTPUT0")), {"a": scripted_config(max_batch_size=4)}),
        (
            ensemble_config(step("s", "INPUT0", "x"), step("a", "x", "y"), step("j", "x y=INPUT1", "OUTPUT0")),
            {"s": STREAM, "a": ONE, "j": join_config()},
        ),
    ],
    ids=["wildcard", "optional", "batch dimension in the shape", "no batch dimension", "joined again"],
)
def test_what_does_fit(config: str, models: dict[str, str]) -> None:
    graph(config, **models)


def test_an_ensemble_is_decoupled_if_a_step_is() -> None:
    assert not graph(ensemble_config(*CHAIN), a=ONE, b=ONE).decoupled
    assert graph(ensemble_config(*CHAIN), a=ONE, b=STREAM).decoupled


def test_only_what_is_needed_is_planned_and_the_plan_is_kept() -> None:
    #          a → x → b → OUTPUT0
    # INPUT0 <   ↘ y → c → P
    #          d → Q
    config = ensemble_config(
        step("a", "INPUT0 INPUT0=INPUT1", "x=OUTPUT0 y=OUTPUT1"),
        step("b", "x", "OUTPUT0"),
        step("c", "y", "P"),
        step("d", "INPUT0", "Q"),
        outputs="Q OUTPUT0 P",
    )
    its = graph(config, a=join_config(), b=ONE, c=ONE, d=ONE)

    def steps(*outputs: str) -> dict[int, tuple[str, ...]]:
        edges = its.plan(outputs).edges.values()
        return {edge.step.index: edge.step.wanted for each in edges for edge in each}

    assert steps() == {0: ("OUTPUT0", "OUTPUT1"), 1: ("OUTPUT0",), 2: ("OUTPUT0",), 3: ("OUTPUT0",)}
    assert steps("OUTPUT0") == {0: ("OUTPUT0",), 1: ("OUTPUT0",)}
    assert steps("P", "Q") == {0: ("OUTPUT1",), 2: ("OUTPUT0",), 3: ("OUTPUT0",)}
    assert list(its.plan(("P", "Q")).outputs) == ["Q", "P"], "in the order of the configuration"
    assert its.plan(("P", "Q")) is its.plan(("Q", "P"))
    assert its.plan(()) is its.plan(())
