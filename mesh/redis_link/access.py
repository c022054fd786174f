"""Where a Redis server is, how to be let in (credentials, TLS), and what went wrong in words."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from mesh.errors import AccessDeniedError, BrokerUnavailableError, ConfigurationError
from mesh.redis_link.resp import LostError, ReplyError, RespConnection

if TYPE_CHECKING:
    from pathlib import Path

PORT = 6379
_MASK = "***"
#: First words of refusals that stay until somebody changes something, with what to change.
_DENIED = {
    "NOAUTH": "it asks for a password; set REDIS_PASSWORD (and REDIS_USERNAME for an ACL user)",
    "WRONGPASS": "wrong user or password; check REDIS_USERNAME and REDIS_PASSWORD",
    "NOPERM": "the user lacks a right; it needs"
    " `+publish +subscribe +unsubscribe +spublish +ssubscribe +sunsubscribe +ping +cluster|slots"
    " &legion:*`, for a journal also what docs/redis.md lists",
    "ERR AUTH": "a password is given, but the server has none; unset REDIS_PASSWORD",
    "ERR invalid password": "wrong password; check REDIS_PASSWORD",
    "ERR DB index": "there is no such database; check the number",
}
#: First words of refusals that pass.
_PASSING = {
    "LOADING": "it is loading its data",
    "BUSY": "it is busy with a script",
    "READONLY": "it is a read-only replica",
    "MASTERDOWN": "it is a replica that has lost its master",
    "CLUSTERDOWN": "its cluster is down",
    "OOM": "it is out of memory",
    "MISCONF": "it cannot write to its disk",
    "ERR max number of clients": "it takes no more clients; raise its `maxclients`",
}


@dataclass(frozen=True, slots=True)
class Address:
    """A server: host and port, or the path of a Unix socket."""

    host: str = "localhost"
    port: int = PORT
    path: str | None = None

    def __str__(self) -> str:
        """Give it as people write it."""
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How to be let in; the same for every node of a cluster."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    #: How the connection shows in CLIENT LIST.
    client_name: str = "legion"
    #: How long a connection may take to be made: one that began in a broken network stands in the
    #: way of the next, which finds it mended.
    timeout_s: float = 3.0


@dataclass(frozen=True, slots=True)
class Url:
    """What a Redis URL says."""

    address: Address
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    #: None: it names none.
    db: int | None = None
    tls: bool = False


def parse_url(url: str) -> Url:
    """
    Read ``redis://<user>:<password>@<host>:<port>/<db>``, ``rediss://...`` or ``unix:///path?db=0``.

    Raises:
        ConfigurationError: It is none of these; the message shows no password.
    """
    shown = masked_url(url)
    try:
        parts = urlsplit(url)
        port = parts.port or PORT
        if parts.scheme != "unix" and "@" in f"{parts.path}{parts.query}{parts.fragment}":
            raise ValueError("what should have been a user or password ends early")
    except ValueError:
        # Not its own words: they show what it took for a port or address, which can be a password
        raise ConfigurationError(
            f"Redis URL {shown!r}: must be redis://<user>:<password>@<host>:<port>/<db>, the port"
            " 1 to 65535; write special characters of a password as %XX"
        ) from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ConfigurationError(f"Redis URL {shown!r}: must begin redis://, rediss:// or unix://")
    options = dict(parse_qsl(parts.query))
    unix = parts.scheme == "unix"
    text = options.pop("db", "") or ("" if unix else parts.path.strip("/"))
    if options:
        names = ", ".join(sorted(options))
        raise ConfigurationError(f"Redis URL {shown!r}: no such option: {names}")
    if text and not text.isdigit():
        raise ConfigurationError(f"Redis URL {shown!r}: the database must be a number")
    if unix and not parts.path.strip("/"):
        raise ConfigurationError(f"Redis URL {shown!r}: names no socket; write unix:///path")
    address = (
        Address(path=unquote(parts.path)) if unix else Address(parts.hostname or "localhost", port)
    )
    return Url(
        address,
        unquote(parts.username) if parts.username else None,
        unquote(parts.password) if parts.password else None,
        int(text) if text else None,
        parts.scheme == "rediss",
    )


def masked_url(url: str) -> str:
    """Give a URL, or what was meant to be one, without its password."""
    before, at, place = url.rpartition("@")
    if not at:
        return url
    scheme, mark, credentials = before.partition("://")
    if not mark:
        scheme, credentials = "", before
    user = credentials.partition(":")[0] if ":" in credentials else ""
    return f"{scheme}{mark}{user}:{_MASK}@{place}"


def tls_context(
    ca: str | Path | None = None,
    certificate: str | Path | None = None,
    key: str | Path | None = None,
) -> ssl.SSLContext:
    """
    Make a context that checks the server's certificate and name.

    Args:
        ca: The authority to trust; default: the system's.
        certificate: Our own certificate, where the server asks for one.
        key: Its key, where it is in a file of its own.

    Raises:
        ConfigurationError: A file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        named = ", ".join(str(each) for each in (ca, certificate, key) if each is not None)
        raise ConfigurationError(f"TLS files {named}: {error}") from None
    return context


