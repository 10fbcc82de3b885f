"""Messages: upb behind betterproto2 classes, against betterproto2's own codec.

One thread, no I/O: µs for each message, the best of several rounds. Protobuf's own generated class is the floor: it stops at a
message of its own, and reads no field of it.
"""

from __future__ import annotations

import argparse
import json
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from triton_trio._pb import inference as pb
from triton_trio.grpc.codec import UpbCodec

from .harness import machine, save, table

ROUNDS = 5
SECONDS = 0.08  # for each round of each cell
SIDES = ("upb_codec", "betterproto2", "protobuf")


def request(kilobytes: int) -> pb.ModelInferRequest:
    data = np.zeros((1, max(16, kilobytes * 256)), dtype=np.float32)
    return pb.ModelInferRequest(
        model_name="identity",
        id="1",
        parameters={"timeout": pb.InferParameter(int64_param=1_000_000)},
        inputs=[pb.ModelInferRequestInferInputTensor(name="INPUT0", datatype="FP32", shape=list(data.shape))],
        raw_input_contents=[data.tobytes()],
    )


def response() -> pb.ModelInferResponse:
    output = pb.ModelInferResponseInferOutputTensor(name="OUTPUT0", datatype="FP32", shape=[1, 16])
    return pb.ModelInferResponse(
        model_name="identity", model_version="1", id="1", outputs=[output], raw_output_contents=[bytes(64)]
    )


def statistics() -> pb.ModelStatisticsResponse:
    some = pb.StatisticDuration(count=1000, ns=123_456_789)
    of_requests = pb.InferStatistics(some, some, some, some, some, some, some, some)
    batches = [pb.InferBatchStatistics(size, some, some, some) for size in (1, 2, 4, 8)]
    model = pb.ModelStatistics("identity", "1", 1_700_000_000_000, 1000, 500, of_requests, batches)
    return pb.ModelStatisticsResponse([model] * 10)


CASES = {
    "ModelInferRequest, 1 × FP32[16], 1 parameter": request(0),
    "ModelInferResponse, 1 × FP32[16]": response(),
    "ModelInferRequest, 64 KiB": request(64),
    "ModelInferRequest, 1 MiB": request(1024),
    "ModelInferRequest, 16 MiB": request(16 * 1024),
    "ModelStatisticsResponse, 10 models": statistics(),
}


def microseconds(call: Callable[[], Any]) -> float:
    timer = timeit.Timer(call)
    once = max(timer.timeit(1), 1e-6)
    number = max(1, int(SECONDS / once))
    return min(timer.repeat(ROUNDS, number)) / number * 1e6


def measure(message: Any) -> dict[str, dict[str, float]]:
    codec, cls = UpbCodec(), type(message)
    data = codec.encode(message, cls)
    theirs = getattr(service_pb2, cls.__name__)
    parsed = theirs.FromString(data)
    result = {
        "decode": {
            "upb_codec": microseconds(lambda: codec.decode(data, cls)),
            "betterproto2": microseconds(lambda: cls.parse(data)),
            "protobuf": microseconds(lambda: theirs.FromString(data)),
        },
        "encode": {
            "upb_codec": microseconds(lambda: codec.encode(message, cls)),
            "betterproto2": microseconds(lambda: bytes(message)),
            "protobuf": microseconds(parsed.SerializeToString),
        },
    }
    for cell in result.values():
        cell["ratio"] = cell["betterproto2"] / cell["upb_codec"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures, in µs, to this file")
    path = parser.parse_args().json
    before = machine()
    figures = {name: measure(message) for name, message in CASES.items()}
    rows = [
        (name, direction, *(f"{cell[side]:.1f}" for side in SIDES), f"{cell['ratio']:.1f}×")
        for name, cells in figures.items()
        for direction, cell in cells.items()
    ]
    text = table(
        ["message", "", "codec µs", "betterproto2 µs", "protobuf's own class µs", "codec against betterproto2"], rows
    )
    save("codec", "python -m bench codec", figures, text, before)
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
