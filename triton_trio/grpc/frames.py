"""Where one frame ends and the next begins, in bytes that come in any pieces."""

from __future__ import annotations

_HEADER_LENGTH = 9
_DATA = 0


class FrameFollower:
    """Follows the frames of a connection's incoming bytes, without parsing them.

    The engine drops the bytes of a half-read DATA frame when its stream is reset, without giving them back to the
    connection's window.  So a reset waits for the end of the frame; :attr:`torn_stream` says which stream has to.

    Args:
        preamble: bytes before the first frame (the client's preface).
    """

    __slots__ = ("_head", "_left", "torn_stream")

    def __init__(self, preamble: int) -> None:
        self.torn_stream = 0  #: the stream whose DATA frame is half read, or 0
        self._left = preamble  # bytes until the next frame header
        self._head = b""  # of a header that is itself half read

    def feed(self, data: bytes | bytearray) -> None:
        """Go on behind ``data``."""
        size = len(data)
        position = self._left
        if position > size:
            self._left = position - size
            return
        self.torn_stream = 0
        if self._head:
            data = self._head + data
            size = len(data)
        start = -1
        while position + _HEADER_LENGTH <= size:
            start = position
            position += _HEADER_LENGTH + (data[position] << 16 | data[position + 1] << 8 | data[position + 2])
        if position > size:
            self._left = position - size
            self._head = b""
            if data[start + 3] == _DATA:
                self.torn_stream = int.from_bytes(data[start + 5 : start + _HEADER_LENGTH], "big")
        else:
            self._left = 0
            self._head = bytes(data[position:])
