"""``python -m triton_trio``: tritonserver's flags, errors that say what to do, signals that drain."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as tritonclient

from triton_trio.cli import UNSUPPORTED, backend_config, main, make_parser
from triton_trio.scheduling import Resource

CONFIG = """backend: "identity"
input { name: "IN" data_type: TYPE_FP32 dims: [ -1 ] } output { name: "OUT" data_type: TYPE_FP32 dims: [ -1 ] }
parameters { key: "execute_delay_ms" value { string_value: "%s" } }
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name, delay in (("fast", "0"), ("endless", "1000000")):
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "config.pbtxt").write_text(CONFIG % delay)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--modell-repository=x"], "unrecognized arguments: --modell-repository=x"),
        ([], "--model-repository is needed"),
        (["--model-repository=x", "--model-control-mode=poll"], "poll is not supported: use none, or explicit"),
        (["--model-repository=x", "--load-model=y"], "--load-model needs --model-control-mode=explicit"),
        (["--model-repository=x", "--strict-readiness=maybe"], "expected true or false, got 'maybe'"),
        (["--model-repository=x", "--log-format=xml"], "invalid choice: 'xml'"),
        (["--model-repository=x", "--rate-limit=some"], "invalid choice: 'some'"),
        (["--rate-limit-resource=R"], "expected NAME:COUNT or NAME:COUNT:DEVICE, got 'R'"),
        (["--rate-limit-resource=R:1:2:3"], "expected NAME:COUNT or NAME:COUNT:DEVICE, got 'R:1:2:3'"),
        (["--rate-limit-resource=:1"], "expected NAME:COUNT or NAME:COUNT:DEVICE, got ':1'"),
        (["--rate-limit-resource=R:-1"], "COUNT and DEVICE are whole numbers, not negative"),
        (["--rate-limit-resource=R:1:gpu"], "COUNT and DEVICE are whole numbers, not negative"),
    ],
)
def test_a_wrong_flag_says_what_is_wrong(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("flag", [flag for flags in UNSUPPORTED.values() for flag in flags.split()])
def test_a_flag_without_effect_is_a_warning(flag: str) -> None:
    args = make_parser().parse_args([f"--{flag}=1", "--id", "x"])
    assert args.id == "x"
    [warning] = args.warnings
    assert warning.startswith(f"--{flag} is ignored: ")


def test_what_is_switched_off_and_not_there_needs_no_warning() -> None:
    assert make_parser().parse_args(["--allow-http=false", "--allow-metrics=false"]).warnings == []


def test_flags_as_tritonserver_takes_them() -> None:
    args = make_parser().parse_args(
        [
            "--model-store=a",
            "--model-repository",
            "b",
            "--allow-grpc=1",
            "--disable-auto-complete-config",
            "--log-verbose=2",
        ]
    )
    assert args.model_repository == ["a", "b"]
    assert args.allow_grpc is True
    assert args.disable_auto_complete_config is True
    assert args.log_verbose == 2


def test_rate_limits_as_tritonserver_takes_them() -> None:
    args = make_parser().parse_args(
        ["--rate-limit=EXECUTION_COUNT", "--rate-limit-resource=R1:10", "--rate-limit-resource", "R2:5:0"]
    )
    assert args.rate_limit == "execution_count"
    assert args.rate_limit_resource == [Resource("R1", 10), Resource("R2", 5, 0)]
    assert make_parser().parse_args([]).rate_limit == "off"


def test_a_resource_too_small_for_a_model_ends_the_server(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = repository / "fast" / "config.pbtxt"
    limits = 'rate_limiter { resources { name: "R" count: 4 } }'
    config.write_text(config.read_text() + f"instance_group {{ kind: KIND_CPU {limits} }}")
    flags = [f"--model-repository={repository}", "--grpc-port=0", "--rate-limit=execution_count"]
    assert main([*flags, "--rate-limit-resource=R:3"]) == 1
    assert 'Resource count for "R" is limited to 3' in capsys.readouterr().err


def test_a_resource_without_a_limiter_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert main([f"--model-repository={missing}", "--rate-limit-resource=R:3"]) == 1
    assert "--rate-limit-resource has no effect without --rate-limit=execution_count" in capsys.readouterr().err


def test_a_model_that_does_not_load_ends_the_server_with_its_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken" / "1").mkdir(parents=True)
    (tmp_path / "broken" / "config.pbtxt").write_text('backend: "identity"\nmax_batch_size: many\n')
    assert main([f"--model-repository={tmp_path}", "--grpc-port=0"]) == 1
    assert "broken/config.pbtxt:2:" in capsys.readouterr().err


class Process:
    """The command line in a process of its own, with JSON log lines."""

    def __init__(self, *argv: str) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "triton_trio",
                "--grpc-address=127.0.0.1",
                "--grpc-port=0",
                "--log-format=json",
                *argv,
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, str]] = []
        self.address = self.wait_for(r"Started GRPCInferenceService at (\S+)")

    def wait_for(self, pattern: str) -> str:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(json.loads(line))
            if found := re.search(pattern, self.lines[-1]["message"]):
                return found[1] if found.groups() else found[0]
        raise AssertionError(f"no line {pattern!r} in {self.lines}")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        status = self._process.wait(20)
        assert self._process.stderr is not None
        self._process.stderr.close()
        return status

    def kill(self) -> None:
        self._process.kill()
        self.end()


@pytest.fixture
def server(repository: Path) -> Iterator[Process]:
    process = Process(f"--model-repository={repository}", "--log-verbose=1")
    yield process
    process.kill()


def ask(client: tritonclient.InferenceServerClient, model: str, answers: list[object]) -> None:
    tensor = tritonclient.InferInput("IN", [2], "FP32")
    tensor.set_data_from_numpy(np.ones(2, np.float32))
    client.async_infer(model, [tensor], callback=lambda result, error: answers.append(error or result), request_id="r")


