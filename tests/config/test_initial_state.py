"""States that start from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from triton_trio.config import ModelConfig, parse_model_config, read_initial_states
from triton_trio.errors import InvalidArgument


def config(initial: str, *, data_type: str = "INT32", dims: str = "[ -1, 2 ]", max_batch_size: int = 4) -> ModelConfig:
    return parse_model_config(
        f"""name: "m" backend: "b" max_batch_size: {max_batch_size} sequence_batching {{
          state {{ input_name: "S_IN" output_name: "S_OUT" data_type: TYPE_{data_type} dims: {dims}
            initial_state {{ name: "first" data_type: TYPE_{data_type} {initial} }} }} }}"""
    )


def write(directory: Path, data: bytes, name: str = "first.bin") -> Path:
    path = directory / "initial_state" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("max_batch_size", "shape"), [(4, (1, 3, 2)), (0, (3, 2))])
def test_a_file_gives_a_state_its_first_shape_and_contents(
    tmp_path: Path, max_batch_size: int, shape: tuple[int, ...]
) -> None:
    write(tmp_path, np.arange(6, dtype="<i4").tobytes())
    read = read_initial_states(config('dims: [ 3, 2 ] data_file: "first.bin"', max_batch_size=max_batch_size), tmp_path)
    assert list(read) == ["S_IN"]
    assert read["S_IN"].shape == shape
    assert read["S_IN"].ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert not read["S_IN"].flags.writeable


def test_strings_come_with_their_lengths(tmp_path: Path) -> None:
    write(tmp_path, b"\2\0\0\0hi\0\0\0\0")
    read = read_initial_states(config('dims: 2 data_file: "first.bin"', data_type="STRING", dims="2"), tmp_path)
    assert read["S_IN"].tolist() == [[b"hi", b""]]
    assert not read["S_IN"].flags.writeable


def test_zeros_are_not_read(tmp_path: Path) -> None:
    assert read_initial_states(config("dims: [ 3, 2 ] zero_data: true"), tmp_path) == {}
    assert read_initial_states(parse_model_config('name: "m" backend: "b"'), tmp_path) == {}


WHERE = "initial state 'first' of state 'S_IN' of model 'm'"


@pytest.mark.parametrize("size", [20, 28])
def test_a_file_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    path = write(tmp_path, bytes(size))
    with pytest.raises(InvalidArgument) as caught:
        read_initial_states(config('dims: [ 3, 2 ] data_file: "first.bin"'), tmp_path)
    assert str(caught.value) == (
        f"{WHERE}: initial_state setting expects 24 bytes, but the data provided from {path} has {size} bytes"
    )


def test_strings_that_are_not_as_many_as_the_dims_say_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, b"\2\0\0\0hi")
    with pytest.raises(InvalidArgument) as caught:
        read_initial_states(config('dims: 2 data_file: "first.bin"', data_type="STRING", dims="2"), tmp_path)
    assert str(caught.value).startswith(f"{WHERE}: {path}: expected 2 string elements")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_initial_states(config('dims: [ 3, 2 ] data_file: "none.bin"'), tmp_path)
    path = tmp_path / "initial_state" / "none.bin"
    assert str(caught.value) == f"{WHERE}: cannot read {path}: No such file or directory"


@pytest.mark.parametrize("file", ["../config.pbtxt", "/etc/hostname", "a/../../secret"])
def test_a_client_s_configuration_reads_no_file_outside_the_model(tmp_path: Path, file: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_initial_states(config(f'dims: [ 3, 2 ] data_file: "{file}"'), tmp_path)
    assert str(caught.value) == f"{WHERE}: data_file must be below initial_state/, got '{file}'"
