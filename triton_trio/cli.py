"""The command line: tritonserver's flags, on our server.

A flag that tritonserver does not have is an error.  One that it has and we do not support yet is a warning that says so,
so that an existing start script works and nobody is left to guess.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Sequence
from math import inf

import trio

from ._process import calm_garbage_collector, keep_large_buffers, leave
from ._version import __version__
from .backends import DEFAULT_BACKENDS
from .errors import TritonError
from .grpc.frontend import serve_grpc
from .grpc.server import GrpcOptions
from .observe.logs import configure_logging
from .scheduling import Resource
from .server import InferenceServer, open_server

LOGGER = logging.getLogger("triton_trio")

#: tritonserver's flags that have no effect here, and what to say about them.
UNSUPPORTED = {
    "HTTP/REST is not served yet": (
        "allow-http http-address http-port reuse-http-port http-thread-count http-header-forward-pattern "
        "http-restricted-api http-max-input-size"
    ),
    "metrics are not exported yet": (
        "allow-metrics allow-gpu-metrics allow-cpu-metrics metrics-address metrics-port metrics-interval-ms "
        "metrics-config"
    ),
    "tracing is not supported yet": "trace-config trace-file trace-level trace-rate trace-count trace-log-frequency",
    "shared memory is not supported yet": "allow-client-shm",
    "there is nothing like it in this server": (
        "cache-directory backend-directory repoagent-directory pinned-memory-pool-byte-size "
        "cuda-memory-pool-byte-size cuda-virtual-address-size buffer-manager-thread-count "
        "model-config-name model-load-thread-count model-load-retry-count model-load-gpu-limit model-namespacing "
        "enable-peer-access host-policy min-supported-compute-capability repository-poll-secs "
        "grpc-infer-thread-count grpc-infer-allocation-pool-size grpc-max-response-pool-size "
        "reuse-grpc-port grpc-restricted-protocol grpc-header-forward-pattern grpc-http2-max-pings-without-data "
        "grpc-http2-min-recv-ping-interval-without-data grpc-http2-max-ping-strikes "
        "allow-vertex-ai vertex-ai-port vertex-ai-thread-count vertex-ai-default-model "
        "allow-sagemaker sagemaker-port sagemaker-safe-port-range sagemaker-thread-count"
    ),
}


def _flag(text: str) -> bool:
    if text.lower() in ("true", "1", "on", "yes"):
        return True
    if text.lower() in ("false", "0", "off", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'")


def _resource(text: str) -> Resource:
    form = f"expected NAME:COUNT or NAME:COUNT:DEVICE, got '{text}'"
    name, *numbers = text.split(":")
    if not name or len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(form)
    if not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{form}: COUNT and DEVICE are whole numbers, not negative")
    return Resource(name, *map(int, numbers))


def _cache_size(text: str) -> int:
    name, _, setting = text.partition(",")
    key, _, value = setting.partition("=")
    if name != "local" or key != "size":
        raise argparse.ArgumentTypeError(
            f"expected local,size=BYTES, got '{text}': 'local' is the one cache there is, 'size' its one setting"
        )
    return _bytes(value)


def _bytes(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of bytes, got '{text}'")
    return int(text)


def _backend_setting(text: str) -> tuple[str, str, str]:
    setting, equals, value = text.partition("=")
    name, _, key = setting.rpartition(",")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"expected BACKEND,SETTING=VALUE, got '{text}'")
    return name, key, value


class _Unsupported(argparse.Action):
    """Takes the value, remembers what to say."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        if not (option_string in ("--allow-http", "--allow-metrics") and str(values).lower() == "false"):
            namespace.warnings.append(f"{option_string} is ignored: {self.help}")


def make_parser() -> argparse.ArgumentParser:
    """The parser, with every flag of tritonserver that exists."""
    parser = argparse.ArgumentParser(
        prog="triton_trio",
        usage="%(prog)s --model-repository DIR [options]    (--help lists them)",
        allow_abbrev=False,
        description="An inference server that speaks Triton's protocol, in which every request is a cancel scope.",
    )
    parser.set_defaults(warnings=[])
    add = parser.add_argument
    add("--version", action="version", version=f"triton_trio {__version__}")
    add("--id", default="triton", help="the server's name in ServerMetadata")

    models = parser.add_argument_group("models").add_argument
    models("--model-repository", "--model-store", action="append", default=[], metavar="DIR", help="may be repeated")
    models("--model-control-mode", choices=["none", "explicit", "poll"], default="none")
    models("--load-model", action="append", default=[], metavar="NAME", help="explicit mode; '*' for all; repeatable")
    models("--disable-auto-complete-config", type=_flag, nargs="?", const=True, default=False, metavar="BOOL")
    models("--strict-model-config", type=_flag, nargs="?", const=True, default=None, metavar="BOOL", help="deprecated")
    models("--exit-on-error", type=_flag, nargs="?", const=True, default=True, metavar="BOOL")
    models("--strict-readiness", type=_flag, nargs="?", const=True, default=True, metavar="BOOL")
    models("--exit-timeout-secs", type=float, default=30.0, metavar="S", help="grace of a drain (default 30)")
    models(
        "--release-timeout-secs",
        type=float,
        default=10.0,
        metavar="S",
        help="time a device has to let go of cancelled work before its instance is quarantined (default 10)",
    )

    models(
        "--rate-limit",
        type=str.lower,
        choices=["off", "execution_count"],
        default="off",
        help="execution_count: an instance executes while it holds what instance_group.rate_limiter lists (default off)",
    )
    models(
        "--rate-limit-resource",
        type=_resource,
        action="append",
        default=[],
        metavar="NAME:COUNT[:DEVICE]",
        help="how much there is of a resource (on each device, or on one); default: the greatest need of an instance",
    )
    models(
        "--cache-config",
        type=_cache_size,
        default=0,
        metavar="local,size=BYTES",
        help="the response cache, for models with response_cache { enable: true } (default none)",
    )
    models(
        "--backend-config",
        type=_backend_setting,
        action="append",
        default=[],
        metavar="BACKEND,SETTING=VALUE",
        help="jax,compilation_cache_dir=DIR keeps compiled programs there, so that the next start is quicker",
    )
    models("--response-cache-byte-size", type=_bytes, dest="cache_config", metavar="BYTES", help="deprecated")

    grpc = parser.add_argument_group("gRPC").add_argument
    grpc("--allow-grpc", type=_flag, nargs="?", const=True, default=True, metavar="BOOL")
    grpc("--grpc-address", default="0.0.0.0", metavar="HOST")
    grpc("--grpc-port", type=int, default=8001, metavar="PORT", help="0 picks a free one and prints it")
    grpc("--grpc-keepalive-time", type=int, default=7_200_000, metavar="MS")
    grpc("--grpc-keepalive-timeout", type=int, default=20_000, metavar="MS")
    grpc("--grpc-keepalive-permit-without-calls", type=_flag, nargs="?", const=True, default=False, metavar="BOOL")
    grpc("--grpc-max-connection-age", type=int, default=0, metavar="MS", help="0: no limit")
    grpc("--grpc-max-connection-age-grace", type=int, default=0, metavar="MS", help="0: no limit")
    grpc("--grpc-infer-response-compression-level", choices=["none", "low", "medium", "high"], default="none")
    grpc("--grpc-use-ssl", type=_flag, nargs="?", const=True, default=False, metavar="BOOL")
    grpc("--grpc-use-ssl-mutual", type=_flag, nargs="?", const=True, default=False, metavar="BOOL")
    grpc("--grpc-server-cert", metavar="FILE")
    grpc("--grpc-server-key", metavar="FILE")
    grpc("--grpc-root-cert", metavar="FILE")

    logs = parser.add_argument_group("logging").add_argument
    logs("--log-verbose", type=int, default=0, metavar="LEVEL", help="0: off; 1 and more: debug lines")
    logs("--log-info", type=_flag, nargs="?", const=True, default=True, metavar="BOOL")
    logs("--log-warning", type=_flag, nargs="?", const=True, default=True, metavar="BOOL")
    logs("--log-error", type=_flag, nargs="?", const=True, default=True, metavar="BOOL")
    logs("--log-format", choices=["default", "ISO8601", "json"], default="default")
    logs("--log-file", metavar="FILE", help="instead of standard error")

    other = parser.add_argument_group("flags of tritonserver that have no effect here")
    for why, flags in UNSUPPORTED.items():
        for flag in flags.split():
            other.add_argument(
                f"--{flag}", action=_Unsupported, nargs="?", metavar="VALUE", help=why, dest="unsupported"
            )
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; what is wrong with them ends the process."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.model_control_mode == "poll":
        parser.error("--model-control-mode=poll is not supported: use none, or explicit and RepositoryModelLoad")
    if args.load_model and args.model_control_mode != "explicit":
        parser.error("--load-model needs --model-control-mode=explicit")
    if args.rate_limit_resource and args.rate_limit == "off":
        args.warnings.append("--rate-limit-resource has no effect without --rate-limit=execution_count")
        args.rate_limit_resource = []
    if not args.model_repository:
        parser.error("--model-repository is needed: a directory that holds a directory for each model")
    return args


def run() -> int:
    """:func:`main`, as a program: whatever still hangs does not keep the process."""
    return leave(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until it is told to stop; the process's exit status."""
    args = parse(argv)
    configure_logging(
        verbose=args.log_verbose,
        info=args.log_info,
        warning=args.log_warning,
        error=args.log_error,
        style=args.log_format,
        file=args.log_file,
    )
    for warning in args.warnings:
        LOGGER.warning("%s", warning)
    keep_large_buffers()
    failed = False
    try:
        trio.run(_serve, args)
    except* (TritonError, OSError) as group:
        failed = True
        for error in leaves(group):
            print(f"triton_trio: {error}", file=sys.stderr)
    return int(failed)


def leaves(exc: BaseException) -> list[BaseException]:
    """The exceptions in a group, whatever groups they are in."""
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for child in exc.exceptions for leaf in leaves(child)]
    return [exc]


def backend_config(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """By backend.  Other servers' backends have settings in many a start script: those are warned of."""
    found: dict[str, dict[str, str]] = {}
    for name, key, value in args.backend_config:
        if name in DEFAULT_BACKENDS:
            found.setdefault(name, {})[key] = value
        else:
            what = f"this server has no backend '{name}'" if name else "there is nothing like it in this server"
            LOGGER.warning("--backend-config=%s%s%s is ignored: %s", name, "," * bool(name), key, what)
    return found


async def _serve(args: argparse.Namespace) -> None:
    async with open_server(
        args.model_repository,
        explicit=args.model_control_mode == "explicit",
        load_models=args.load_model,
        backend_config=backend_config(args),
        server_id=args.id,
        strict_config=args.disable_auto_complete_config or bool(args.strict_model_config),
        strict_readiness=args.strict_readiness,
        exit_on_error=args.exit_on_error,
        release_limit=args.release_timeout_secs,
        unload_grace=args.exit_timeout_secs,
        rate_limit=args.rate_limit,
        resources=args.rate_limit_resource,
        cache_size=args.cache_config,
    ) as server:
        # Before anybody can know that there is a server to be told.
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            if args.allow_grpc:
                addresses = await serve_grpc(
                    server, host=args.grpc_address, port=args.grpc_port, options=_grpc_options(args), tls=_tls(args)
                )
                for address in addresses:
                    LOGGER.info("Started GRPCInferenceService at %s", address)
            calm_garbage_collector()
            await _wait_for_signals(server, signals, args.exit_timeout_secs)


async def _wait_for_signals(server: InferenceServer, signals: AsyncIterator[int], grace: float) -> None:
    """SIGTERM or SIGINT drains; a second one cancels what is left at once."""
    async with trio.open_nursery() as nursery:
        async for number in signals:
            name = signal.Signals(number).name
            if not server.draining:
                LOGGER.info("%s: draining, %g s for requests in flight; a second signal cancels them", name, grace)

                async def drain() -> None:
                    await server.drain(grace)
                    nursery.cancel_scope.cancel(reason="drained")

                # Owner: this nursery; ends when the frontends have ended.
                nursery.start_soon(drain, name="drain")
            else:
                LOGGER.info("%s: cancelling requests in flight", name)
                await server.drain(0)


def _grpc_options(args: argparse.Namespace) -> GrpcOptions:
    return GrpcOptions(
        keepalive_time=args.grpc_keepalive_time / 1e3,
        keepalive_timeout=args.grpc_keepalive_timeout / 1e3,
        keepalive_without_streams=args.grpc_keepalive_permit_without_calls,
        max_connection_age=args.grpc_max_connection_age / 1e3 or inf,
        max_connection_age_grace=args.grpc_max_connection_age_grace / 1e3 or inf,
        response_compression="" if args.grpc_infer_response_compression_level == "none" else "gzip",
    )


def _tls(args: argparse.Namespace) -> ssl.SSLContext | None:
    if not (args.grpc_use_ssl or args.grpc_use_ssl_mutual):
        return None
    for flag in ("grpc_server_cert", "grpc_server_key"):
        path = getattr(args, flag)
        if not path or not os.path.isfile(path):
            raise OSError(f"--{flag.replace('_', '-')} must name a PEM file; got {path!r}")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=args.grpc_root_cert)
    context.load_cert_chain(args.grpc_server_cert, args.grpc_server_key)
    if args.grpc_use_ssl_mutual:
        context.verify_mode = ssl.CERT_REQUIRED
    return context
