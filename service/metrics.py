"""Every metric of the service, for Prometheus at `/metrics`. Names begin with `ratchet_` and hold units.

Each process counts what it did itself. What the database knows better (the cycle, its numbers, the duel) is read from there when
Prometheus asks, by `learning_metrics.py`, so that every process tells the same. deploy/README.md lists them all.
"""

from contextlib import suppress

from prometheus_client import Counter, Gauge, Histogram

from service.tables import CHOICES, CYCLE_STAGES, DUEL_KINDS, Deployment

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)

# --- what is asked
REQUESTS = Counter("ratchet_requests", "Answered HTTP requests, by route and status.", ["route", "status"])
RUNNING = Gauge("ratchet_requests_running", "Chat requests that are being answered.")
QUEUED = Gauge("ratchet_requests_queued", "Chat requests that wait for their turn.")
REPLIES = Counter(
    "ratchet_replies", "Replies that ended, by policy and finish reason.", ["policy", "finish_reason"]
)
REPLY_TOKENS = Counter("ratchet_reply_tokens", "Tokens of ended replies, by policy.", ["policy"])
REPLY_SECONDS = Histogram(
    "ratchet_reply_seconds", "From request to the end of its last reply.", buckets=SECONDS
)
FIRST_TOKEN_SECONDS = Histogram(
    "ratchet_first_token_seconds", "From request to the first token, of answers that stream.", buckets=SECONDS
)
RETRIES = Counter(
    "ratchet_retries",
    "Requests whose replica failed with them before a token, and that go to another where there is one.",
)
ADDED_SECONDS = Histogram(
    "ratchet_added_seconds",
    "What the service adds to the engine: until the first token of a stream, or the whole of another answer. "
    "The wait in the queue counts.",
    buckets=SHORT_SECONDS,
)

# --- what people say
COMPARISONS = Counter("ratchet_comparisons", "Comparisons shown, by reason.", ["reason"])
VOTES = Counter(
    "ratchet_votes", "Votes, by choice and by whether they were given or revised.", ["choice", "change"]
)
VOTES_REFUSED = Counter(
    "ratchet_votes_refused", "Votes that were not taken, by the error's code.", ["reason"]
)

# --- policies and replicas
POLICY_INFO = Gauge(
    "ratchet_policy_info",
    "1 for each policy in use, by its role: live, challenger, previous.",
    ["policy", "role"],
)
MIXED_POLICY = Counter("ratchet_mixed_policy", "Engine chunks of another policy than asked for. Must stay 0.")
SWAPS = Counter("ratchet_swaps", "Challengers decided on, by result: promoted or refused.", ["result"])
ROLLBACKS = Counter("ratchet_rollbacks", "Times that live and previous were exchanged.")
LOAD_SECONDS = Histogram(
    "ratchet_policy_load_seconds", "To load and verify a policy on a replica.", buckets=SECONDS
)
PROBE_GAP = Gauge("ratchet_probe_gap_nats", "Engine against manifest, mean absolute, per token.", ["policy"])
REPLICA_HEALTHY = Gauge("ratchet_replica_healthy", "1 where a replica generates tokens.", ["replica"])
RECONCILE_ERRORS = Counter("ratchet_reconcile_errors", "Rounds of the reconciler that failed.")

# --- duels and cycles
DUELS = Counter(
    "ratchet_duels", "Duels that ended, by kind and outcome for the challenger.", ["kind", "outcome"]
)
DUEL_RUNNING = Gauge("ratchet_duel_running", "1 while a duel of this kind runs.", ["kind"])
DUEL_VOTES = Gauge(
    "ratchet_duel_votes",
    "Votes of the last duel of a kind, by result for the challenger.",
    ["kind", "result"],
)
DUEL_EVIDENCE = Gauge(
    "ratchet_duel_evidence",
    "What a stake of 1 on the challenger being better, or worse, has become in the last duel of a kind.",
    ["kind", "that"],
)
CYCLE_STAGE = Gauge("ratchet_cycle_stage", "1 for the stage of the newest cycle, ended or not.", ["stage"])
CYCLE_SECONDS = Gauge("ratchet_cycle_seconds", "How long the newest cycle took, or has been running.")
REWARD_MODEL_ACCURACY = Gauge(
    "ratchet_reward_model_accuracy",
    "Share of held-out votes that the newest cycle's reward model orders as the voter did.",
)
KL = Gauge("ratchet_kl_nats", "KL of the newest cycle's policy to the anchor, per reply, as last measured.")
JUDGE = Gauge(
    "ratchet_judge_score", "The newest cycle's policy by the judge, in standard deviations; the anchor is 0."
)
DATABASE_UP = Gauge("ratchet_database_up", "1 where the database answered when Prometheus last asked.")

# A counter that appears with its first event seems not to have risen: these are there from the start.
for choice in CHOICES:
    for change in ("given", "revised"):
        VOTES.labels(choice, change)
for result in ("promoted", "refused"):
    SWAPS.labels(result)
for kind in DUEL_KINDS:
    DUEL_RUNNING.labels(kind)


def show_stage(current: str) -> None:
    """Let `ratchet_cycle_stage` name exactly this stage."""
    for stage in CYCLE_STAGES:
        CYCLE_STAGE.labels(stage).set(stage == current)


def forget_replica(url: str) -> None:
    """Let `ratchet_replica_healthy` no longer name a replica that was removed."""
    with suppress(KeyError):
        REPLICA_HEALTHY.remove(url)


def show_policies(deployment: Deployment) -> None:
    """Let `ratchet_policy_info` name exactly the policies that the pointer names."""
    POLICY_INFO.clear()
    for role in ("live", "challenger", "previous"):
        policy = getattr(deployment, role)
        if policy is not None:
            POLICY_INFO.labels(policy, role).set(1)
