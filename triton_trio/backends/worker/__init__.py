"""A model in a process of its own: for a server whose event loop is busy, and against what takes a process down.

Any backend can be hosted; nothing here knows JAX.  The worker runs Trio and the ordinary backend, with requests, batches and
scopes of its own; an execution is the unit of what the two processes say to each other::

    model.py       what the server sees: a model and instances, which forward
    worker.py      starts a process, and another one when it is lost
    session.py     one process, from its start to its end
    execution.py   one execution there, as the server sees it
    messages.py wire.py connection.py
                   what is said, in which bytes, over which socket
    process.py     how a process is started
    host.py hosted.py
                   the worker's side, and an execution as the backend sees it
    logs.py plain.py
                   log lines, configurations, statistics
"""

from .host import Host as Host
from .model import open_worker_model as open_worker_model
from .process import launch as launch
from .worker import WorkerLimits as WorkerLimits
from .worker import WorkerStatistics as WorkerStatistics
