"""Work that goes on beside the steps, in a thread that never keeps the process from ending."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str) -> "Future[T]":
    """Begin ``work``; its value, or what it raised, is the future's."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            value = work()
        except BaseException as error:  # handed on to whoever asks for the value
            future.set_exception(error)
        else:
            future.set_result(value)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
