"""What the reference pages list is what the source has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from triton_trio.backends.jax.checks import check_config
from triton_trio.backends.jax.explicit import ExplicitContext
from triton_trio.backends.jax.options import JaxOptions, wants_worker
from triton_trio.config import ModelConfig, parse_model_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reference" / "jax-model.md").read_text()
_, PARAMETERS = PAGE.split("## Parameters\n")


def test_each_parameter_of_a_jax_model_is_in_the_table_and_no_other() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", PARAMETERS, re.MULTILINE)
    assert sorted(listed) == sorted(re.findall(r"^    ``(\w+)``$", JaxOptions.__doc__ or "", re.MULTILINE))


def test_defaults_that_the_table_gives_are_those_of_the_source() -> None:
    given = dict(re.findall(r"^\| `(\w+)` \| `?([\w,]+)`? \|", PARAMETERS, re.MULTILINE))
    assert len(given) >= 9

    def options(**parameters: str) -> tuple[JaxOptions, bool]:
        config = parse_model_config(
            'name: "m" backend: "jax" max_batch_size: 8 dynamic_batching { }'
            + "".join(
                f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
                for key, value in parameters.items()
            )
        )
        return JaxOptions.read(config), wants_worker(config)

    assert options(**given) == options()


def test_the_page_s_configuration_is_that_of_the_demo_s_model() -> None:
    (shown_text,) = re.findall(r"```protobuf\n(.*?)```", PAGE, re.DOTALL)
    demo_text = (ROOT / "triton_trio" / "demo" / "models" / "inpaint" / "config.pbtxt").read_text()
    shown, demo = (parse_model_config(f'name: "inpaint"\n{text}') for text in (shown_text, demo_text))

    def tensors(config: ModelConfig) -> object:
        return config.max_batch_size, config.inputs, config.outputs

    assert tensors(shown) == tensors(demo)
    check_config(shown)
    assert JaxOptions.read(shown) == JaxOptions.read(demo)


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`(?:await )?ctx\.(\w+)[(`]", PAGE)) - {"batch_size", "parameters"})
)
def test_what_a_run_may_call_is_there(name: str) -> None:
    assert callable(getattr(ExplicitContext, name))
