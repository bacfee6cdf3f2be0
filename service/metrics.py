"""Every metric of the service, for Prometheus at `/metrics`. Names begin with `ratchet_` and hold units."""

from contextlib import suppress

from prometheus_client import Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

ERRORS = Counter("ratchet_errors", "Answers with an error, by status.", ["status"])
REPLIES = Counter(
    "ratchet_replies", "Replies that ended, by policy and finish reason.", ["policy", "finish_reason"]
)
REPLY_TOKENS = Counter("ratchet_reply_tokens", "Tokens of ended replies, by policy.", ["policy"])
REPLY_SECONDS = Histogram(
    "ratchet_reply_seconds", "From request to the end of its last reply.", buckets=SECONDS
)
FIRST_TOKEN_SECONDS = Histogram(
    "ratchet_first_token_seconds", "From request to the first token.", buckets=SECONDS
)
RETRIES = Counter(
    "ratchet_retries",
    "Requests whose replica failed with them before a token, and that go to another where there is one.",
)
RUNNING = Gauge("ratchet_requests_running", "Chat requests that are being answered.")
QUEUED = Gauge("ratchet_requests_queued", "Chat requests that wait for their turn.")
COMPARISONS = Counter("ratchet_comparisons", "Comparisons shown, by reason.", ["reason"])
VOTES = Counter("ratchet_votes", "Votes given or revised, by choice.", ["choice"])
MIXED_POLICY = Counter("ratchet_mixed_policy", "Engine chunks of another policy than asked for. Must stay 0.")
SWAPS = Counter("ratchet_swaps", "Challengers decided on, by result: promoted or refused.", ["result"])
ROLLBACKS = Counter("ratchet_rollbacks", "Times that live and previous were exchanged.")
LOAD_SECONDS = Histogram(
    "ratchet_policy_load_seconds", "To load and verify a policy on a replica.", buckets=SECONDS
)
PROBE_GAP = Gauge("ratchet_probe_gap_nats", "Engine against manifest, mean absolute, per token.", ["policy"])
REPLICA_HEALTHY = Gauge("ratchet_replica_healthy", "1 where a replica generates tokens.", ["replica"])
RECONCILE_ERRORS = Counter("ratchet_reconcile_errors", "Rounds of the reconciler that failed.")
LIVE = Gauge("ratchet_live", "1 for the policy that answers.", ["policy"])

DUELS = Counter(
    "ratchet_duels", "Duels that ended, by kind and outcome for the challenger.", ["kind", "outcome"]
)
DUEL_VOTES = Gauge(
    "ratchet_duel_votes",
    "Votes of the last duel of a kind, by result for the challenger.",
    ["kind", "result"],
)


def show_duel(kind: str, wins: int, losses: int, ties: int) -> None:
    """Let `ratchet_duel_votes` show this tally."""
    for result, votes in (("win", wins), ("loss", losses), ("tie", ties)):
        DUEL_VOTES.labels(kind, result).set(votes)


def forget_replica(url: str) -> None:
    """Let `ratchet_replica_healthy` no longer name a replica that was removed."""
    with suppress(KeyError):
        REPLICA_HEALTHY.remove(url)


def show_live(policy: str) -> None:
    """Let `ratchet_live` name exactly this policy."""
    LIVE.clear()
    LIVE.labels(policy).set(1)
