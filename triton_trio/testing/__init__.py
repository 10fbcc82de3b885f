"""What our tests and yours need: a backend driven step by step, servers in one call, cancels at every moment.

``testing.fixtures`` has pytest fixtures, ``testing.device`` a gate for the JAX backend; they are imported by themselves.
"""

from .interleave import Victim as Victim
from .interleave import orders as orders
from .interleave import sweep as sweep
from .models import model_repository as model_repository
from .models import open_test_server as open_test_server
from .models import scripted_config as scripted_config
from .quiescent import assert_quiescent as assert_quiescent
from .scripted import Execution as Execution
from .scripted import Misbehaviour as Misbehaviour
from .scripted import ScriptedBackend as ScriptedBackend
