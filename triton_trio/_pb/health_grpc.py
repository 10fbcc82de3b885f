# Generated from protos/health.proto by protos/generate.py.
# Do not edit: change those, then run `make protos`.
from __future__ import annotations

from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import Deadline
from triton_trio.grpc.stub import (
    Metadata,
    ServiceBase,
    ServiceStub,
)

from .health import HealthCheckRequest, HealthCheckResponse

__all__ = ("HealthBase", "HealthStub")


class HealthBase(ServiceBase):
    """Readiness for load balancers and gRPC probes."""

    async def check(self, request: HealthCheckRequest) -> HealthCheckResponse:
        """Is the server ready? The answer is that of ServerReady, and turns as soon as a drain begins."""
        raise GRPCError(Status.UNIMPLEMENTED, "Check is not implemented")

    def __mapping__(self) -> dict[str, Handler]:
        return {
            "/grpc.health.v1.Health/Check": Handler(
                self._unary_unary(self.check),
                Cardinality.UNARY_UNARY,
                HealthCheckRequest,
                HealthCheckResponse,
            ),
        }


class HealthStub(ServiceStub):
    """Readiness for load balancers and gRPC probes."""

    async def check(
        self,
        request: HealthCheckRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> HealthCheckResponse:
        """Is the server ready? The answer is that of ServerReady, and turns as soon as a drain begins."""
        return await self._unary_unary(
            "/grpc.health.v1.Health/Check",
            request,
            HealthCheckResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )
