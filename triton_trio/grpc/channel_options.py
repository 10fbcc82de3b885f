"""Limits and statistics of a client channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from grpclib.const import Status

from .http2_options import Http2Options, Http2Statistics


@dataclass(frozen=True, kw_only=True)
class ChannelOptions(Http2Options):
    """Every limit of a channel.  Sizes are bytes, times are seconds; ``inf`` turns a timer off.

    Two of the defaults differ from a server's.  How long an upload may rest is the caller's to say, with a deadline.
    And no PINGs: servers made with gRPC's C core close a connection that sends one in less than five minutes.
    """

    stall_limit: float = inf
    keepalive_time: float = inf
    connect_timeout: float = 20.0  #: TCP, TLS; then ``handshake_timeout`` for the server's SETTINGS
    max_receive_message_size: int = (1 << 31) - 1
    max_send_message_size: int = (1 << 31) - 1
    request_compression: str = ""  #: "gzip" or "deflate"


@dataclass(frozen=True)
class ChannelStatistics:
    """A channel, at one moment.  ``started == in_flight + sum(finished.values())``."""

    target: str
    started: int  #: calls whose block was entered
    in_flight: int  #: calls whose block has not been left, those that wait included
    waiting: int  #: for a connection or for a stream slot
    finished: Mapping[Status, int]  #: CANCELLED: left by the caller before the end
    dials: int
    connections: tuple[Http2Statistics, ...]  #: more than one while old ones drain
