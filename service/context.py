"""What every endpoint works with, made once by `app.py`."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from service.fleet import Fleet
from service.journal import Journal
from service.keyring import KeyRing
from service.limits import Limits
from service.settings import Settings
from service.vote_count import VoteCount


@dataclass(frozen=True, slots=True)
class Context:
    """The settings, the ways to the database, the replicas, and who may ask how much."""

    settings: Settings
    sessions: async_sessionmaker[AsyncSession]
    journal: Journal
    fleet: Fleet
    keys: KeyRing
    limits: Limits
    votes: VoteCount


def context_of(request: Request) -> Context:
    """The context of the service that this request came to."""
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


async def _context(request: Request) -> Context:
    return context_of(request)


ContextDep = Annotated[Context, Depends(_context)]