async def open_connection(address: Address, access: Access, **callbacks: Any) -> RespConnection:
    """
    Connect and log in.

    Args:
        address: The server.
        access: Credentials and limits.
        callbacks: Those of `RespConnection`.

    Raises:
        AccessDeniedError: The server does not want us.
        BrokerUnavailableError: It does not answer, or not yet.
    """
    connection = RespConnection(**callbacks)
    try:
        async with asyncio.timeout(access.timeout_s):
            await _dial(connection, address, access)
            await _log_in(connection, access)
    except (OSError, ReplyError, TimeoutError) as error:
        connection.abort()
        raise unavailable(address, error, access) from None
    except BaseException:
        connection.abort()
        raise
    return connection


async def _dial(connection: RespConnection, address: Address, access: Access) -> None:
    loop = asyncio.get_running_loop()
    if address.path is not None:
        await loop.create_unix_connection(lambda: connection, address.path)
        return
    await loop.create_connection(lambda: connection, address.host, address.port, ssl=access.tls)


async def _log_in(connection: RespConnection, access: Access) -> None:
    if access.password is not None:
        names = [access.username] if access.username else []
        await connection.call("AUTH", *names, access.password)
    if access.db:
        await connection.call("SELECT", access.db)
    with contextlib.suppress(ReplyError):  # a name is for eyes; not every user may give one
        await connection.call("CLIENT", "SETNAME", access.client_name)
    await connection.call("PING")


def unavailable(address: Address, cause: Exception, access: Access) -> BrokerUnavailableError:
    """Say in our words why a server cannot be used; never with the password."""
    if isinstance(cause, BrokerUnavailableError):
        return cause
    text = _without_secret(str(cause), access.password)
    if isinstance(cause, ReplyError):
        for start, words in _DENIED.items():
            if text.startswith(start):
                return AccessDeniedError(f"redis at {address} refuses us: {words} ({text})")
        for start, words in _PASSING.items():
            if text.startswith(start):
                return BrokerUnavailableError(f"redis at {address}: {words} ({text})")
        return BrokerUnavailableError(f"redis at {address}: {text}")
    if isinstance(cause, ssl.SSLCertVerificationError):
        return AccessDeniedError(
            f"redis at {address}: its certificate is not trusted: {cause.verify_message};"
            " set REDIS_TLS_CA to the authority that signed it"
        )
    if isinstance(cause, ssl.SSLError):
        return BrokerUnavailableError(f"redis at {address}: no TLS connection: {text}")
    if isinstance(cause, TimeoutError) and not text:
        text = f"no answer for {access.timeout_s:g} s"
    if isinstance(cause, LostError) or "reset by peer" in text:
        text += "" if access.tls or address.path else " (does it want TLS?)"
    return BrokerUnavailableError(f"redis at {address} cannot be reached: {text}")


def _without_secret(text: str, secret: str | None) -> str:
    return text.replace(secret, _MASK) if secret else text
