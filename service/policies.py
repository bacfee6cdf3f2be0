"""The registry: which policies there are, which one is live, and what a policy's folder must hold.

Every change of the pointer is one transaction that also announces itself on channel `deployment`.
Used by the service (async) and, for the base, by `ratchet up` (sync).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError
from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from service.errors import Conflict, PolicyRefused, SettingsError
from service.settings import Tuning
from service.tables import Deployment, Policy
from service.weights import CONFIG, WEIGHTS, check_adapter, check_model

BASE = "policy-000000"
CHANNEL = "deployment"
MERGED = "merged"
"""Folder, in that of a policy, of the whole model (with the adapter merged into it, where it has one): for merged delivery."""


class Probe(BaseModel):
    """One fixed sequence. `logprobs[i]`: nats, of token i after the tokens before it; the first is null."""

    token_ids: list[int] = Field(min_length=2)
    logprobs: list[float | None]
    base_logprobs: list[float | None] = Field(min_length=2)
    """The same of the base."""


class Manifest(BaseModel):
    """What of a policy's `manifest.json` the service checks."""

    name: str
    tuning: Tuning = "lora"
    """`full`: it has no adapter, but is a whole model."""
    files: dict[str, str]
    probe: list[Probe] = Field(min_length=1)
    probe_tolerance: float = Field(gt=0, allow_inf_nan=False)
    """Nats a token, mean absolute: the most that an engine with the right base is off by."""


class LeadLost(Exception):
    """Another process leads by now: what this one was about to do as the leader is not done."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A policy that every replica must hold."""

    name: str
    path: str
    base: str
    """Path of the base model."""


