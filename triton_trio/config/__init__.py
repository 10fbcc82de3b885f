"""Model configurations: ``config.pbtxt`` in, a frozen :class:`ModelConfig` out.

The file is read by protobuf's own text format, so that its errors have a line and a column.  The message stays the
truth: :class:`ModelConfig` is a view of it, and what the server has no attribute for survives to the ModelConfig RPC.
"""

from __future__ import annotations

from .initial_state import read_initial_states as read_initial_states
from .instance_group import InstanceGroup as InstanceGroup
from .instance_group import RateLimiter as RateLimiter
from .instance_group import RateLimiterResource as RateLimiterResource
from .model_config import ModelConfig as ModelConfig
from .model_config import config_to_pb as config_to_pb
from .parse import format_model_config as format_model_config
from .parse import load_model_config as load_model_config
from .parse import parse_model_config as parse_model_config
from .parse import parse_model_config_json as parse_model_config_json
from .scheduling import DirectStrategy as DirectStrategy
from .scheduling import DynamicBatching as DynamicBatching
from .scheduling import EnsembleScheduling as EnsembleScheduling
from .scheduling import EnsembleStep as EnsembleStep
from .scheduling import InitialState as InitialState
from .scheduling import OldestStrategy as OldestStrategy
from .scheduling import QueuePolicy as QueuePolicy
from .scheduling import SequenceBatching as SequenceBatching
from .scheduling import SequenceControl as SequenceControl
from .scheduling import SequenceState as SequenceState
from .tensor_spec import TensorSpec as TensorSpec
from .unsupported import ignored_fields as ignored_fields
from .unsupported import refuse_unsupported as refuse_unsupported
from .version_policy import VersionPolicy as VersionPolicy
from .warmup import ModelWarmup as ModelWarmup
from .warmup import WarmupInput as WarmupInput
