"""A TCP proxy that flips single bits in what passes through it."""

from __future__ import annotations

import contextlib
import socket
import threading


class FlippingProxy:
    """Passes connections on to ``target``. In the first one, bytes at ``positions`` (counted from the dialling side)
    have a bit flipped."""

    def __init__(self, target: tuple[str, int], positions: list[int]) -> None:
        self._target = target
        self._positions = positions
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self.flipped = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        first = True
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                positions = self._positions if first else []
                first = False
                for source, sink, flips in ((near, far, positions), (far, near, [])):
                    threading.Thread(target=self._pass_on, args=(source, sink, flips), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, positions: list[int]) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                for position in positions:
                    if passed <= position < passed + len(data):
                        data[position - passed] ^= 0x10
                        self.flipped += 1
                passed += len(data)
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
