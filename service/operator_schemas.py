"""What the operator's calls answer: policies, the pointer, cycles, keys. Validation only."""

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from service.schemas import Name, Text

Role = Literal["user", "labeler", "operator"]


LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
ADDRESS = rf"^https?://({LABEL}(\.{LABEL})*|\[[0-9A-Fa-f:.]{{2,45}}\])(:{PORT})?(/[A-Za-z0-9._~-]+)*/?$"


def _check_address(value: str) -> str:
    """An engine's address. Raises ValueError that says what to change."""
    if not re.fullmatch(ADDRESS, value):
        raise ValueError("must be an address like http://10.0.0.7:8001, without user, query or fragment.")
    return value


Address = Annotated[
    Text, AfterValidator(_check_address), Field(max_length=500, json_schema_extra={"pattern": ADDRESS})
]


class PolicyView(BaseModel):
    """A policy, for the operator."""

    model_config = ConfigDict(from_attributes=True)

    name: str = Field(description="Its name.")
    parent: str | None = Field(description="The policy that it was trained from.")
    cycle_id: int | None = Field(description="The cycle that made it; null for the base.")
    state: Literal["published", "verified", "rejected", "refused", "rolled_back"] = Field(
        description="`verified` can answer; `rejected` by the users' votes or an operator; `refused` when it was to be loaded; "
        "`rolled_back` was live, and lost to the policy before it."
    )
    reason: str | None = Field(description="Why it was rejected, refused or rolled back.")
    manifest: dict[str, Any] = Field(description="What the trainer recorded of it.")
    created_at: datetime = Field(description="When it was published.")


class DeploymentView(BaseModel):
    """The pointer, for the operator."""

    model_config = ConfigDict(from_attributes=True)

    live: str = Field(description="The policy that answers.")
    challenger: str | None = Field(description="The policy on trial.")
    previous: str | None = Field(description="The policy to fall back to.")
    changed_at: datetime = Field(description="When the pointer last moved.")


class DuelView(BaseModel):
    """A duel, for the operator."""

    model_config = ConfigDict(from_attributes=True)

    id: int = Field(description="Its number.")
    kind: Literal["trial", "watch"] = Field(
        description="`trial`: the challenger must win to go live. `watch`: it is live, and must not lose."
    )
    challenger: str = Field(description="The newer policy.")
    incumbent: str = Field(description="The policy that it is compared with.")
    outcome: Literal["better", "worse", "undecided", "stopped"] | None = Field(
        description="Of the challenger; null while it runs."
    )
    reason: str | None = Field(description="The votes, or what stopped it.")
    metrics: dict[str, Any] = Field(description="Votes, win rate with its interval, and the evidence so far.")
    created_at: datetime = Field(description="When it began.")
    ended_at: datetime | None = Field(description="When it ended.")


class RatingView(BaseModel):
    """A policy's rating. Intervals are of 95 %, for one look; a tie counts as half a win."""

    model_config = ConfigDict(from_attributes=True)

    policy: str = Field(description="Its name.")
    votes: int = Field(description="Votes of all its duels.")
    win_rate: float = Field(description="Share of them that it won, whoever it met.")
    win_rate_low: float = Field(description="Where the interval of `win_rate` begins.")
    win_rate_high: float = Field(description="Where it ends.")
    strength: float | None = Field(
        description="Bradley-Terry strength: the logarithm of its odds to be preferred to the base, also where the two never "
        "met. Null where no votes lead from it to the base."
    )
    strength_low: float | None = Field(description="Where the interval of `strength` begins.")
    strength_high: float | None = Field(description="Where it ends.")


class ActionRequest(BaseModel):
    """Why an operator does something."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "It answers too curtly."}]})

    reason: Annotated[Text, Field(max_length=2000)] | None = Field(None, description="Kept with the action.")


class ReplicaRequest(BaseModel):
    """What is wanted of a replica, and why."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"url": "http://10.0.0.7:8001", "state": "serving", "reason": "A second machine."}]
        }
    )

    url: Address = Field(description="Its address: `http://host:port`, as vLLM serves it.")
    state: Literal["serving", "draining", "removed"] = Field(
        description="`serving`: add it, or take it back. `draining`: no new requests. `removed`: none at all."
    )
    reason: Annotated[Text, Field(max_length=2000)] | None = Field(None, description="Kept with the action.")


class ReplicaView(BaseModel):
    """A replica, for the operator, as the process that answers sees it."""

    url: str = Field(description="Its address.")
    state: Literal["serving", "draining"] = Field(description="What is wanted of it.")
    healthy: bool = Field(description="Whether it gives tokens.")
    policies: list[str] = Field(
        description="The policies that it holds and reproduces: those it is asked for."
    )
    refused: dict[str, str] = Field(description="Policies that it could not load or reproduce, and why.")
    running: int = Field(description="Generations under way. A drained one can be stopped at 0.")


class MoveRequest(ActionRequest):
    """Why the pointer is moved, and to what."""

    policy: Name | None = Field(
        None, description="The policy that is meant: refused where it would be done to another one by now."
    )


class CycleRequest(ActionRequest):
    """A cycle to be run now."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"method": "sft", "reason": "A manual of style was written."}]}
    )

    method: Literal["ppo", "dpo", "orpo", "sft"] | None = Field(
        None,
        description="How its policy is learnt. `ppo`, `dpo`, `orpo`: from votes. `sft`: from demonstrations, "
        "and once live it is the anchor of later cycles. Left out: `RATCHET_METHOD`.",
    )


class ActionView(BaseModel):
    """What an operator did."""

    model_config = ConfigDict(from_attributes=True)

    id: int = Field(description="Its number.")
    account: str = Field(description="Whose key it was; empty where none was needed.")
    action: str = Field(description="What was done.")
    subject: str | None = Field(description="The policy or cycle that it was done to.")
    reason: str | None = Field(description="Why, in the operator's words.")
    created_at: datetime = Field(description="When.")


class CycleView(BaseModel):
    """A cycle, for the operator."""

    model_config = ConfigDict(from_attributes=True)

    id: int = Field(description="Its number.")
    trigger: str = Field(description="`votes`, `clock` or `operator`.")
    stage: str = Field(description="Where it is, or how it ended.")
    reason: str | None = Field(description="Why it ended so, or what it waits for.")
    snapshot_sha256: str | None = Field(description="The snapshot that it trains on.")
    policy: str | None = Field(description="The policy that it made.")
    metrics: dict[str, Any] = Field(description="Progress and results, by stage.")
    created_at: datetime = Field(description="When it began.")
    ended_at: datetime | None = Field(description="When it ended.")


class KeyRequest(BaseModel):
    """A key to be made."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"account": "acme", "role": "labeler"}]})

    account: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = Field(
        description="Whose key it is. Several keys may share an account, and with it its users and conversations."
    )
    role: Role = Field(
        "user",
        description="`user` chats and votes; `labeler` also ranks and writes replies; `operator` also runs the service.",
    )
    expires_at: AwareDatetime | None = Field(None, description="When it stops working; never where left out.")


class KeyView(BaseModel):
    """A key, without the key."""

    model_config = ConfigDict(from_attributes=True)

    id: int = Field(description="Its number.")
    account: str = Field(description="Whose key it is.")
    role: Role = Field(description="What it may do.")
    hint: str = Field(description="How it begins.")
    created_at: datetime = Field(description="When it was made.")
    expires_at: datetime | None = Field(description="When it stops working.")
    revoked_at: datetime | None = Field(description="When it was revoked.")


class NewKey(KeyView):
    """A key that has just been made."""

    key: str = Field(description="The key. It is not stored: keep it.")
