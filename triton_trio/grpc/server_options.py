"""Limits and statistics of a gRPC server."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from .http2_options import Http2Options, Http2Statistics


@dataclass(frozen=True, kw_only=True)
class GrpcOptions(Http2Options):
    """Every limit of a server.  Sizes are bytes, times are seconds; ``inf`` turns a timer off."""

    max_concurrent_streams: int = 1_000  #: running handlers of one connection, their clean-up included
    max_queued_streams: int = 1_000  #: complete requests of one connection that may wait for a handler slot
    max_receive_message_size: int = (1 << 31) - 1
    max_send_message_size: int = (1 << 31) - 1
    first_message_timeout: float = 30.0  #: from HEADERS to a whole unary request
    response_compression: str = ""  #: "gzip" or "deflate", for clients that accept it
    max_connections: int = 10_000
    max_connection_age: float = inf  #: then GOAWAY: no new streams, running ones go on
    max_connection_age_grace: float = inf  #: then what still runs is cancelled


@dataclass(frozen=True)
class ConnectionStatistics:
    """One connection, at one moment."""

    peer: str
    http2: Http2Statistics
    started: int  #: RPCs whose handler was started
    running: int  #: handlers, their clean-up included
    queued: int  #: complete requests that wait for a handler slot
    incomplete: int  #: unary requests whose message has not arrived
    refused: int  #: REFUSED_STREAM: over the limits


@dataclass(frozen=True)
class GrpcStatistics:
    """The server, at one moment.  ``started == finished + running``."""

    connections: int
    open_streams: int
    running: int
    queued: int
    incomplete: int
    started: int
    finished: int
    refused: int
    resets_received: int
    resets_sent: int
    bytes_received: int
    bytes_sent: int
