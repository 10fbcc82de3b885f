# Generated from protos/grpc_service.proto by protos/generate.py.
# Do not edit: change those, then run `make protos`.
from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import Deadline
from triton_trio.grpc.stub import (
    ClientStream,
    Metadata,
    ServerStream,
    ServiceBase,
    ServiceStub,
)

from .inference import (
    CudaSharedMemoryRegisterRequest,
    CudaSharedMemoryRegisterResponse,
    CudaSharedMemoryStatusRequest,
    CudaSharedMemoryStatusResponse,
    CudaSharedMemoryUnregisterRequest,
    CudaSharedMemoryUnregisterResponse,
    LogSettingsRequest,
    LogSettingsResponse,
    ModelConfigRequest,
    ModelConfigResponse,
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ModelStatisticsRequest,
    ModelStatisticsResponse,
    ModelStreamInferResponse,
    RepositoryIndexRequest,
    RepositoryIndexResponse,
    RepositoryModelLoadRequest,
    RepositoryModelLoadResponse,
    RepositoryModelUnloadRequest,
    RepositoryModelUnloadResponse,
    ServerLiveRequest,
    ServerLiveResponse,
    ServerMetadataRequest,
    ServerMetadataResponse,
    ServerReadyRequest,
    ServerReadyResponse,
    SystemSharedMemoryRegisterRequest,
    SystemSharedMemoryRegisterResponse,
    SystemSharedMemoryStatusRequest,
    SystemSharedMemoryStatusResponse,
    SystemSharedMemoryUnregisterRequest,
    SystemSharedMemoryUnregisterResponse,
    TraceSettingRequest,
    TraceSettingResponse,
)

__all__ = ("GrpcInferenceServiceBase", "GrpcInferenceServiceStub")


