"""``inference.GRPCInferenceService``: Triton's protocol in front of an :class:`~triton_trio.InferenceServer`.

A method here has nothing to do with cancellation: the transport runs it in the RPC's scope, the model puts the request's
scope inside that one, and Trio does the rest.
"""

from __future__ import annotations

from grpclib.const import Handler

from .._pb import inference as pb
from .._pb.inference_grpc import GrpcInferenceServiceBase
from ..config import config_to_pb
from ..errors import NotFound, Unavailable, Unsupported
from ..server import InferenceServer
from . import service_metadata, service_repository, service_settings
from .service_infer import Inference, parse_version
from .service_stream import serve_stream
from .stub import ServerStream

_NO_SHARED_MEMORY = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."


class GrpcInferenceService(GrpcInferenceServiceBase):
    """The service of one server; any number of connections share it.

    Methods raise :exc:`~triton_trio.TritonError` with Triton's text; the transport knows its status.
    """

    def __init__(self, server: InferenceServer) -> None:
        self._server = server
        self._inference = Inference(server)

    # Inference

    def __mapping__(self) -> dict[str, Handler]:
        mapping = super().__mapping__()
        path = "/inference.GRPCInferenceService/ModelInfer"
        mapping[path] = mapping[path]._replace(func=self._inference.infer_unary)
        return mapping

    async def model_infer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        return await self._inference.infer(request)

    async def model_stream_infer(self, stream: ServerStream[pb.ModelInferRequest, pb.ModelStreamInferResponse]) -> None:
        metadata = stream.metadata or {}
        await serve_stream(self._inference, stream, errors_end_rpc=metadata.get("triton_grpc_error") == "true")

    # Health and metadata

    async def server_live(self, request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        self._check_not_exiting()
        return pb.ServerLiveResponse(live=self._server.live)

    async def server_ready(self, request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        self._check_not_exiting()
        return pb.ServerReadyResponse(ready=self._server.ready)

    async def model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        version = parse_version(request.version)
        if self._server.draining:
            raise Unavailable("Server not ready")
        try:
            self._server.model(request.name, version)
        except Unavailable:
            # Known, but not loaded or without an instance: an answer, where an unknown model is an error.
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def server_metadata(self, request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        server = self._server
        return pb.ServerMetadataResponse(
            name=server.server_id, version=server.version, extensions=list(server.extensions)
        )

    async def model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        return service_metadata.model_metadata(self._server, request)

    async def model_config(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        model = self._server.model(request.name, parse_version(request.version))
        return pb.ModelConfigResponse(config=config_to_pb(model.config))

    async def model_statistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        return service_metadata.model_statistics(self._server, request)

    # The repository

    async def repository_index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        return await service_repository.repository_index(self._server, request)

    async def repository_model_load(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        return await service_repository.load(self._server, request)

    async def repository_model_unload(
        self, request: pb.RepositoryModelUnloadRequest
    ) -> pb.RepositoryModelUnloadResponse:
        return await service_repository.unload(self._server, request)

    # Settings

    async def trace_setting(self, request: pb.TraceSettingRequest) -> pb.TraceSettingResponse:
        return service_settings.trace_setting_rpc(self._server, request)

    async def log_settings(self, request: pb.LogSettingsRequest) -> pb.LogSettingsResponse:
        return service_settings.log_settings_rpc(request)

    # Shared memory: there is none, as in a Triton without --allow-client-shm

    async def system_shared_memory_status(
        self, request: pb.SystemSharedMemoryStatusRequest
    ) -> pb.SystemSharedMemoryStatusResponse:
        if request.name:
            raise NotFound(f"Unable to find system shared memory region: '{request.name}'")
        return pb.SystemSharedMemoryStatusResponse()

    async def system_shared_memory_register(
        self, request: pb.SystemSharedMemoryRegisterRequest
    ) -> pb.SystemSharedMemoryRegisterResponse:
        raise Unsupported(_NO_SHARED_MEMORY)

    async def system_shared_memory_unregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        raise Unsupported(_NO_SHARED_MEMORY)

    async def cuda_shared_memory_status(
        self, request: pb.CudaSharedMemoryStatusRequest
    ) -> pb.CudaSharedMemoryStatusResponse:
        if request.name:
            raise NotFound(f"Unable to find cuda shared memory region: '{request.name}'")
        return pb.CudaSharedMemoryStatusResponse()

    async def cuda_shared_memory_register(
        self, request: pb.CudaSharedMemoryRegisterRequest
    ) -> pb.CudaSharedMemoryRegisterResponse:
        raise Unsupported(_NO_SHARED_MEMORY)

    async def cuda_shared_memory_unregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        raise Unsupported(_NO_SHARED_MEMORY)

    def _check_not_exiting(self) -> None:
        if self._server.draining:
            raise Unavailable("Server exiting")