def read_folder(name: str, path: Path, base: Path | None = None, *, merged: bool = False) -> Manifest:
    """The manifest of a whole policy folder, whose weights fit the base. Raises PolicyRefused. Reads all of it: off the loop.

    merged: it must hold the whole model.
    """
    if not (path / "READY").exists():
        raise PolicyRefused("its folder holds no READY: it was not written to the end")
    try:
        manifest = Manifest.model_validate_json((path / "manifest.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise PolicyRefused(f"its manifest cannot be read ({type(error).__name__})") from error
    if manifest.name != name:
        raise PolicyRefused(f"its manifest is that of {manifest.name}")
    if manifest.tuning == "full" and not merged:
        raise PolicyRefused("it is a whole model without an adapter: set RATCHET_DELIVERY=merged")
    for file in (WEIGHTS, CONFIG) if manifest.tuning == "lora" else ():
        if file not in manifest.files:
            raise PolicyRefused(f"its manifest has no sha256 of {file}")
    for file, sha256 in manifest.files.items():
        if _sha256(_inside(path, file)) != sha256:
            raise PolicyRefused(f"{file} is not the file that the manifest names: its sha256 differs")
    if manifest.tuning == "lora":
        check_adapter(path, base)
    if merged:
        if not any(file.startswith(f"{MERGED}/") for file in manifest.files):
            raise PolicyRefused("it holds no whole model: it was made with another RATCHET_DELIVERY")
        for weights in (path / MERGED).glob("*.safetensors"):  # an engine loads them all
            if f"{MERGED}/{weights.name}" not in manifest.files:
                raise PolicyRefused(f"its manifest does not name {MERGED}/{weights.name}")
        check_model(path / MERGED, base)
    return manifest


def _inside(folder: Path, file: str) -> Path:
    """Where a file that a manifest names is. Raises PolicyRefused where that is not in its folder."""
    if ".." in Path(file).parts or Path(file).is_absolute():
        raise PolicyRefused(f"its manifest names {file!r}, which is outside of its folder")
    return folder / file


def _sha256(path: Path) -> str:
    """Hash of a file, or "" where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def ensure_base(session: Session, path: str) -> None:
    """Insert `policy-000000` and point `live` at it where the database is new; the caller commits.

    Raises SettingsError where this database began with another model: adapters fit one base only.
    """
    base = Policy(name=BASE, path=path, state="verified", manifest={})
    known = session.get(Policy, BASE)
    if known is None:
        session.add(base)
        session.flush()
    elif known.path != path:
        raise SettingsError(
            f"RATCHET_MODEL: this state began with {known.path}, not {path}. "
            "Name the old model, or another RATCHET_STATE (and database)."
        )
    session.execute(insert(Deployment).values(id=1, live=BASE).on_conflict_do_nothing())


async def read_deployment(session: AsyncSession) -> Deployment:
    """The pointer as it is now. Raises SettingsError where `ratchet up` never prepared the database."""
    deployment = await session.get(Deployment, 1)
    if deployment is None:
        raise SettingsError("DATABASE_URL: the database has no live policy yet; `ratchet up` prepares it.")
    return deployment


async def wanted(session: AsyncSession) -> tuple[Deployment, list[Wanted]]:
    """The pointer, and what it needs: live, previous, challenger, and always the base."""
    deployment = await read_deployment(session)
    names = [deployment.live, deployment.previous, deployment.challenger, BASE]
    order = [name for name in dict.fromkeys(names) if name is not None]
    rows = await session.execute(select(Policy.name, Policy.path).where(Policy.name.in_(order)))
    paths = {row.name: row.path for row in rows}
    return deployment, [Wanted(name, paths[name], paths[BASE]) for name in order]


async def promote(session: AsyncSession, name: str) -> Deployment | None:
    """The swap: live becomes previous, the verified challenger live. None where it is challenger no more."""
    deployment = await lock_deployment(session)
    if deployment.challenger != name:
        return None
    await _set_state(session, name, "verified", None)
    deployment.previous, deployment.live, deployment.challenger = deployment.live, name, None
    await _announce(session, deployment)
    return deployment


async def refuse(session: AsyncSession, name: str, reason: str) -> Deployment | None:
    """End a challenger that failed a check; live stays untouched. None where it is challenger no more."""
    return await _end_challenger(session, name, "refused", reason)


async def reject(session: AsyncSession, name: str, reason: str) -> Deployment | None:
    """End a challenger that did not win; live stays untouched. None where it is challenger no more."""
    return await _end_challenger(session, name, "rejected", reason)


async def _end_challenger(session: AsyncSession, name: str, state: str, reason: str) -> Deployment | None:
    deployment = await lock_deployment(session)
    if deployment.challenger != name:
        return None
    await _set_state(session, name, state, reason)
    deployment.challenger = None
    await _announce(session, deployment)
    return deployment


async def roll_back(session: AsyncSession, because: str | None = None) -> Deployment:
    """Exchange live and previous. Raises Conflict where there is no previous policy.

    because: what is wrong with the one that was live; without it, it keeps its state, and the next call brings it back.
    """
    deployment = await lock_deployment(session)
    if deployment.previous is None:
        raise Conflict("There is no previous policy to go back to.", code="no_previous_policy")
    if because is not None:
        await _set_state(session, deployment.live, "rolled_back", because)
    deployment.live, deployment.previous = deployment.previous, deployment.live
    await _announce(session, deployment)
    return deployment


async def lock_deployment(session: AsyncSession) -> Deployment:
    """The pointer, which nobody else moves until the transaction ends."""
    return (
        await session.execute(select(Deployment).where(Deployment.id == 1).with_for_update())
    ).scalar_one()


async def begin_term(session: AsyncSession) -> int:
    """Number of a new leader's term, once what the last one was doing has ended. Older terms are over with it."""
    deployment = await lock_deployment(session)
    deployment.leader_term += 1
    await session.flush()
    return deployment.leader_term


async def lock_as_leader(session: AsyncSession, term: int) -> Deployment:
    """As `lock_deployment`, for whoever leads: until the transaction ends, nobody else does. Raises LeadLost.

    PostgreSQL gives the leader's lock to another process where its connection is lost; a leader that is slow to notice still believes
    what it saw before.
    """
    deployment = await lock_deployment(session)
    if deployment.leader_term != term:
        raise LeadLost
    return deployment


async def _set_state(session: AsyncSession, name: str, state: str, reason: str | None) -> None:
    policy = await session.get_one(Policy, name)
    policy.state, policy.reason = state, reason


async def _announce(session: AsyncSession, deployment: Deployment) -> None:
    """PostgreSQL delivers the notice when the transaction commits, and not otherwise.

    The clock, not the transaction's start: changes, which take turns by their lock, must be in order.
    """
    deployment.changed_at = func.clock_timestamp()
    await session.flush()
    await session.refresh(deployment)
    await session.execute(text(f"NOTIFY {CHANNEL}"))
