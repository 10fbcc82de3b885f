"""Cancellable device programs: the JAX backend.

A model is ``<version>/model.py`` with plain functions of one row (:mod:`.loader` has the three forms).  Below it::

    backend.py     what the server sees: backend, model, instance
    placed.py      a model on a device: parameters, compiled programs
    apply.py steps.py explicit.py
                   how each form is executed
    programs.py    from functions of a row to programs of a batch
    devices.py     which device an instance is on
    device.py job.py
                   the one thread that talks to a device; joined cancellation
    controller.py  how many steps a chunk has
"""

from .backend import JaxBackend as JaxBackend
from .backend import JaxModel as JaxModel
from .controller import ChunkController as ChunkController
from .device import DeviceState as DeviceState
from .device import DeviceStatistics as DeviceStatistics
from .device import DeviceThread as DeviceThread
from .device import Executor as Executor
from .device import Turn as Turn
from .devices import short_switch_interval as short_switch_interval
from .explicit import ExplicitContext as ExplicitContext
from .job import DeviceJob as DeviceJob
from .loader import LoadContext as LoadContext
from .options import JaxOptions as JaxOptions
from .placed import PlacedStatistics as PlacedStatistics
