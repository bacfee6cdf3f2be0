"""How replicas come to answer as the policies that the database wants: what both ways have in common, and what they must tell.

`adapter_delivery.py` loads them side by side, `merged_delivery.py` exchanges an engine's weights. Used by `reconciler.py`, which alone
knows who leads.
"""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from pathlib import Path

from service import policies
from service.errors import EngineUnavailable, PolicyRefused
from service.fleet import Fleet, Replica
from service.policies import Manifest, Wanted
from service.tables import Deployment

log = logging.getLogger("ratchet.delivery")
RETRY_SECONDS = 30.0
"""A wanted policy that a replica refused is tried again after this long (the disk may be back)."""
SeeTo = Callable[[Replica], Coroutine[None, None, None]]
"""Looks at one replica, and brings it a step nearer to what it should hold. Raises what nobody has thought of."""


class Delivery(ABC):
    """One per service process."""

    merged: bool
    """Whether engines are given whole models."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._manifests: dict[str, Manifest] = {}
        self._retry_at: dict[tuple[str, str], float] = {}

    @abstractmethod
    def plan(self, deployment: Deployment, wanted: list[Wanted], term: int | None) -> SeeTo | None:
        """How to see to each replica now; None where this process has to see to none. term: the leader's, None for others."""

    @abstractmethod
    def is_ready(self, challenger: str) -> bool:
        """Whether the replicas that serve have verified it, so that its votes can begin."""

    def objection(self, challenger: str) -> str | None:
        """Why it can never be ready; None where nothing is known against it."""
        serving = self._fleet.serving()
        return next((each.refused[challenger] for each in serving if challenger in each.refused), None)

    async def _manifest(self, policy: Wanted) -> Manifest:
        """The folder's manifest; its files are hashed and looked into once in a process, off the loop. Raises PolicyRefused."""
        if policy.name not in self._manifests:
            self._manifests[policy.name] = await asyncio.to_thread(
                policies.read_folder, policy.name, Path(policy.path), Path(policy.base), merged=self.merged
            )
        return self._manifests[policy.name]

    def _is_put_off(self, replica: Replica, policy: Wanted) -> bool:
        """Whether it was refused there a moment ago."""
        return policy.name in replica.refused and time.monotonic() < self._retry_at[replica.url, policy.name]

    def _note_refused(self, replica: Replica, policy: Wanted, error: PolicyRefused) -> None:
        log.error("%s refused on %s: %s", policy.name, replica.url, error.message)
        replica.refused[policy.name] = error.message
        self._retry_at[replica.url, policy.name] = time.monotonic() + RETRY_SECONDS


def give_up(replica: Replica, error: EngineUnavailable) -> None:
    """A replica that failed while it was being seen to."""
    if replica.healthy:
        log.warning("replica %s is not healthy: %s", replica.url, error.message)
    replica.fail()
