"""The same echo on grpclib's own asyncio server, with protobuf's C runtime for the messages."""

import asyncio
import json
import signal

import grpclib.const
import grpclib.server
from tritonclient.grpc import service_pb2 as pb


class Echo:
    async def infer(self, stream: grpclib.server.Stream) -> None:
        request = await stream.recv_message()
        response = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
        output = response.outputs.add()
        output.name, output.datatype = "OUTPUT0", request.inputs[0].datatype
        output.shape.extend(request.inputs[0].shape)
        response.raw_output_contents.append(request.raw_input_contents[0])
        await stream.send_message(response)

    def __mapping__(self) -> dict[str, grpclib.const.Handler]:
        return {
            "/inference.GRPCInferenceService/ModelInfer": grpclib.const.Handler(
                self.infer, grpclib.const.Cardinality.UNARY_UNARY, pb.ModelInferRequest, pb.ModelInferResponse
            )
        }


async def main() -> None:
    server = grpclib.server.Server([Echo()])
    await server.start("127.0.0.1", 0)
    port = server._server.sockets[0].getsockname()[1]
    print("READY", json.dumps({"port": port}), flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    server.close()
    await server.wait_closed()


asyncio.run(main())
