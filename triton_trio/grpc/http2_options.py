"""Limits and statistics of an HTTP/2 connection."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class ErrorCode(IntEnum):
    """What RST_STREAM and GOAWAY carry (RFC 9113, section 7): the codes that we send."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    SETTINGS_TIMEOUT = 4
    REFUSED_STREAM = 7  #: not processed at all: safe to retry
    CANCEL = 8
    ENHANCE_YOUR_CALM = 11


@dataclass(frozen=True, kw_only=True)
class Http2Options:
    """Limits of one connection.  Sizes are bytes, times are seconds; ``inf`` turns a timer off."""

    initial_window_size: int = 8 << 20  #: per stream; a 4 MB tensor needs no round trip
    connection_window_size: int = 64 << 20  #: what all streams together may hold unread
    max_frame_size: int = 1 << 20
    advertised_streams: int = 2_000  #: MAX_CONCURRENT_STREAMS; a peer that exceeds it loses its connection
    max_header_list_size: int = 16_384
    max_header_count: int = 128
    outbound_limit: int = 256 << 10  #: per stream: a sender with more than this queued waits
    stall_limit: float = 30.0  #: a peer that takes nothing for this long is not reading
    handshake_timeout: float = 10.0  #: for the preface and the first SETTINGS
    keepalive_time: float = 60.0  #: PING after this much silence
    keepalive_timeout: float = 20.0  #: without an ACK in this time the connection is lost
    keepalive_without_streams: bool = False
    flush_timeout: float = 2.0  #: for the last bytes (GOAWAY, trailers) of a connection that ends
    max_backlog: int = 20_000  #: frames other than DATA that may wait for a peer that does not read
    max_empty_frames: int = 10_000  #: zero-length DATA without END_STREAM, per connection


@dataclass(frozen=True)
class Http2Statistics:
    """One connection, at one moment."""

    open_streams: int
    streams_total: int
    resets_received: int
    resets_sent: int
    bytes_received: int
    bytes_sent: int
    queued_bytes: int  #: body bytes waiting for the peer's flow control
    unacknowledged_bytes: int  #: received, not yet consumed by their streams
    local_window: int  #: what the peer may still send on this connection