class GrpcInferenceServiceBase(ServiceBase):
    """One service for health, metadata, inference and administration."""

    async def server_live(self, request: ServerLiveRequest) -> ServerLiveResponse:
        """Is the process up and able to answer at all?"""
        raise GRPCError(Status.UNIMPLEMENTED, "ServerLive is not implemented")

    async def server_ready(self, request: ServerReadyRequest) -> ServerReadyResponse:
        """Is the server ready for inference? Turns false as soon as a drain begins."""
        raise GRPCError(Status.UNIMPLEMENTED, "ServerReady is not implemented")

    async def model_ready(self, request: ModelReadyRequest) -> ModelReadyResponse:
        """Is this version of this model ready for inference?"""
        raise GRPCError(Status.UNIMPLEMENTED, "ModelReady is not implemented")

    async def server_metadata(
        self, request: ServerMetadataRequest
    ) -> ServerMetadataResponse:
        """Name, version and protocol extensions of the server."""
        raise GRPCError(Status.UNIMPLEMENTED, "ServerMetadata is not implemented")

    async def model_metadata(
        self, request: ModelMetadataRequest
    ) -> ModelMetadataResponse:
        """What a client needs to build a request: tensor names, datatypes and shapes."""
        raise GRPCError(Status.UNIMPLEMENTED, "ModelMetadata is not implemented")

    async def model_infer(self, request: ModelInferRequest) -> ModelInferResponse:
        """One request, one response. Resetting the stream cancels the request wherever it is: in a queue,
        in a batch, or on the device.
        """
        raise GRPCError(Status.UNIMPLEMENTED, "ModelInfer is not implemented")

    async def model_stream_infer(
        self, stream: ServerStream[ModelInferRequest, ModelStreamInferResponse]
    ) -> None:
        """Any number of requests and responses over one stream; the only way to a decoupled model. An
        error of one request travels in error_message and leaves the stream open.

        Closing the client's side ends the requests' supply and cancels nothing. Resetting the stream
        cancels every request in flight on it.
        """
        raise GRPCError(Status.UNIMPLEMENTED, "ModelStreamInfer is not implemented")

    async def model_config(self, request: ModelConfigRequest) -> ModelConfigResponse:
        """The model's configuration as the server runs it, defaults filled in."""
        raise GRPCError(Status.UNIMPLEMENTED, "ModelConfig is not implemented")

    async def model_statistics(
        self, request: ModelStatisticsRequest
    ) -> ModelStatisticsResponse:
        """Counts and times since the model was loaded."""
        raise GRPCError(Status.UNIMPLEMENTED, "ModelStatistics is not implemented")

    async def repository_index(
        self, request: RepositoryIndexRequest
    ) -> RepositoryIndexResponse:
        """Every model that the repository holds, loaded or not."""
        raise GRPCError(Status.UNIMPLEMENTED, "RepositoryIndex is not implemented")

    async def repository_model_load(
        self, request: RepositoryModelLoadRequest
    ) -> RepositoryModelLoadResponse:
        """Load a model, or load it again with its present files. A cancel abandons a load that nobody
        else waits for.
        """
        raise GRPCError(Status.UNIMPLEMENTED, "RepositoryModelLoad is not implemented")

    async def repository_model_unload(
        self, request: RepositoryModelUnloadRequest
    ) -> RepositoryModelUnloadResponse:
        """Unload a model: no new requests, a grace for those in flight, then a cancel."""
        raise GRPCError(
            Status.UNIMPLEMENTED, "RepositoryModelUnload is not implemented"
        )

    async def system_shared_memory_status(
        self, request: SystemSharedMemoryStatusRequest
    ) -> SystemSharedMemoryStatusResponse:
        """Registered regions of system shared memory."""
        raise GRPCError(
            Status.UNIMPLEMENTED, "SystemSharedMemoryStatus is not implemented"
        )

    async def system_shared_memory_register(
        self, request: SystemSharedMemoryRegisterRequest
    ) -> SystemSharedMemoryRegisterResponse:
        """Make a region of system shared memory known by a name."""
        raise GRPCError(
            Status.UNIMPLEMENTED, "SystemSharedMemoryRegister is not implemented"
        )

    async def system_shared_memory_unregister(
        self, request: SystemSharedMemoryUnregisterRequest
    ) -> SystemSharedMemoryUnregisterResponse:
        """Forget one region, or all of them."""
        raise GRPCError(
            Status.UNIMPLEMENTED, "SystemSharedMemoryUnregister is not implemented"
        )

    async def cuda_shared_memory_status(
        self, request: CudaSharedMemoryStatusRequest
    ) -> CudaSharedMemoryStatusResponse:
        """Registered regions of CUDA shared memory."""
        raise GRPCError(
            Status.UNIMPLEMENTED, "CudaSharedMemoryStatus is not implemented"
        )

    async def cuda_shared_memory_register(
        self, request: CudaSharedMemoryRegisterRequest
    ) -> CudaSharedMemoryRegisterResponse:
        """Make a region of CUDA shared memory known by a name."""
        raise GRPCError(
            Status.UNIMPLEMENTED, "CudaSharedMemoryRegister is not implemented"
        )

    async def cuda_shared_memory_unregister(
        self, request: CudaSharedMemoryUnregisterRequest
    ) -> CudaSharedMemoryUnregisterResponse:
        """Forget one region, or all of them."""
        raise GRPCError(
            Status.UNIMPLEMENTED, "CudaSharedMemoryUnregister is not implemented"
        )

    async def trace_setting(self, request: TraceSettingRequest) -> TraceSettingResponse:
        """Read the trace settings, after changing those that the request names."""
        raise GRPCError(Status.UNIMPLEMENTED, "TraceSetting is not implemented")

    async def log_settings(self, request: LogSettingsRequest) -> LogSettingsResponse:
        """Read the log settings, after changing those that the request names."""
        raise GRPCError(Status.UNIMPLEMENTED, "LogSettings is not implemented")

    def __mapping__(self) -> dict[str, Handler]:
        return {
            "/inference.GRPCInferenceService/ServerLive": Handler(
                self._unary_unary(self.server_live),
                Cardinality.UNARY_UNARY,
                ServerLiveRequest,
                ServerLiveResponse,
            ),
            "/inference.GRPCInferenceService/ServerReady": Handler(
                self._unary_unary(self.server_ready),
                Cardinality.UNARY_UNARY,
                ServerReadyRequest,
                ServerReadyResponse,
            ),
            "/inference.GRPCInferenceService/ModelReady": Handler(
                self._unary_unary(self.model_ready),
                Cardinality.UNARY_UNARY,
                ModelReadyRequest,
                ModelReadyResponse,
            ),
            "/inference.GRPCInferenceService/ServerMetadata": Handler(
                self._unary_unary(self.server_metadata),
                Cardinality.UNARY_UNARY,
                ServerMetadataRequest,
                ServerMetadataResponse,
            ),
            "/inference.GRPCInferenceService/ModelMetadata": Handler(
                self._unary_unary(self.model_metadata),
                Cardinality.UNARY_UNARY,
                ModelMetadataRequest,
                ModelMetadataResponse,
            ),
            "/inference.GRPCInferenceService/ModelInfer": Handler(
                self._unary_unary(self.model_infer),
                Cardinality.UNARY_UNARY,
                ModelInferRequest,
                ModelInferResponse,
            ),
            "/inference.GRPCInferenceService/ModelStreamInfer": Handler(
                self.model_stream_infer,
                Cardinality.STREAM_STREAM,
                ModelInferRequest,
                ModelStreamInferResponse,
            ),
            "/inference.GRPCInferenceService/ModelConfig": Handler(
                self._unary_unary(self.model_config),
                Cardinality.UNARY_UNARY,
                ModelConfigRequest,
                ModelConfigResponse,
            ),
            "/inference.GRPCInferenceService/ModelStatistics": Handler(
                self._unary_unary(self.model_statistics),
                Cardinality.UNARY_UNARY,
                ModelStatisticsRequest,
                ModelStatisticsResponse,
            ),
            "/inference.GRPCInferenceService/RepositoryIndex": Handler(
                self._unary_unary(self.repository_index),
                Cardinality.UNARY_UNARY,
                RepositoryIndexRequest,
                RepositoryIndexResponse,
            ),
            "/inference.GRPCInferenceService/RepositoryModelLoad": Handler(
                self._unary_unary(self.repository_model_load),
                Cardinality.UNARY_UNARY,
                RepositoryModelLoadRequest,
                RepositoryModelLoadResponse,
            ),
            "/inference.GRPCInferenceService/RepositoryModelUnload": Handler(
                self._unary_unary(self.repository_model_unload),
                Cardinality.UNARY_UNARY,
                RepositoryModelUnloadRequest,
                RepositoryModelUnloadResponse,
            ),
            "/inference.GRPCInferenceService/SystemSharedMemoryStatus": Handler(
                self._unary_unary(self.system_shared_memory_status),
                Cardinality.UNARY_UNARY,
                SystemSharedMemoryStatusRequest,
                SystemSharedMemoryStatusResponse,
            ),
            "/inference.GRPCInferenceService/SystemSharedMemoryRegister": Handler(
                self._unary_unary(self.system_shared_memory_register),
                Cardinality.UNARY_UNARY,
                SystemSharedMemoryRegisterRequest,
                SystemSharedMemoryRegisterResponse,
            ),
            "/inference.GRPCInferenceService/SystemSharedMemoryUnregister": Handler(
                self._unary_unary(self.system_shared_memory_unregister),
                Cardinality.UNARY_UNARY,
                SystemSharedMemoryUnregisterRequest,
                SystemSharedMemoryUnregisterResponse,
            ),
            "/inference.GRPCInferenceService/CudaSharedMemoryStatus": Handler(
                self._unary_unary(self.cuda_shared_memory_status),
                Cardinality.UNARY_UNARY,
                CudaSharedMemoryStatusRequest,
                CudaSharedMemoryStatusResponse,
            ),
            "/inference.GRPCInferenceService/CudaSharedMemoryRegister": Handler(
                self._unary_unary(self.cuda_shared_memory_register),
                Cardinality.UNARY_UNARY,
                CudaSharedMemoryRegisterRequest,
                CudaSharedMemoryRegisterResponse,
            ),
            "/inference.GRPCInferenceService/CudaSharedMemoryUnregister": Handler(
                self._unary_unary(self.cuda_shared_memory_unregister),
                Cardinality.UNARY_UNARY,
                CudaSharedMemoryUnregisterRequest,
                CudaSharedMemoryUnregisterResponse,
            ),
            "/inference.GRPCInferenceService/TraceSetting": Handler(
                self._unary_unary(self.trace_setting),
                Cardinality.UNARY_UNARY,
                TraceSettingRequest,
                TraceSettingResponse,
            ),
            "/inference.GRPCInferenceService/LogSettings": Handler(
                self._unary_unary(self.log_settings),
                Cardinality.UNARY_UNARY,
                LogSettingsRequest,
                LogSettingsResponse,
            ),
        }


