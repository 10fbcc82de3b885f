"""triton_trio: an inference server that speaks Triton's protocol, in which every request is a Trio cancel scope.

General layout, from the wire to the device (dependencies point down; a file knows only what is below it)::

    cli.py                    tritonserver's flags
    grpc/                     HTTP/2, RPC scopes, the inference service; usable alone
    server.py repository.py   the nursery tree; load and unload
    model.py                  one loaded version and its requests, of either kind:
    ensemble/                 ... a nursery of steps, which are requests to other models
    scheduled_model.py        ... a scheduler, and instances that execute batches (instance.py)
    scheduling/               who is served when: synchronous decisions
    backends/                 what runs behind a model: JAX, identity
    batch.py request.py       what travels through all of it
    scopes.py lifecycle.py    the vocabulary of cancellation; the one transition table
    observe/                  statistics, cancel log, the live tree
    testing/                  what our tests and yours need
"""

from ._version import __version__ as __version__
from .errors import AlreadyExists as AlreadyExists
from .errors import DeadlineExceeded as DeadlineExceeded
from .errors import InternalError as InternalError
from .errors import InvalidArgument as InvalidArgument
from .errors import NotFound as NotFound
from .errors import RequestCancelled as RequestCancelled
from .errors import TritonError as TritonError
from .errors import Unavailable as Unavailable
from .errors import Unsupported as Unsupported
from .lifecycle import Outcome as Outcome
from .lifecycle import Stage as Stage
from .model import Model as Model
from .model import Responses as Responses
from .request import InferenceRequest as InferenceRequest
from .request import InferenceResponse as InferenceResponse
from .scopes import BatchScope as BatchScope
from .scopes import Reason as Reason
from .scopes import SequenceEnd as SequenceEnd
from .scopes import SequenceScope as SequenceScope
from .server import InferenceServer as InferenceServer
from .server import open_server as open_server
