"""``grpc.health.v1.Health``, as far as Triton serves it: Check, about the whole server."""

from __future__ import annotations

from .._pb.health import HealthCheckRequest, HealthCheckResponse, HealthCheckResponseServingStatus
from .._pb.health_grpc import HealthBase
from ..server import InferenceServer


class Health(HealthBase):
    """SERVING as long as ServerReady is true; NOT_SERVING from the moment a drain begins."""

    def __init__(self, server: InferenceServer) -> None:
        self._server = server

    async def check(self, request: HealthCheckRequest) -> HealthCheckResponse:
        status = HealthCheckResponseServingStatus
        return HealthCheckResponse(status=status.SERVING if self._server.ready else status.NOT_SERVING)
