"""What a client may do: where pages may come from, who has the token, how much, how often, how long.

A server that is bound to loopback alone answers its own machine. For anything else a token is wanted, in the header
`Authorization: Bearer ...` or as the query parameter `token`, which browsers need for websockets.
"""

import hmac
import time
from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import web

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Limits:
    """Bounds of what one client may ask for."""

    message_bytes: int = 64 * 1024     # longest websocket message
    body_bytes: int = 1 << 20          # longest body of a request
    voice_bytes: int = 12 << 20        # longest body of a request that brings a voice to speak in
    messages_per_second: float = 200   # of a websocket, averaged over two seconds
    session_seconds: float = 600.0     # longest conversation
    sessions_per_address: int = 4      # at once
    most_waiting: int = 32             # sessions in the queue
    unsent_messages: int = 250         # what may wait for a slow reader before the connection is dropped
    send_seconds: float = 10.0         # and how long one message may take
    idle_seconds: float = 30.0         # without a message from the client
    text_characters: int = 2000        # longest text to speak

    def __post_init__(self) -> None:
        assert min(vars(self).values()) > 0, "limits are positive"


class Gate:
    """Decides who may come in; refusals are HTTP errors with one line that says why."""

    def __init__(self, limits: Limits, token: str = "", origins: tuple[str, ...] = ()) -> None:
        self.limits, self.token, self.origins, self.here = limits, token, origins, Counter[str]()

    def check(self, request: web.Request) -> None:
        """Raise HTTPForbidden for a foreign page, HTTPUnauthorized without the token."""
        host = urlsplit(f"//{request.host}").hostname
        if not self.token and host not in LOOPBACK and not any(urlsplit(origin).netloc == request.host for origin in self.origins):
            raise web.HTTPForbidden(text="without a token this server answers to localhost alone\n")      # or any page could rebind a name
        origin = request.headers.get("Origin")
        if origin is not None and origin not in self.origins and urlsplit(origin).netloc != request.host:
            name = printable(origin)
            raise web.HTTPForbidden(text=f"pages of {name} may not use this server; start it with --origins={name}\n")
        if self.token:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ") or request.query.get("token", "")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                raise web.HTTPUnauthorized(text="a token is wanted: Authorization: Bearer TOKEN, or ?token=TOKEN\n",
                                           headers={"WWW-Authenticate": "Bearer"})

    def enter(self, request: web.Request) -> str:
        """Count a session of an address; HTTPTooManyRequests above the limit. -> what `leave` wants"""
        address = request.remote or "unknown"
        if self.here[address] >= self.limits.sessions_per_address:
            raise web.HTTPTooManyRequests(text=f"{self.limits.sessions_per_address} sessions of one address are the limit; close one\n")
        self.here[address] += 1
        return address

    def leave(self, address: str) -> None:
        self.here[address] -= 1
        if self.here[address] <= 0:
            del self.here[address]


def printable(text: str) -> str:
    """What a client sent, fit for a message: short, and without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:100])


class Rate:
    """A token bucket: `allow` says whether one more message is within the rate."""

    def __init__(self, per_second: float) -> None:
        self.rate, self.left, self.at = per_second, 2 * per_second, time.monotonic()

    def allow(self) -> bool:
        now = time.monotonic()
        self.left, self.at = min(2 * self.rate, self.left + (now - self.at) * self.rate), now
        allowed = self.left >= 1
        self.left -= allowed
        return allowed
