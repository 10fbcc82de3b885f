"""What the operator sees: statistics, one log line for each cancelled request, the live tree of tasks."""

from .tree import name_nursery as name_nursery
from .tree import tree as tree
