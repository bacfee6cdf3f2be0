"""`/operator/replicas`: which engines answer, how each of them is, and adding, draining and removing them while the service runs."""

from fastapi import APIRouter

from service import replicas
from service.auth import OPERATOR_ONLY, OperatorDep
from service.context import Context, ContextDep
from service.errors import Conflict
from service.fleet import Replica
from service.operator import record
from service.operator_schemas import ReplicaRequest, ReplicaView

router = APIRouter(prefix="/operator/replicas", tags=["operator"], dependencies=[OPERATOR_ONLY])
DONE = {"serving": "add replica", "draining": "drain replica", "removed": "remove replica"}
"""What an action is called on record."""


@router.get("")
async def list_replicas(context: ContextDep) -> list[ReplicaView]:
    """Every replica, and how it is, as the process that answers this call sees it."""
    async with context.sessions() as session:
        context.fleet.follow(await replicas.read(session, context.settings.replica_urls))
    return [_view(replica) for replica in context.fleet.replicas]


@router.put("")
async def change_replica(
    body: ReplicaRequest, identity: OperatorDep, context: ContextDep
) -> list[ReplicaView]:
    """Add a replica, or one that was drained or removed again; drain it; remove it. Answers with those that there are now.

    A new one gets requests once it gives tokens, holds the policies and reproduces their probes. A drained one gets no new requests,
    ends those that it has, and is kept ready; a removed one ends those that it has, too.
    """
    url = body.url.rstrip("/")
    if body.state != "serving":
        _check_spare(context, url)
    async with context.sessions.begin() as session:
        wanted = await replicas.change(session, context.settings.replica_urls, url, body.state)
        record(session, identity, DONE[body.state], url, body.reason)
    context.fleet.follow(wanted)
    return [_view(replica) for replica in context.fleet.replicas]


def _check_spare(context: Context, url: str) -> None:
    """Raises Conflict where no other replica can answer with the live policy."""
    live = context.fleet.live_policy()
    able = [replica.url for replica in context.fleet.serving() if live in replica.verified]
    if able == [url]:
        raise Conflict(
            f"Only {url} can answer now. Add another one, and wait until it holds {live}.",
            code="last_replica",
        )


def _view(replica: Replica) -> ReplicaView:
    return ReplicaView(
        url=replica.url,
        state="draining" if replica.draining else "serving",
        healthy=replica.healthy,
        policies=sorted(replica.verified),
        refused=dict(replica.refused),
        running=replica.running.total(),
    )
