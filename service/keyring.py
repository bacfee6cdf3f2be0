"""API keys and who they stand for. Knows nothing of HTTP. Used by `auth.py`, and by whoever makes keys.

A key is 32 random bytes, so its SHA-256 is as good as a slow hash: there is nothing to guess. It is shown once and stored as
that hash.
"""

import hashlib
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from service.errors import Unauthorized
from service.journal import UserName
from service.tables import ROLES, Key

PREFIX = "rk-"
HINT_CHARACTERS = 9
REMEMBERED_SECONDS = 5.0
"""How long a process trusts what it read of a key: a revoked one stops within this."""
MOST_REMEMBERED = 10_000
ANONYMOUS = "anonymous"
"""The user of a call that has neither a key nor the field `user`."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks."""

    account: str
    """Whose key it is; empty without one."""
    role: str
    key_id: int | None
    """None without a key."""

    def user(self, name: str | None) -> UserName:
        """The user within the account, as the client names it: one account may serve many people."""
        return UserName(self.account, name or ("" if self.account else ANONYMOUS))

    def at_least(self, role: str) -> bool:
        return ROLES.index(self.role) >= ROLES.index(role)


class KeyRing:
    """The keys that this process has seen lately, so that not each request asks the database."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, Identity]] = {}

    async def find(self, sessions: async_sessionmaker[AsyncSession], key: str) -> Identity:
        """Raises Unauthorized where the key is unknown, revoked or expired."""
        sha256 = hash_key(key)
        read_at, identity = self._known.get(sha256, (0.0, None))
        if identity is None or time.monotonic() - read_at > REMEMBERED_SECONDS:
            self._known.pop(sha256, None)
            async with sessions() as session:
                identity = await _read(session, sha256)
            if len(self._known) >= MOST_REMEMBERED:
                self._known.clear()
            self._known[sha256] = (time.monotonic(), identity)
        return identity

    def forget(self) -> None:
        """Read every key anew: one was revoked."""
        self._known.clear()


async def _read(session: AsyncSession, sha256: str) -> Identity:
    key = await session.scalar(
        select(Key).where(
            Key.sha256 == sha256,
            Key.revoked_at.is_(None),
            (Key.expires_at.is_(None)) | (Key.expires_at > func.now()),
        )
    )
    if key is None:
        raise Unauthorized(
            "This key is unknown, revoked or expired. Ask the operator for another.", code="invalid_api_key"
        )
    return Identity(key.account, key.role, key.id)


def hash_key(key: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key(account: str, role: str, expires_at: datetime | None = None) -> tuple[str, Key]:
    """A fresh key, to be shown once, and its row. Raises ValueError where it would be expired already."""
    if expires_at is not None and expires_at <= datetime.now(UTC):
        raise ValueError("expires_at lies in the past")
    key = PREFIX + secrets.token_urlsafe(32)
    return key, key_row(key, account, role, expires_at)


def key_row(key: str, account: str, role: str, expires_at: datetime | None = None) -> Key:
    """What is stored of a key that somebody already has."""
    return Key(
        account=account, role=role, sha256=hash_key(key), hint=key[:HINT_CHARACTERS], expires_at=expires_at
    )
