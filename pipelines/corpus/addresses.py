"""What an address in a corpus may point at: http and https on the public internet, and the corpus's own store.

A corpus may come from strangers, and its addresses are read from inside the user's network with the user's rights. So
a path stays below the corpus, and a connection to a loopback, link-local or private address is refused. The check of a
connection lies where its socket is made: it covers literal addresses, redirects and names alike, and the address that
was checked is the one that is connected to. Behind a proxy, the proxy resolves names: there it decides which it serves.
"""

import ipaddress
import os
import re
import socket
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pipelines.corpus.fault import FetchFault
from pipelines.store import Store, scheme_problem

NAT64 = ipaddress.ip_network("64:ff9b::/96")
ALLOW_PATHS = "outside the corpus; input.allow_paths allows it"


@dataclass(frozen=True, slots=True)
class Allowed:
    """What addresses may point at besides the public internet and the corpus itself."""

    private: bool = False  # loopback, link-local and private networks
    paths: tuple[str, ...] = ()  # local folders, and prefixes such as s3://bucket/folder


@dataclass(frozen=True, slots=True)
class Stored:
    """A file in a store."""

    store: Store
    path: str  # in the form that the file system takes


def locate(address: str, store: Store, allowed: Allowed) -> str | Stored:
    """The URL that an address means, or the file in the corpus's own store.

    Raises:
        FetchFault: if the address points at anything else.
    """
    scheme = match[1].lower() if (match := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", address)) else ""
    if scheme in ("http", "https"):
        return address
    address = scheme + address[len(scheme) :]
    if scheme == "file" or (not scheme and address.startswith("/")):
        path = address[len("file://") :] if scheme else address
        return Stored(Store("/"), _below(path, [*_folders(store), *allowed.paths]))
    if scheme:
        prefixes = [*_prefixes(store), *allowed.paths]
        if _has_parent(address) or not any(_begins(address, prefix) for prefix in prefixes):
            raise FetchFault(_problem(scheme) or f"{scheme}:// {ALLOW_PATHS}")
        source = replace(store, path=address)
        return Stored(source, source.root)
    if _folders(store):
        return Stored(store, _below(store.join(address), [*_folders(store), *allowed.paths]))
    if _has_parent(address):  # a key may hold it, but clients differ in what they make of it
        raise FetchFault(ALLOW_PATHS)
    return Stored(store, store.join(address))


def checked_socket(info: Any) -> socket.socket:
    """A socket for the `addrinfo` tuple of a connection.

    Raises:
        FetchFault: if the address is not of the public internet.
    """
    family, kind, protocol, _, address = info
    if not is_public(address[0]):
        raise FetchFault("a private address; input.allow_private allows it")
    return socket.socket(family, kind, protocol)


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet; of an IPv6 address that stands for an IPv4 address, that one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def is_private_literal(host: str) -> bool:
    """Whether a URL names its host by a private address, or as this machine, without any look-up."""
    try:
        return not is_public(host.strip("[]"))
    except ValueError:
        return host.lower().rstrip(".") == "localhost" or host.lower().rstrip(".").endswith(".localhost")


@cache
def _problem(scheme: str) -> str:
    return scheme_problem(scheme)


def _folders(store: Store) -> list[str]:
    """The local folder of the corpus; none if the corpus is elsewhere."""
    return [store.root] if store.root.startswith("/") else []


def _prefixes(store: Store) -> list[str]:
    """The bucket of the corpus, as the beginning of an address; none if the corpus is local."""
    scheme, mark, rest = store.path.partition("://")
    return [f"{scheme}://{rest.partition('/')[0]}"] if mark else []


def _begins(address: str, prefix: str) -> bool:
    """Whether an address is a prefix, or lies below it."""
    return address == prefix or address.startswith(prefix.rstrip("/") + "/")


def _has_parent(address: str) -> bool:
    return ".." in address.split("/")


def _below(path: str, folders: list[str]) -> str:
    """The path without links, which must lie below one of the folders."""
    try:
        real = os.path.realpath(path)
    except (OSError, ValueError) as error:  # a null byte, or a path that is too long
        raise FetchFault(f"{type(error).__name__}: not a path") from error
    for folder in (os.path.realpath(each) for each in folders if "://" not in each):
        if real == folder or real.startswith(folder.rstrip("/") + "/"):
            return real
    raise FetchFault(ALLOW_PATHS)
