"""Ports for the jobs of tests: two at once never get the same one."""

import itertools
import os
import socket
from contextlib import suppress
from pathlib import Path

_LOWEST, _AT_ONCE = 10_000, 16
_numbers = itertools.count()


def free_port() -> int:
    """A port that no other process of the tests picks meanwhile, and that the system gives to nobody who asks for any.

    What the system gives may be given again, to a connection of another job, before the first process listens there.
    """
    end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    own = os.getpid() * _AT_ONCE
    for block in range(own, own + 1000 * _AT_ONCE, _AT_ONCE):
        port = _LOWEST + (block + next(_numbers) % _AT_ONCE) % (end - _LOWEST)
        with suppress(OSError), socket.socket() as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port from {_LOWEST} to {end} is free")
