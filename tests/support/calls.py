"""Calls from process to process on this host: what FLARE's messages are elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

#: To connect takes no time, also where the other one is stopped.
ANSWER_SECONDS = 4.0


def call(path: Path, *what: Any) -> Any:
    """Call who listens at a path.

    Raises:
        TimeoutError: there was no answer in time. OSError, EOFError: nobody is there, or not any more.
    """
    with Client(str(path), "AF_UNIX") as connection:
        connection.send(what)
        if not connection.poll(ANSWER_SECONDS):
            raise TimeoutError(f"{path.name} did not answer")
        return connection.recv()


class Server:
    """Answers calls at a path with what `answer` returns, each in a thread of its own."""

    def __init__(self, path: Path, answer: Callable[..., Any]) -> None:
        path.unlink(missing_ok=True)
        self._answer = answer
        self._listener = Listener(str(path), "AF_UNIX", backlog=128)
        threading.Thread(target=self._serve, name="calls", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._reply, args=(connection,), name="call", daemon=True).start()

    def _reply(self, connection: Connection) -> None:
        with connection:
            try:
                if connection.poll(ANSWER_SECONDS):
                    connection.send(self._answer(*connection.recv()))
            except (OSError, EOFError):
                return  # the caller is gone

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()
