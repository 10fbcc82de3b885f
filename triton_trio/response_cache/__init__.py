"""The response cache (``response_cache { enable: true }``): the same question is answered without another execution.

``cache.py`` keeps answers, bounded in bytes; ``executions.py`` lets requests that ask the same at the same time share one
execution.
"""

from .cache import CacheStatistics as CacheStatistics
from .cache import ResponseCache as ResponseCache
from .executions import SharedExecution as SharedExecution
from .executions import SharedExecutions as SharedExecutions
