"""The model-repository extension: index, load, unload."""

from __future__ import annotations

from .._pb import inference as pb
from ..errors import InvalidArgument, Unavailable, Unsupported
from ..server import InferenceServer


async def repository_index(server: InferenceServer, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
    """A line for each version that is known, and for each model on disk that was never loaded."""
    _check_repository(request.repository_name)
    lines = await server.repository.index(ready_only=request.ready)
    return pb.RepositoryIndexResponse(
        models=[
            pb.RepositoryIndexResponseModelIndex(
                name=line.name, version=line.version, state=line.state, reason=line.reason
            )
            for line in lines
        ]
    )


async def load(server: InferenceServer, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
    """Load a model with its files on disk, or with the ``config`` and ``file:<path>`` parameters in their place.

    **Cancellation:** as :meth:`triton_trio.repository.ModelRepository.load`: a load that nobody waits for is cancelled.
    """
    _check_repository(request.repository_name)
    config: str | None = None
    files: dict[str, bytes] = {}
    for name, value in request.parameters.items():
        if name == "config":
            if value.string_param is None:
                raise InvalidArgument(f"invalid value type for load parameter '{name}', expected string_param.")
            config = value.string_param
        elif name.startswith("file:"):
            if value.bytes_param is None:
                raise InvalidArgument(f"invalid value type for load parameter '{name}', expected bytes_param.")
            files[name.removeprefix("file:")] = value.bytes_param
        else:
            raise InvalidArgument(f"unrecognized load parameter '{name}'.")
    _check_allowed(server)
    await server.repository.load(request.model_name, config_json=config, files=files)
    return pb.RepositoryModelLoadResponse()


async def unload(server: InferenceServer, request: pb.RepositoryModelUnloadRequest) -> pb.RepositoryModelUnloadResponse:
    """Accept nothing more for a model; what is in flight has the unload grace, and the answer does not wait for it."""
    _check_repository(request.repository_name)
    dependents = request.parameters.get("unload_dependents")
    if dependents is not None and dependents.bool_param is None:
        raise InvalidArgument("invalid value type for 'unload_dependents' parameter, expected bool_param.")
    _check_allowed(server)
    await server.repository.unload(
        request.model_name, dependents=dependents is not None and bool(dependents.bool_param), wait=False
    )
    return pb.RepositoryModelUnloadResponse()


def _check_repository(name: str) -> None:
    if name:
        raise Unsupported("'repository_name' specification is not supported")


def _check_allowed(server: InferenceServer) -> None:
    if server.draining:
        raise Unavailable("Server not ready")
    server.repository.check_explicit()
