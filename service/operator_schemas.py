"""What the operator's calls answer: policies, the pointer, cycles, keys. Validation only."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from service.schemas import Text

Role = Literal["user", "labeler", "operator"]


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


class ActionRequest(BaseModel):
    """Why an operator does something."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "It answers too curtly."}]})

    reason: Annotated[Text, Field(max_length=2000)] | None = Field(None, description="Kept with the action.")


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