class GrpcInferenceServiceStub(ServiceStub):
    """One service for health, metadata, inference and administration."""

    async def server_live(
        self,
        request: ServerLiveRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> ServerLiveResponse:
        """Is the process up and able to answer at all?"""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/ServerLive",
            request,
            ServerLiveResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def server_ready(
        self,
        request: ServerReadyRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> ServerReadyResponse:
        """Is the server ready for inference? Turns false as soon as a drain begins."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/ServerReady",
            request,
            ServerReadyResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def model_ready(
        self,
        request: ModelReadyRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> ModelReadyResponse:
        """Is this version of this model ready for inference?"""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/ModelReady",
            request,
            ModelReadyResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def server_metadata(
        self,
        request: ServerMetadataRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> ServerMetadataResponse:
        """Name, version and protocol extensions of the server."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/ServerMetadata",
            request,
            ServerMetadataResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def model_metadata(
        self,
        request: ModelMetadataRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> ModelMetadataResponse:
        """What a client needs to build a request: tensor names, datatypes and shapes."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/ModelMetadata",
            request,
            ModelMetadataResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def model_infer(
        self,
        request: ModelInferRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> ModelInferResponse:
        """One request, one response. Resetting the stream cancels the request wherever it is: in a queue,
        in a batch, or on the device.
        """
        return await self._unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request,
            ModelInferResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    def model_stream_infer(
        self,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> AbstractAsyncContextManager[
        ClientStream[ModelInferRequest, ModelStreamInferResponse]
    ]:
        """Any number of requests and responses over one stream; the only way to a decoupled model. An
        error of one request travels in error_message and leaves the stream open.

        Closing the client's side ends the requests' supply and cancels nothing. Resetting the stream
        cancels every request in flight on it.
        """
        return self._stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            ModelInferRequest,
            ModelStreamInferResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def model_config(
        self,
        request: ModelConfigRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> ModelConfigResponse:
        """The model's configuration as the server runs it, defaults filled in."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/ModelConfig",
            request,
            ModelConfigResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def model_statistics(
        self,
        request: ModelStatisticsRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> ModelStatisticsResponse:
        """Counts and times since the model was loaded."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/ModelStatistics",
            request,
            ModelStatisticsResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def repository_index(
        self,
        request: RepositoryIndexRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> RepositoryIndexResponse:
        """Every model that the repository holds, loaded or not."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/RepositoryIndex",
            request,
            RepositoryIndexResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def repository_model_load(
        self,
        request: RepositoryModelLoadRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> RepositoryModelLoadResponse:
        """Load a model, or load it again with its present files. A cancel abandons a load that nobody
        else waits for.
        """
        return await self._unary_unary(
            "/inference.GRPCInferenceService/RepositoryModelLoad",
            request,
            RepositoryModelLoadResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def repository_model_unload(
        self,
        request: RepositoryModelUnloadRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> RepositoryModelUnloadResponse:
        """Unload a model: no new requests, a grace for those in flight, then a cancel."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/RepositoryModelUnload",
            request,
            RepositoryModelUnloadResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def system_shared_memory_status(
        self,
        request: SystemSharedMemoryStatusRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> SystemSharedMemoryStatusResponse:
        """Registered regions of system shared memory."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/SystemSharedMemoryStatus",
            request,
            SystemSharedMemoryStatusResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def system_shared_memory_register(
        self,
        request: SystemSharedMemoryRegisterRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> SystemSharedMemoryRegisterResponse:
        """Make a region of system shared memory known by a name."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/SystemSharedMemoryRegister",
            request,
            SystemSharedMemoryRegisterResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def system_shared_memory_unregister(
        self,
        request: SystemSharedMemoryUnregisterRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> SystemSharedMemoryUnregisterResponse:
        """Forget one region, or all of them."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/SystemSharedMemoryUnregister",
            request,
            SystemSharedMemoryUnregisterResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def cuda_shared_memory_status(
        self,
        request: CudaSharedMemoryStatusRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> CudaSharedMemoryStatusResponse:
        """Registered regions of CUDA shared memory."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/CudaSharedMemoryStatus",
            request,
            CudaSharedMemoryStatusResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def cuda_shared_memory_register(
        self,
        request: CudaSharedMemoryRegisterRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> CudaSharedMemoryRegisterResponse:
        """Make a region of CUDA shared memory known by a name."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/CudaSharedMemoryRegister",
            request,
            CudaSharedMemoryRegisterResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def cuda_shared_memory_unregister(
        self,
        request: CudaSharedMemoryUnregisterRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> CudaSharedMemoryUnregisterResponse:
        """Forget one region, or all of them."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/CudaSharedMemoryUnregister",
            request,
            CudaSharedMemoryUnregisterResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def trace_setting(
        self,
        request: TraceSettingRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> TraceSettingResponse:
        """Read the trace settings, after changing those that the request names."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/TraceSetting",
            request,
            TraceSettingResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )

    async def log_settings(
        self,
        request: LogSettingsRequest,
        *,
        timeout: float | None = None,
        deadline: Deadline | None = None,
        metadata: Metadata | None = None,
    ) -> LogSettingsResponse:
        """Read the log settings, after changing those that the request names."""
        return await self._unary_unary(
            "/inference.GRPCInferenceService/LogSettings",
            request,
            LogSettingsResponse,
            timeout=timeout,
            deadline=deadline,
            metadata=metadata,
        )
