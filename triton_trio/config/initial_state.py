"""What the states of a model's sequences start from, where a file says it."""

from __future__ import annotations

from pathlib import Path, PurePath

from ..errors import InvalidArgument
from ..tensor import Array, byte_size, from_raw
from .model_config import ModelConfig
from .scheduling import InitialState

DIRECTORY = "initial_state"


def read_initial_states(config: ModelConfig, directory: Path) -> dict[str, Array]:
    """The contents of every ``data_file``, by the name of the state's input; blocking, for a worker thread.

    Args:
      directory: the model's; the files are below its ``initial_state/``.  A file is a raw tensor: little-endian and
        row-major, and strings each with their length in four bytes before them.

    Returns:
      Read-only arrays of the initial state's dims, with a batch dimension of 1 in front if the model batches.

    Raises:
      InvalidArgument: a file cannot be read, or does not have as many bytes as its state.
    """
    batching = config.sequence_batching
    lead = (1,) if config.max_batch_size > 0 else ()
    return {
        state.input_name: _read(config.name, state.input_name, initial, lead, directory)
        for state in (batching.states if batching is not None else ())
        if (initial := state.initial_state) is not None and initial.data_file
    }


def _read(model: str, state: str, initial: InitialState, lead: tuple[int, ...], directory: Path) -> Array:
    where = f"initial state '{initial.name}' of state '{state}' of model '{model}'"
    file = PurePath(initial.data_file)
    if file.is_absolute() or ".." in file.parts:
        # The configuration may be a client's, sent with a load request.
        raise InvalidArgument(f"{where}: data_file must be below {DIRECTORY}/, got '{initial.data_file}'")
    path = directory / DIRECTORY / file
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise InvalidArgument(f"{where}: cannot read {path}: {exc.strerror}") from None
    expected = byte_size(initial.datatype, initial.dims)
    if initial.datatype != "BYTES" and len(data) != expected:
        raise InvalidArgument(
            f"{where}: initial_state setting expects {expected} bytes, but the data provided from {path} has "
            f"{len(data)} bytes"
        )
    try:
        array = from_raw(initial.datatype, (*lead, *initial.dims), data, name=initial.name, model=model)
    except InvalidArgument as exc:
        raise InvalidArgument(f"{where}: {path}: {exc.message}") from None
    array.flags.writeable = False
    return array
