"""`watch`: a page on this machine that follows runs. It reads what they write, and changes nothing."""

import errno
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sep.data.extras import needs_extra
from megatron_sep.errors import UserError
from megatron_sep.report.figures import AXES, FIGURES
from megatron_sep.report.follow import Follower
from megatron_sep.report.runs import differing, find_runs, settings_of, state_of
from megatron_sep.train.written import SETTINGS, read_history
from megatron_sep.weights.sealed import finished_checkpoints

PORT = 8700
_PAGE = Path(__file__).with_name("page")
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HERE = ("127.0.0.1", "localhost", "::1")
_EVENTS = 200
"""Newest ones of a run that the page shows."""
Seen = Mapping[str, Sequence[int]]


class WatchError(UserError):
    """A page that cannot be served as asked."""


class Watched:
    """The runs in some folders, as they are at each look: they may begin later, and be deleted."""

    def __init__(self, places: Sequence[Path]) -> None:
        self.places, self._lock = tuple(places), threading.Lock()
        self._followers: dict[Path, Follower] = {}
        self._settings: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}

    def look(self, seen: Seen) -> dict[str, Any]:
        """All runs, each with the rows that are new to a page that has ``seen`` {name: (generation, rows)}."""
        with self._lock:
            found = find_runs(self.places)
            self._followers = {run: self._followers.get(run) or Follower(run) for run in found.values()}
            told, states = [], []
            for name, run in found.items():
                with suppress(OSError):  # deleted since it was found
                    settings, history = self._settings_of(run), read_history(run)
                    follower = self._followers[run]
                    follower.look(settings)
                    states.append(state_of(name, run, history, follower.lines, settings))
                    told.append(self._rows(follower, seen.get(name, (-1, 0))) | self._events(run, history))
        keys = differing(states)
        for each, state in zip(told, states, strict=True):
            each |= asdict(state) | {"settings": {key: state.settings.get(key) for key in keys if state.settings}}
        return {"runs": told, "waiting": [str(place) for place in self.places if not place.is_dir()]}

    def _rows(self, follower: Follower, seen: Sequence[int]) -> dict[str, Any]:
        generation, count = seen
        first = count if generation == follower.generation and 0 <= count <= len(follower.rows) else 0
        return {"generation": follower.generation, "first": first, "rows": follower.rows[first:]}

    def _events(self, run: Path, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        steps = [int(path.name.removeprefix("step-")) for path in finished_checkpoints(run / "checkpoints")]
        return {"events": history[-_EVENTS:], "checkpoints": steps}

    def _settings_of(self, run: Path) -> dict[str, Any]:
        """Read anew where the file has changed."""
        mark = (0, 0)
        with suppress(OSError):
            status = (run / SETTINGS).stat()
            mark = (status.st_mtime_ns, status.st_size)
        if self._settings.get(run, ((-1, -1), {}))[0] != mark:
            self._settings[run] = (mark, settings_of(run))
        return self._settings[run][1]


def page(watched: Watched, host: str) -> Any:
    """The page as an ASGI application; it answers those names of this machine that it is bound to. No URL is a path."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def data(request: Request) -> Response:
        from anyio.to_thread import run_sync

        try:
            seen = _seen(await request.json())
        except (ValueError, TypeError, OverflowError):
            return Response("send {run: [generation, rows]}", 400)
        return Response(_json(await run_sync(watched.look, seen)), media_type="application/json")

    def figures(_: Request) -> Response:
        return Response(_json({"axes": AXES, "figures": list(map(asdict, FIGURES))}), media_type="application/json")

    def file(path: Path) -> Callable[[Request], Response]:
        headers = {"Content-Security-Policy": "default-src 'self'; img-src 'self' data:", "Cache-Control": "no-cache"}
        return lambda _: Response(path.read_bytes(), media_type=_KINDS[path.suffix], headers=headers)

    files = {path.name: path for path in _PAGE.iterdir() if path.suffix in _KINDS}
    routes = [Route("/", file(files["index.html"])), *(Route(f"/{name}", file(path)) for name, path in files.items())]
    hosts = [*_HERE[:2], "[::1]", host] if host in _HERE else ["*"]
    return Starlette(
        routes=[*routes, Route("/figures", figures), Route("/data", data, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
    )


def _seen(value: Any) -> Seen:
    """Raises ValueError, TypeError, OverflowError for what a page does not send."""
    found = {str(name): tuple(map(int, mark)) for name, mark in dict(value).items()}
    if any(len(mark) != 2 for mark in found.values()):
        raise ValueError(value)
    return found


def _json(value: Any) -> str:
    """With null for numbers that JSON has no word for."""
    return json.dumps(_finite(value), default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bound(host: str, port: int | None) -> socket.socket:
    """A socket that listens at ``port``; None: at the usual one, or any that is free. Raises WatchError."""
    for number in (PORT, 0) if port is None else (port,):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
            listener.listen()
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE and port is None:
                continue
            raise WatchError(
                f"--host {host} --port {number}: {error.strerror or error}; leave --port out, or name a free one"
            ) from error
        return listener
    raise WatchError(f"--host {host}: no port is free")


def watch(places: Sequence[Path], host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serve until interrupted; yields what to say before that. Raises WatchError, MissingLibraryError."""
    with needs_extra("starlette", "watch"), needs_extra("uvicorn", "watch"):
        import uvicorn

        application = page(Watched(places), host)
    files = [place for place in places if place.exists() and not place.is_dir()]
    if files:
        raise WatchError(f"{files[0]}: is no directory; name the dir of a run, or a folder that has runs in it")
    listener = bound(host, port)
    for place in places:
        if not place.is_dir():
            yield f"{place}: is not there yet; its runs appear when they begin"
    if host not in _HERE:
        yield f"everybody who reaches {host} can read the numbers and settings of these runs"
    name = f"[{host}]" if ":" in host else host
    yield f"http://{name}:{listener.getsockname()[1]}/  (Ctrl-C ends it)"
    with suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(application, log_level="warning")).run([listener])
