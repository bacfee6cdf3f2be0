"""`/operator/votes`: what people vote, by the hour and one by one. Read by the operator's page.

However many votes there are, each call reads at most `MOST_READ` of them, the newest.
"""

from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import text

from service.auth import OPERATOR_ONLY
from service.context import ContextDep
from service.duel import Rules, Tally, find_interval
from service.overview_schemas import JudgedVote, ShownReply, VoteHour, VoteHours

MOST_READ = 5_000
SEARCHED = 500
"""The newest votes, among which those with a comment are looked for."""
ERROR = 0.025
"""Chance that the interval of the side bias misses on one side: 5 % on both."""

router = APIRouter(prefix="/operator", tags=["operator"], dependencies=[OPERATOR_ONLY])

# `LIMIT 1` keeps the planner from reading a large table whole to find a few thousand of its rows.
HOURS = text(
    """
WITH newest AS (
    SELECT choice, comparison_id, created_at FROM votes
    WHERE created_at > now() - make_interval(hours => :hours) ORDER BY created_at DESC LIMIT :most
)
SELECT date_trunc('hour', created_at, 'UTC') AS hour,
    count(*) FILTER (WHERE choice = 'first') AS first, count(*) FILTER (WHERE choice = 'second') AS second,
    count(*) FILTER (WHERE choice = 'tie') AS tie, count(*) FILTER (WHERE choice = 'neither') AS neither,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY greatest(0, extract(epoch FROM created_at - shown.ended_at))::float)
        FILTER (WHERE shown.ended_at IS NOT NULL) AS seconds,
    (SELECT count(*) FROM newest) AS read
FROM newest
CROSS JOIN LATERAL (
    SELECT import_id FROM comparisons WHERE id = newest.comparison_id LIMIT 1
) AS comparison
LEFT JOIN LATERAL (
    SELECT reply.ended_at FROM comparison_replies
    CROSS JOIN LATERAL (SELECT ended_at FROM replies WHERE id = comparison_replies.reply_id LIMIT 1) AS reply
    WHERE comparison_id = newest.comparison_id AND position = 0 LIMIT 1
) AS shown ON true
WHERE comparison.import_id IS NULL
GROUP BY 1 ORDER BY 1
"""
)
VOTES = text(
    """
SELECT vote.id, vote.comparison_id, vote.choice, vote.comment, vote.tags, vote.created_at,
    left(asked.content, 1000) AS prompt, said.replies
FROM (
    SELECT * FROM (SELECT * FROM votes ORDER BY created_at DESC LIMIT :searched) AS newest
    WHERE comment IS NOT NULL OR NOT :commented ORDER BY created_at DESC LIMIT :most
) AS vote
CROSS JOIN LATERAL (
    SELECT messages->-1->>'content' AS content FROM prompts
    WHERE id = (SELECT prompt_id FROM comparisons WHERE id = vote.comparison_id) LIMIT 1
) AS asked
CROSS JOIN LATERAL (
    SELECT jsonb_agg(jsonb_build_object('policy', reply.policy, 'content', left(coalesce(reply.content, ''), 1000))
        ORDER BY position) AS replies
    FROM comparison_replies
    CROSS JOIN LATERAL (SELECT policy, content FROM replies WHERE id = comparison_replies.reply_id LIMIT 1) AS reply
    WHERE comparison_id = vote.comparison_id
) AS said
ORDER BY vote.created_at DESC, vote.id DESC
"""
)


@router.get("/votes")
async def list_votes(
    context: ContextDep,
    limit: Annotated[int, Query(ge=1, le=100, description="At most so many.")] = 20,
    commented: Annotated[
        bool, Query(description="Only those with a comment, among the newest 500 votes.")
    ] = False,
) -> list[JudgedVote]:
    """The newest votes, and what they were on."""
    names = {"searched": SEARCHED if commented else limit, "commented": commented, "most": limit}
    async with context.sessions() as session:
        rows = await session.execute(VOTES, names)
        return [
            JudgedVote(
                id=row.id,
                comparison_id=row.comparison_id,
                prompt=row.prompt or "",
                replies=[ShownReply(**reply) for reply in row.replies],
                choice=row.choice,
                comment=row.comment,
                tags=row.tags,
                created_at=row.created_at,
            )
            for row in rows
        ]


@router.get("/votes/hours")
async def list_vote_hours(
    context: ContextDep,
    hours: Annotated[int, Query(ge=1, le=168, description="How many hours to look back.")] = 24,
) -> VoteHours:
    """Votes by the hour: how many, for which side, how many ties, and how long people take."""
    async with context.sessions() as session:
        rows = (await session.execute(HOURS, {"hours": hours, "most": MOST_READ})).all()
    tally = Tally(sum(row.first for row in rows), sum(row.second for row in rows), 0)
    interval = find_interval(tally, Rules(1, ERROR, ERROR))
    return VoteHours(
        hours=[VoteHour.model_validate(row) for row in rows],
        complete=not rows or rows[0].read < MOST_READ,
        first_low=interval.low,
        first_high=interval.high,
    )
