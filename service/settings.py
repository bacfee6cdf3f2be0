"""Every setting of Ratchet, in one place. Read from the environment (`RATCHET_...`, `DATABASE_URL`), or from files with secrets.

Used by the service, the trainer, migrations and the command line; nobody else reads the environment.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import SettingsError

SECRETS = Path("/run/secrets")
"""Where containers are given secrets: a file named as a setting (`database_url`, `ratchet_key`) is its value."""
ALIASES = ("DATABASE_URL", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Settings whose names others have given."""
Tuning = Literal["lora", "full"]


class Settings(BaseSettings):
    """Frozen. A name that starts with `RATCHET_` and is no field here is refused, so that typos are seen."""

    model_config = SettingsConfigDict(
        env_prefix="RATCHET_", frozen=True, extra="forbid", populate_by_name=True
    )

    # --- where things are
    state: Path = Path("state")
    """Folder of all state: database, starter, policies, cycles, logs. The next start goes on with it."""
    host: str = "127.0.0.1"
    """Address that the service listens on."""
    port: int = Field(8000, ge=1, le=65535)
    """Port that the service listens on."""
    database_url: SecretStr | None = Field(None, validation_alias="DATABASE_URL")
    """`postgresql://user:password@host:port/name`. Unset: PostgreSQL is embedded in the state folder."""
    database_port: int = Field(8432, ge=1, le=65535)
    """Port of the embedded PostgreSQL, on loopback. Unused where `DATABASE_URL` is set."""

    # --- what is told of it
    log_format: Literal["text", "json"] = "text"
    """`text` for people, or `json`: one object a line, and a line for each request. Neither holds a message."""
    otlp_endpoint: str | None = Field(None, validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT")
    """Collector that takes traces by OTLP over HTTP, like `http://collector:4318`; unset: none are made."""

    # --- the engine
    model: str = "starter"
    """`starter` (made on this machine), or a Hugging Face id or folder: a causal LM with a chat template."""
    engine_urls: tuple[str, ...] = ()
    """Addresses of vLLM replicas, a JSON list. Empty: `make up` starts one on `RATCHET_ENGINE_PORT`."""
    engine_port: int = Field(8001, ge=1, le=65535)
    """Port of the engine that `make up` or `ratchet engine` starts."""
    engine_host: str = "127.0.0.1"
    """Address that `ratchet engine` listens on. It has no access control: only ever one that the service alone can reach."""
    delivery: Literal["adapter", "merged"] = "adapter"
    """`adapter`: engines hold several policies at once. `merged`: one at a time, as a whole model, for more throughput, and for models
    that take no adapters; a trial then needs a second replica, and one service process answers at a time."""
    engine_max_adapters: int = Field(4, ge=3)
    """Adapters that an engine holds at once (live, previous, challenger, and one being loaded); `RATCHET_ROLLOUTS=fleet` adds one."""
    max_lora_rank: int = Field(32, ge=8)
    """Largest adapter rank that the engine takes; `RATCHET_LORA_RANK` must not exceed it."""
    max_model_tokens: int = Field(0, ge=0)
    """Context length of the engine in tokens; 0 takes the model's own."""

    # --- chat
    default_max_tokens: int = Field(512, ge=1)
    """Longest reply in tokens where a request names none; cut to what is left of the context."""
    default_min_p: float = Field(0.02, ge=0, lt=1)
    """Where a request names no `top_p`, tokens less likely than this share of the likeliest one are never drawn."""
    request_deadline_seconds: float = Field(120.0, gt=0)
    """A generation that takes longer, its wait in the queue included, is aborted."""
    call_deadline_seconds: float = Field(30.0, gt=0)
    """Any other call that takes longer is ended (exports and imports may take their time)."""
    shutdown_seconds: float = Field(30.0, gt=0)
    """How long replies under way may take to end when the service is asked to stop."""
    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    """Fields of a chat request that are not taken: `ignore` names them in header `x-ratchet-ignored`; `refuse`."""

    # --- comparisons and votes
    comparison_rate: float = Field(0.25, ge=0, le=1)
    """Share of `comparison: auto` requests that are shown two replies."""
    comparisons_per_hour: int = Field(30, ge=0)
    """Comparisons that one user is shown in an hour by `comparison: auto`; past it, only the evaluation slice."""
    evaluation_rate: float = Field(0.02, ge=0, le=1)
    """Share of `comparison: auto` requests that are shown two whatever the cap says, as a uniform sample."""
    comparison_temperature: float = Field(1.0, gt=0)
    """Sampling temperature where a request names none."""
    vote_revision_seconds: float = Field(86400.0, ge=0)
    """How long after it was given a vote or a ranking may be changed or taken back."""

    # --- duels
    duel_votes: int = Field(400, ge=0)
    """Votes after which a duel ends undecided; 0: no duels, what passes the gate and its probe goes live at once."""
    duel_hours: float = Field(168.0, gt=0)
    """Hours after which a duel ends undecided."""
    duel_share: float = Field(0.8, gt=0, le=1)
    """Share of comparisons that are between challenger and live while a challenger is on trial."""
    watch_share: float = Field(0.1, ge=0, le=1)
    """Share of comparisons that are between live and the policy before it, after a promotion; 0: none."""
    duel_votes_per_user: int = Field(0, ge=0)
    """Votes of one user that count in a duel: the first ones. 0: one where 50 users or more voted within 30 days, else all of them."""
    duel_error: float = Field(0.05, gt=0, lt=0.5)
    """Probability with which a policy that is no better is promoted, or one that is no worse rolled back, however often one looks."""

    # --- who may ask, and how much
    require_keys: bool = False
    """Refuse calls without a key on loopback too. Elsewhere (`RATCHET_HOST`) a key is always needed."""
    key: SecretStr | None = None
    """The key that the command line sends, where one is needed."""
    requests_per_minute: int = Field(600, ge=1)
    """Calls that one key may make in a minute."""
    address_requests_per_minute: int = Field(1200, ge=1)
    """Calls that one address may make in a minute; this machine's own are not counted."""
    max_running: int = Field(128, ge=9)
    """Replies generated at once, in all."""
    max_running_per_user: int = Field(64, ge=9)
    """Replies generated at once for one user."""
    max_queued: int = Field(256, ge=0)
    """Requests that wait for their turn; more are turned away."""
    max_import_bytes: int = Field(1 << 30, ge=1)
    """Largest file that an operator can import."""

    # --- learning
    cycle_votes: int = Field(100, ge=1)
    """New votes that start a cycle."""
    cycle_hours: float = Field(24.0, gt=0)
    """Hours after which a cycle starts with fewer votes (at least `RATCHET_CYCLE_MIN_VOTES` new ones)."""
    cycle_min_votes: int = Field(20, ge=2)
    """New votes below which no cycle starts by the clock."""
    votes_per_user: int = Field(100, ge=1)
    """Votes of one user that count in full; of a user with more, each counts less, and all together as these."""
    prompts_per_vote: int = Field(3, ge=0)
    """Prompts without a vote that PPO trains on besides: of each user the newest, at most so many for each vote of theirs, and no more
    than make 2,048 with those that were voted on; 0: none."""
    reward_length_bias: bool = True
    """Whether the reward may grow with a reply's length; `false` takes out what the score owes to it."""
    tick_seconds: float = Field(5.0, gt=0)
    """How often the trainer looks for a reason to start a cycle."""
    seed: int = 0
    """Seed of the starter and of every cycle (a cycle adds its number)."""
    threads: int = Field(0, ge=0)
    """CPU threads of the trainer; 0 takes all cores but one, which is left to the users' replies."""
    guard: Path | None = None
    """File of the guard set (JSON lines, see `trainer/guard.py`); unset: `guard.jsonl` in the model's folder, if any."""
    method: Literal["ppo", "dpo", "orpo"] = "ppo"
    """How a policy is learnt: `ppo` against the reward model, or from the votes directly by TRL's `dpo` or `orpo`."""
    rollouts: Literal["local", "fleet"] = "local"
    """Who samples PPO's replies. `local`: the trainer, and the same seed gives the same policy. `fleet`: the engines, where users go
    first; what no engine answers the trainer samples."""
    max_reply_tokens: int = Field(64, ge=1)
    """Longest reply in tokens that the trainer samples."""
    ppo_iterations: int = Field(30, ge=1)
    """Most PPO iterations in a cycle; it stops before where the judge objects."""
    ppo_rollouts: int = Field(256, ge=8)
    """Replies sampled in an iteration."""
    kl_budget: float = Field(5.0, gt=0)
    """KL to the anchor that training steers to, in nats per reply."""
    tuning: Tuning = "lora"
    """What PPO trains: `lora`, an adapter over the base, or `full`, all weights, which needs `RATCHET_DELIVERY=merged`."""
    lora_rank: int = Field(16, ge=1)
    """Rank of a policy's adapter."""
    lora_layers: float = Field(1.0, gt=0, le=1)
    """Share of the base's layers, the last ones, that a new policy's adapter is on. What is below is computed once for policy,
    reference and all passes of PPO: with three of six an update takes .43 of the time. A policy that goes on from another keeps its
    layers."""

    @field_validator("rollouts")
    @classmethod
    def _adapters_for_rollouts(cls, rollouts: str, info: ValidationInfo) -> str:
        if rollouts == "fleet" and info.data.get("delivery") == "merged":
            raise PydanticCustomError(
                "no_adapters",
                "`fleet` needs adapters, which RATCHET_DELIVERY=merged gives engines none of: set `local`, or deliver by `adapter`",
            )
        return rollouts

    @field_validator("tuning")
    @classmethod
    def _can_be_whole(cls, tuning: Tuning, others: ValidationInfo) -> Tuning:
        method = others.data.get("method")
        if tuning == "full" and others.data.get("delivery") != "merged":
            raise PydanticCustomError(
                "delivery",
                "full makes policies that are whole models: set RATCHET_DELIVERY=merged too, or lora here",
            )
        if tuning == "full" and method in ("dpo", "orpo"):
            raise PydanticCustomError(
                "method",
                "full is for RATCHET_METHOD=ppo, and {method} trains adapters alone: set ppo, or lora here",
                {"method": method},
            )
        return tuning

    @property
    def replica_urls(self) -> tuple[str, ...]:
        """The replicas to begin with: those that are named, else the one that `ratchet up` starts."""
        urls = self.engine_urls or (f"http://127.0.0.1:{self.engine_port}",)
        return tuple(url.rstrip("/") for url in urls)


@lru_cache
def get_settings() -> Settings:
    """The settings of this process. Raises SettingsError naming the variable that is wrong."""
    known = {
        f"RATCHET_{name}".upper()
        for name, field in Settings.model_fields.items()
        if not field.validation_alias
    }
    unknown = sorted(name for name in os.environ if name.startswith("RATCHET_") and name not in known)
    if unknown:
        raise SettingsError(f"{unknown[0]} is not a setting of Ratchet. The README lists them all.")
    try:
        return Settings(_secrets_dir=SECRETS if SECRETS.is_dir() else None)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).upper()
        name = name if name in ALIASES else f"RATCHET_{name}"
        raise SettingsError(f"{name}: {first['msg']}") from None
