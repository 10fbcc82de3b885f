"""gRPC on Trio: serve any grpclib service, call any gRPC server; every call is a cancel scope.

Useful without the inference server::

    async with trio.open_nursery() as nursery:
        server = GrpcServer([Greeter()], codec=UpbCodec())  # Greeter: a class written for grpclib
        await nursery.start(server.serve, await open_grpc_listeners("127.0.0.1", 50051))

    async with open_channel("127.0.0.1", 50051) as channel:
        with trio.move_on_after(1):  # travels as grpc-timeout; leaving the scope resets the stream
            reply = await GreeterStub(channel).say_hello(HelloRequest(name="Ada"))

The layers, from the wire up: ``http2`` (with its stream, writer, watchdog; the only user of ngh2), ``framing`` (messages in
streams), ``connection`` and ``stream`` (a server's RPCs), ``channel`` and ``call`` (a client's), ``codec`` (messages through
upb), ``stub`` (what generated code is built on).  ``service*`` and ``frontend`` put Triton's protocol on top.
"""

# Nothing here may import generated services: they import .stub, and would find this module half made.
from .channel import Channel as Channel
from .channel import open_channel as open_channel
from .channel_options import ChannelOptions as ChannelOptions
from .channel_options import ChannelStatistics as ChannelStatistics
from .codec import UpbCodec as UpbCodec
from .server import GrpcServer as GrpcServer
from .server import open_grpc_listeners as open_grpc_listeners
from .server_options import ConnectionStatistics as ConnectionStatistics
from .server_options import GrpcOptions as GrpcOptions
from .server_options import GrpcStatistics as GrpcStatistics
from .stream import Stream as Stream
from .stub import ServiceBase as ServiceBase
from .stub import ServiceStub as ServiceStub
