"""The record of replicas: which addresses the fleet is made of.

It begins with the addresses that the settings name. What an operator changes while it runs is a row here, which outlasts restarts and
goes before the settings. Used by the reconciler, which follows it, by `operator_replicas.py`, and by the trainer for its rollouts.
"""

from collections.abc import Sequence
from typing import Literal

from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from service.errors import Conflict, NotFound
from service.policies import CHANNEL
from service.tables import ReplicaRow

State = Literal["serving", "draining", "removed"]
Addresses = dict[str, State]
"""What is wanted of each replica; removed ones are left out."""


async def read(session: AsyncSession, settings_urls: Sequence[str]) -> Addresses:
    """As `read_now`."""
    return await session.run_sync(read_now, settings_urls)


def read_now(session: Session, settings_urls: Sequence[str]) -> Addresses:
    """The replicas that are wanted: the settings' first, then those that were added."""
    rows = session.execute(select(ReplicaRow.url, ReplicaRow.state).order_by(ReplicaRow.url))
    wanted: Addresses = dict.fromkeys(settings_urls, "serving")
    wanted |= {row.url: row.state for row in rows}
    return {url: state for url, state in wanted.items() if state != "removed"}


async def change(session: AsyncSession, settings_urls: Sequence[str], url: str, state: State) -> Addresses:
    """Want a replica in another state; the caller commits. Raises NotFound, and Conflict where no replica would be left to serve."""
    await session.execute(
        text("LOCK TABLE replicas IN SHARE ROW EXCLUSIVE MODE")
    )  # two at once, and none is left
    before = await read(session, settings_urls)
    if state != "serving" and url not in before:
        raise NotFound(f"There is no replica {url[:200]}.", param="url", code="replica_not_found")
    row = {"state": state, "changed_at": func.clock_timestamp()}
    statement = insert(ReplicaRow).values(url=url, **row)
    await session.execute(statement.on_conflict_do_update(index_elements=["url"], set_=row))
    after = await read(session, settings_urls)
    if "serving" not in after.values():
        raise Conflict(f"{url} is the last replica that serves. Add another one first.", code="last_replica")
    await session.execute(text(f"NOTIFY {CHANNEL}"))
    return after
