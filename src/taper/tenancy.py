"""Whose request is it, and a group tag that nobody else's can equal.

A group has one protected row, so whoever can put branches into another's group can starve it. The tag that the
engine sees is therefore

    sealed:HMAC-SHA256(server's secret, tenant, client's tag)        the first 128 bits, in hex

which no client can compute, whatever it sends: a tag that already looks sealed is sealed like any other.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from taper.claims import SEALED

SEAL_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Who may share a group. Two requests are of one tenant where both fields agree; None is a value like others."""

    key: str | None
    origin: str | None


def tenant(*, key: str | None, origin: str | None, is_checked: bool) -> Tenant:
    """An API key that the server checked is an identity: its holder may join a group from anywhere.

    Any other is a word that anyone may send (clients made for keyless servers all send the same one), so
    the origin decides; the word only divides an origin further, as a gateway in front does with its clients.
    """
    if is_checked and key is not None:
        return Tenant(key=key, origin=None)
    return Tenant(key=key, origin=origin)


def seal(secret: bytes, owner: Tenant, group: str) -> str:
    """The tag under which the engine knows `group` of `owner`."""
    digest = hmac.new(secret, digestmod=hashlib.sha256)
    for part in (owner.key, owner.origin, group):
        raw = b"" if part is None else part.encode("utf-8", "surrogatepass")
        digest.update(f"{'absent' if part is None else len(raw)}:".encode())
        digest.update(raw)
    return SEALED + digest.digest()[:SEAL_BYTES].hex()
