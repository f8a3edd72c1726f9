"""Framed messages between processes: numbered, with length and checksum.

A message that fails a check closes the channel, since later replies could be assigned to the wrong batch.
"""

from __future__ import annotations

import os
import select
import struct
import zlib
from collections.abc import Callable

MAGIC = b"raft"
HEAD = struct.Struct("<4sQQII")  # magic, number, length, CRC of the payload, CRC of what stands before
CHECKED = HEAD.size - 4
PATIENCE_MS = 100  # how soon the end of the other process is noticed where something else holds its pipes open


class InvalidFrame(Exception):
    """The other process wrote an invalid or unexpected frame."""


class Channel:
    """Both directions, over descriptors that the channel owns. `alive` says whether the other process still runs."""

    def __init__(self, inbox: int, outbox: int, alive: Callable[[], bool] = lambda: True) -> None:
        self.inbox, self.outbox = inbox, outbox
        self._alive, self._closed = alive, False
        os.set_blocking(outbox, False)

    def send(self, number: int, payload: bytes | memoryview) -> None:
        """Writes the frame of this number. Raises EOFError or OSError where nobody reads."""
        start = HEAD.pack(MAGIC, number, len(payload), zlib.crc32(payload), 0)[:CHECKED]
        for part in (start + struct.pack("<I", zlib.crc32(start)), payload):
            left = memoryview(part)
            while left:
                self._wait(self.outbox, select.POLLOUT)
                try:
                    left = left[os.write(self.outbox, left) :]
                except BlockingIOError:
                    continue

    def receive(self, number: int) -> bytes:
        """The payload of the frame of this number. Raises EOFError where the other side is gone, else InvalidFrame."""
        head = self._read(HEAD.size)
        magic, found, length, checksum, head_checksum = HEAD.unpack(head)
        if magic != MAGIC or head_checksum != zlib.crc32(head[:CHECKED]) or found != number:
            raise InvalidFrame
        payload = self._read(length)
        if zlib.crc32(payload) != checksum:
            raise InvalidFrame
        return payload

    def close(self) -> None:
        """Once; later calls do nothing, for the descriptors may be others by then."""
        if not self._closed:
            self._closed = True
            os.close(self.inbox)
            os.close(self.outbox)

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self.inbox, select.POLLIN)
            part = os.read(self.inbox, min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _wait(self, descriptor: int, event: int) -> None:
        """Until the descriptor is ready; once the other process has ended, only what it left is read."""
        poller = select.poll()
        poller.register(descriptor, event)
        while True:
            ended = not self._alive()
            if poller.poll(0 if ended else PATIENCE_MS):
                return
            if ended:
                raise EOFError
