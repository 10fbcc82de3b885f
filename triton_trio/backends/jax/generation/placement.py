"""Where a model's arrays are: on one device, or cut over several (tensor parallelism)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from ....errors import InvalidArgument
from .config import LlamaConfig
from .llama import Int8, Params
from .slots import SlotState

_AXIS = "tensor"
#: By a matrix's name, which of its dims is cut.  A layer makes one sum over the devices after ``o`` and one after ``down``.
_CUT = {"q": 1, "k": 1, "v": 1, "gate": 1, "up": 1, "o": 0, "down": 0, "unembed": 1}


@dataclass(frozen=True, slots=True)
class Placement:
    """Some devices as a mesh of one axis.  Made by :meth:`on`."""

    mesh: Mesh

    @classmethod
    def on(cls, devices: Sequence[jax.Device]) -> Placement:
        return cls(Mesh(np.array(devices), (_AXIS,)))

    @property
    def devices(self) -> int:
        return int(self.mesh.size)

    @property
    def platform(self) -> str:
        return str(self.mesh.devices.flat[0].platform)

    def check(self, config: LlamaConfig) -> None:
        """Raises :exc:`InvalidArgument` if the model cannot be cut into so many parts."""
        for name in ("kv_heads", "hidden", "vocab_size"):
            size = getattr(config, name)
            if size % self.devices:
                raise InvalidArgument(
                    f"{self.devices} devices cannot share a model whose {name} is {size}: not a multiple; "
                    "use a number of devices that divides it"
                )

    def whole(self) -> NamedSharding:
        """A copy on every device."""
        return self._cut(None)

    def matrix(self, name: str) -> NamedSharding:
        """A parameter, by its name in the pytree.  Norms and the embedding are whole."""
        return self._cut(_CUT.get(name))

    def scale(self, name: str) -> NamedSharding:
        """The scale of an :class:`Int8`: cut where the columns are."""
        return self._cut(0 if _CUT.get(name) == 1 else None)

    def cache(self) -> NamedSharding:
        """Keys or values: cut over ``kv_heads``."""
        return self._cut(1)

    def _cut(self, dim: int | None) -> NamedSharding:
        axes = () if dim is None else (*(None,) * dim, _AXIS)
        return NamedSharding(self.mesh, Spec(*axes))  # type: ignore[no-untyped-call]

    def put(self, name: str, weight: Any) -> Any:
        """A parameter to the devices; a copy, so the host's array may go."""
        if isinstance(weight, Int8):
            return Int8(_put(weight.values, self.matrix(name)), _put(weight.scale, self.scale(name)))
        return _put(weight, self.matrix(name))

    def put_params(self, params: Params) -> Params:
        """All of a model's parameters to the devices."""

        def put(name: str, value: Any) -> Any:
            if name == "layers":
                return tuple({key: put(key, weight) for key, weight in one.items()} for one in value)
            return self.put(name, value)

        return {name: put(name, value) for name, value in params.items()}

    def state(self, state: SlotState) -> Any:
        """Shardings, in the form of ``state``."""
        whole, cache = self.whole(), self.cache()
        caches: Any = (cache,) * len(state.keys)
        return jax.tree.map(lambda _: whole, state)._replace(keys=caches, values=caches)


def _put(array: Any, sharding: NamedSharding) -> Any:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # device_put would send the whole array to every other process, to compare it; and wait for them, whatever they do.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