@pytest.mark.network
def test_sigterm_ends_an_idle_server(server: Process) -> None:
    with tritonclient.InferenceServerClient(server.address) as client:
        assert client.is_server_ready()
    server.signal(signal.SIGTERM)
    assert server.end() == 0


ENDLESS = """
import jax
import jax.numpy as jnp

def init(params, inputs):
    return {"x": inputs["IN"], "steps": jnp.int32(1)}

def step(params, carry):
    # On zeros it never ends, and there is no checkpoint inside of a program.
    square = jnp.ones((40, 40)) * carry["x"][0]
    square = jax.lax.while_loop(lambda x: x.max() < 1e6, lambda x: x * 2 + (x @ x) * 0, square)
    return {"x": carry["x"] + square[0, 0] * 0, "steps": carry["steps"] - 1}

def done(carry):
    return carry["steps"] <= 0

def finish(params, carry):
    return {"OUT": carry["x"]}
"""


@pytest.mark.network
def test_B5_a_device_that_hangs_does_not_keep_the_process_and_does_not_abort_it(tmp_path: Path) -> None:
    """Its thread is in a C++ library, and the interpreter's end cannot unwind it: the process ended by SIGABRT."""
    (tmp_path / "hangs" / "1").mkdir(parents=True)
    (tmp_path / "hangs" / "1" / "model.py").write_text(ENDLESS)
    tensors = (
        f'{kind} {{ name: "{name}" data_type: TYPE_FP32 dims: [ 2 ] }}'
        for kind, name in (("input", "IN"), ("output", "OUT"))
    )
    (tmp_path / "hangs" / "config.pbtxt").write_text('backend: "jax" ' + " ".join(tensors))
    server = Process(f"--model-repository={tmp_path}", "--model-control-mode=explicit", "--release-timeout-secs=0.3")
    try:
        with tritonclient.InferenceServerClient(server.address) as client:
            with pytest.raises(tritonclient.InferenceServerException, match="Deadline Exceeded"):
                client.load_model("hangs", client_timeout=3)
            server.wait_for("device cpu:0 is given up")
        server.signal(signal.SIGTERM)
        assert server.end() == 0
    finally:
        server.kill()


@pytest.mark.network
@pytest.mark.parametrize("closed", ["", ">&-", "2>&-"])
def test_B5_a_process_that_a_device_keeps_has_its_status_whatever_its_output_is(closed: str) -> None:
    code = (
        "import threading, time; from triton_trio._process import leave; "
        "threading.Thread(target=time.sleep, args=(1000,), name='jax device cpu:0').start(); leave(3)"
    )
    done = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "{code}" {closed}'], check=False, timeout=20)
    assert done.returncode == 3


def test_second_sigterm_cancels_what_is_in_flight(server: Process) -> None:
    """E1: drain waits for the request; the second signal cancels it, and its client is told."""
    answers: list[object] = []
    with tritonclient.InferenceServerClient(server.address) as client:
        ask(client, "endless", answers)
        # Answered after the request before it on the connection was taken in.
        assert client.get_inference_statistics("endless").model_stats[0].execution_count == 0
        server.signal(signal.SIGTERM)
        server.wait_for("SIGTERM: draining")
        server.signal(signal.SIGTERM)
        server.wait_for("reason=server_drain|cancelled request")
        assert server.end() == 0
    [error] = answers
    assert isinstance(error, tritonclient.InferenceServerException)
    assert "UNAVAILABLE" in str(error.status())


def test_a_response_cache_by_either_flag() -> None:
    parser = make_parser()
    assert parser.parse_args(["--cache-config=local,size=1048576"]).cache_config == 1 << 20
    assert parser.parse_args(["--response-cache-byte-size=1048576"]).cache_config == 1 << 20
    assert parser.parse_args([]).cache_config == 0


@pytest.mark.parametrize("value", ["redis,host=x", "local", "local,size", "local,size=1k", "local,bytes=5"])
def test_a_cache_that_does_not_exist_is_an_error(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args([f"--cache-config={value}"])
    assert "--cache-config" in capsys.readouterr().err


def test_settings_of_backends(caplog: pytest.LogCaptureFixture) -> None:
    flags = ["jax,compilation_cache_dir=/a,b=c", "python,shm-region-prefix-name=x", "default-max-batch-size=4"]
    args = make_parser().parse_args([f"--backend-config={flag}" for flag in flags])
    assert backend_config(args) == {"jax": {"compilation_cache_dir": "/a,b=c"}}
    assert [record.getMessage() for record in caplog.records] == [
        "--backend-config=python,shm-region-prefix-name is ignored: this server has no backend 'python'",
        "--backend-config=default-max-batch-size is ignored: there is nothing like it in this server",
    ]


@pytest.mark.parametrize("value", ["jax", "jax,compilation_cache_dir", "jax,=x", "=x"])
def test_a_setting_of_a_backend_that_is_none(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args([f"--backend-config={value}"])
    assert f"expected BACKEND,SETTING=VALUE, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("identity,speed=9", "backend config for 'identity': it has no setting 'speed'"),
        ("jax,speed=9", "backend config for 'jax': it has no setting 'speed', only compilation_cache_dir"),
    ],
)
def test_a_setting_that_a_backend_does_not_have(
    tmp_path: Path, flag: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    version = tmp_path / "m" / "1"
    version.mkdir(parents=True)
    name = flag.partition(",")[0]
    (version.parent / "config.pbtxt").write_text(f'name: "m" backend: "{name}"')
    assert main([f"--model-repository={tmp_path}", f"--backend-config={flag}", "--allow-grpc=false"]) == 1
    assert said in capsys.readouterr().err
