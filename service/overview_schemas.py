"""What the operator's page is drawn from: how the service is, what is learnt, and what people vote. Validation only."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from service.operator_schemas import ActionView, DeploymentView, DuelView


class Engines(BaseModel):
    """The replicas, as the process that answers sees them."""

    replicas: int = Field(description="How many there are.")
    healthy: int = Field(description="How many of them generate tokens.")
    policies: list[str] = Field(description="Policies that can be asked for by name now.")


class Progress(BaseModel):
    """How far a stage of a cycle is."""

    stage: str = Field(description="The stage.")
    done: int = Field(description="Steps done.")
    total: int = Field(description="Steps in all; 0 where nobody knows.")


class Share(BaseModel):
    """A share with its 95 % interval."""

    share: float = Field(description="The share.")
    low: float = Field(description="Lower end of the interval.")
    high: float = Field(description="Upper end of the interval.")
    num_pairs: int = Field(description="Pairs that it was counted on.")


class KeptIteration(BaseModel):
    """The iteration whose policy a cycle kept."""

    number: int = Field(description="Its number, from 0.")
    score: float = Field(
        description="Reward by the ensemble, in standard deviations over the anchor's replies."
    )
    judge: float = Field(description="The same by the held-out judge.")
    kl: float = Field(description="KL to the anchor, nats per reply.")


class CycleFigures(BaseModel):
    """A cycle in a few figures; `/operator/cycles/{id}` has all of them."""

    model_config = ConfigDict(from_attributes=True)

    id: int = Field(description="Its number.")
    trigger: str = Field(description="`votes`, `clock` or `operator`.")
    stage: str = Field(description="Where it is, or how it ended.")
    reason: str | None = Field(description="Why it ended so, or what it waits for.")
    policy: str | None = Field(description="The policy that it made.")
    created_at: datetime = Field(description="When it began.")
    ended_at: datetime | None = Field(description="When it ended.")
    progress: Progress | None = Field(description="How far its stage is.")
    votes: int | None = Field(description="Votes in its snapshot; null before it has one.")
    accuracy: Share | None = Field(description="Held-out pairs that its reward model orders right.")
    calibration_error: float | None = Field(
        description="How far the reward model's confidence is from its accuracy, on average."
    )
    kept: KeptIteration | None = Field(description="What its training ended with.")


class PolicyFigures(BaseModel):
    """A policy: where it comes from, and how it did."""

    model_config = ConfigDict(from_attributes=True)

    name: str = Field(description="Its name.")
    parent: str | None = Field(description="The policy that it was trained from; null for the base.")
    state: str = Field(description="What became of it.")
    reason: str | None = Field(description="Why it was rejected, refused or rolled back.")
    created_at: datetime = Field(description="When it was published.")
    cycle_id: int | None = Field(description="The cycle that made it; null for the base.")
    snapshot_sha256: str | None = Field(description="The snapshot that the cycle trained on.")
    votes: int | None = Field(description="Votes in that snapshot.")


class Overview(BaseModel):
    """How the service is, at a glance."""

    deployment: DeploymentView = Field(description="Which policy is live, on trial, and to fall back to.")
    engines: Engines = Field(description="The replicas.")
    votes: int = Field(description="Votes in all, as of a moment ago.")
    new_votes: int = Field(description="Votes since the last cycle began; counted up to `cycle_votes`.")
    cycle_votes: int = Field(description="New votes that start a cycle (`RATCHET_CYCLE_VOTES`).")
    duel_votes: int = Field(description="Votes at which a duel ends undecided (`RATCHET_DUEL_VOTES`).")
    policies: list[PolicyFigures] = Field(description="The newest policies, the newest first.")
    line: list[PolicyFigures] = Field(description="The live policy, its parent, and so on towards the base.")
    cycles: list[CycleFigures] = Field(description="The newest cycles, the newest first.")
    duels: list[DuelView] = Field(description="The newest duels, the newest first.")
    actions: list[ActionView] = Field(description="What operators did last, the newest first.")


class DuelPoint(BaseModel):
    """A duel's votes so far, as of one vote."""

    at: datetime = Field(description="When that vote was given.")
    wins: int = Field(description="Votes for the challenger.")
    losses: int = Field(description="Votes for the incumbent.")
    ties: int = Field(description="Votes for both or neither.")
    low: float = Field(
        description="Lower end of the interval of the challenger's chance to win a decided vote."
    )
    high: float = Field(description="Upper end of it. The interval holds at all times at once.")


class DuelCourse(BaseModel):
    """How a duel went."""

    duel: DuelView = Field(description="The duel.")
    points: list[DuelPoint] = Field(
        description="At most 60, evenly spread over its votes; the last vote is one."
    )


class VoteHour(BaseModel):
    """The votes of one hour."""

    model_config = ConfigDict(from_attributes=True)

    hour: datetime = Field(description="When the hour began.")
    first: int = Field(description="Votes for the reply shown first.")
    second: int = Field(description="Votes for the reply shown second.")
    tie: int = Field(description="Votes that both are as good.")
    neither: int = Field(description="Votes that neither is good.")
    seconds: float | None = Field(
        description="Median time to vote: from the end of the reply shown first to the vote; null without any."
    )


class VoteHours(BaseModel):
    """Users' votes by the hour, imported ones left out."""

    hours: list[VoteHour] = Field(description="Hours that have votes, the oldest first.")
    complete: bool = Field(
        description="Whether all votes were read: at most the newest 5,000 are, and the oldest hour may lack some."
    )
    first_low: float = Field(
        description="Lower end of the interval of the chance that a decided vote is for the reply shown first."
    )
    first_high: float = Field(description="Upper end of it. With no side bias it holds one half.")


class ShownReply(BaseModel):
    """A reply, as it was compared."""

    policy: str | None = Field(description="Whose it is; null where it was imported.")
    content: str = Field(description="Its first 1,000 characters.")


class JudgedVote(BaseModel):
    """A vote, and what it was on."""

    id: int = Field(description="Its number.")
    comparison_id: str = Field(description="The comparison.")
    prompt: str = Field(description="The first 1,000 characters of the user's last message.")
    replies: list[ShownReply] = Field(description="The replies, as they were shown.")
    choice: str = Field(description="`first`, `second`, `tie` or `neither`.")
    comment: str | None = Field(description="The user's comment.")
    tags: list[Any] = Field(description="The user's tags.")
    created_at: datetime = Field(description="When it was given.")


class SampleReply(BaseModel):
    """What one policy answered to a guard prompt."""

    policy: str = Field(description="The policy, or the cycle whose policy the gate refused.")
    content: str = Field(description="The reply.")


class PromptSamples(BaseModel):
    """One guard prompt, asked by every cycle."""

    prompt: str = Field(description="The prompt's last message.")
    replies: list[SampleReply] = Field(description="What each policy answered, the oldest first.")
