"""A proxy between a client and PostgreSQL that reads the protocol, and can cut, hold and swallow at any message."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self, final

import sqlalchemy as sa

Direction = Literal["ask", "answer"]
_LENGTH: Final = struct.Struct("!I")


@dataclass(frozen=True)
class Message:
    """A message that is about to be forwarded: `number` counts from 0 per direction since the proxy was armed."""

    direction: Direction
    number: int
    body: bytes
    follows: bytes
    """The type of the message before it."""

    @property
    def says_committed(self) -> bool:
        """Whether this is where a client learns that what it did is committed: no transaction is open any more."""
        return self.direction == "answer" and self.body == b"Z\x00\x00\x00\x05I" and self.follows == b"C"


Rule = Callable[[Message], bool]


@final
class Proxy:
    """Listens on a TCP port of this host and forwards to the unix socket of a PostgreSQL server.

    A rule that says yes to a message cuts its connection instead of forwarding it.
    """

    def __init__(self, url: str) -> None:
        target = sa.make_url(url)
        self._target = f"{target.query['host']}/.s.PGSQL.{target.port or 5432}"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = target.set(host="127.0.0.1", port=self.port, query={"sslmode": "disable"}).render_as_string(
            hide_password=False
        )
        self.num_cuts = 0
        self.num_accepted = 0
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._rule: Rule | None = None
        self._once = True
        self._lost: Rule = lambda _: False
        self._seen: dict[Direction, int] = {"ask": 0, "answer": 0}
        self._links: set[_Link] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self._listener.close()
        self._flowing.set()
        self.cut()

    def arm(self, rule: Rule, *, once: bool = True) -> None:
        """Cut the connection at the first message that the rule says yes to, counting from now, or at all of them."""
        with self._lock:
            self._rule, self._once = rule, once
            self._seen = {"ask": 0, "answer": 0}

    def disarm(self) -> dict[Direction, int]:
        """Forget the rule; return how many messages went each way since it was set."""
        with self._lock:
            self._rule = None
            return dict(self._seen)

    def lose(self, rule: Rule) -> None:
        """Forward no message that the rule says yes to, and let the connection be."""
        self._lost = rule

    def hold(self) -> None:
        """Become a black hole: connections stay open and are accepted, and nothing passes."""
        self._flowing.clear()

    def resume(self, *, deliver: bool = True) -> None:
        """Let everything pass again: late, or, without `deliver`, over new connections only."""
        if not deliver:
            self.cut()
        self._flowing.set()

    def cut(self) -> None:
        """Cut every connection."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self._target)
            except OSError:  # no server: as refused as it can be
                client.close()
                server.close()
                continue
            link = _Link(client, server)
            with self._lock:
                self._links.add(link)
                self.num_accepted += 1
            threading.Thread(target=self._pump, args=(link, "ask"), daemon=True).start()
            threading.Thread(target=self._pump, args=(link, "answer"), daemon=True).start()

    def _pump(self, link: _Link, direction: Direction) -> None:
        source, sink = (link.client, link.server) if direction == "ask" else (link.server, link.client)
        reader = _Reader(source, opens=direction == "ask")
        follows = b""
        try:
            while (messages := reader.read()) is not None:
                while not self._flowing.wait(0.05):
                    if link.closed.is_set():
                        return
                passing: list[bytes] = []
                for body in messages:
                    message = self._number(direction, body, follows)
                    follows = body[:1]
                    if self._cuts(message):
                        sink.sendall(b"".join(passing))
                        return
                    if not self._lost(message):
                        passing.append(body)
                sink.sendall(b"".join(passing))
        except OSError:
            pass
        finally:
            link.close()
            with self._lock:
                self._links.discard(link)

    def _number(self, direction: Direction, body: bytes, follows: bytes) -> Message:
        with self._lock:
            number = self._seen[direction]
            self._seen[direction] += 1
        return Message(direction, number, body, follows)

    def _cuts(self, message: Message) -> bool:
        rule = self._rule
        if rule is None or not rule(message):
            return False
        with self._lock:
            self._rule = None if self._once else rule
            self.num_cuts += 1
        return True


@final
class _Link:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@final
class _Reader:
    """Splits a stream into messages; only a client's first one has no type byte."""

    def __init__(self, source: socket.socket, *, opens: bool) -> None:
        self._source = source
        self._opens = opens
        self._rest = b""

    def read(self) -> list[bytes] | None:
        data = self._source.recv(1 << 16)
        if not data:
            return None
        self._rest += data
        found: list[bytes] = []
        while len(self._rest) >= (start := 0 if self._opens else 1) + 4:
            end = start + _LENGTH.unpack_from(self._rest, start)[0]
            if len(self._rest) < end:
                break
            found.append(self._rest[:end])
            self._rest = self._rest[end:]
            self._opens = False
        return found
