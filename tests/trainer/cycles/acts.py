"""What users, operators and the service do in the tests of cycles."""

import threading
import time

from rich.console import Console
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.policies import BASE
from service.settings import Settings
from service.tables import (
    Comparison,
    ComparisonReply,
    Cycle,
    Demonstration,
    Deployment,
    Duel,
    Policy,
    Prompt,
    Reply,
    User,
    Vote,
)
from trainer import cycle

QUIET = Console(quiet=True)


def add_votes(sessions: sessionmaker[Session], count: int, choice: str | None = None) -> None:
    """Votes by one user who likes "yes" and dislikes "no", shown in either order."""
    with sessions.begin() as session:
        user = session.scalar(select(User)) or User(name="ann")
        session.add(user)
        session.flush()
        for _ in range(count):
            prompt = Prompt(user_id=user.id, messages=[{"role": "user", "content": "Is it so?"}])
            session.add(prompt)
            session.flush()
            number = prompt.id
            prompt.messages = [{"role": "user", "content": f"Is it so, {number}?"}]
            session.add(
                Comparison(
                    id=f"cmp-{number}", prompt_id=number, user_id=user.id, reason="always", propensity=1.0
                )
            )
            texts = ["yes yes", "no"] if number % 2 else ["no", "yes yes"]
            for position, text in enumerate(texts):
                reply_id = f"chatcmpl-{number}-{position}"
                session.add(
                    Reply(
                        id=reply_id,
                        prompt_id=number,
                        policy=BASE,
                        sampling={},
                        content=text,
                        finish_reason="stop",
                    )
                )
                session.flush()
                session.add(
                    ComparisonReply(comparison_id=f"cmp-{number}", position=position, reply_id=reply_id)
                )
            vote = choice or ("first" if number % 2 else "second")
            session.add(Vote(comparison_id=f"cmp-{number}", user_id=user.id, choice=vote, tags=[]))


def add_prompts(
    sessions: sessionmaker[Session], name: str, count: int, finish_reason: str | None = "stop"
) -> list[str]:
    """Asked by that user (with what Unicode, and not JSON, ends lines with), answered, and not judged. Returns the ids."""
    with sessions.begin() as session:
        user = session.scalar(select(User).where(User.name == name)) or User(name=name)
        session.add(user)
        session.flush()
        prompts = [
            Prompt(user_id=user.id, messages=[{"role": "user", "content": f"Why,\u2028{number}?"}])
            for number in range(count)
        ]
        session.add_all(prompts)
        session.flush()
        for prompt in prompts:
            session.add(
                Reply(
                    id=f"chatcmpl-{prompt.id}",
                    prompt_id=prompt.id,
                    policy=BASE,
                    sampling={},
                    content="no",
                    finish_reason=finish_reason,
                )
            )
        return [str(prompt.id) for prompt in prompts]


def add_demonstrations(sessions: sessionmaker[Session], count: int) -> None:
    with sessions.begin() as session:
        user = session.scalar(select(User)) or User(name="ann")
        session.add(user)
        session.flush()
        for number in range(count):
            prompt = Prompt(
                user_id=user.id, messages=[{"role": "user", "content": f"And is it {number % 8}?"}]
            )
            session.add(prompt)
            session.flush()
            session.add(
                Demonstration(
                    id=f"dem-{number}",
                    prompt_id=prompt.id,
                    user_id=user.id,
                    content=("lemon", "a lemon")[number // 8 % 2],
                    tags=[],
                )
            )


def request_cycle(sessions: sessionmaker[Session], method: str | None = None) -> int:
    with sessions.begin() as session:
        row = Cycle(trigger="operator", stage="requested", metrics={"method": method} if method else {})
        session.add(row)
        session.flush()
        return row.id


def run(settings: Settings, sessions: sessionmaker[Session], cycle_id: int) -> Cycle:
    cycle.run_cycle(settings, sessions, cycle_id, QUIET)
    with sessions() as session:
        return session.get_one(Cycle, cycle_id)


def accept_challengers(sessions: sessionmaker[Session]) -> threading.Thread:
    """Stands in for the service: verifies the next challenger and flips the pointer."""

    def watch() -> None:
        for _ in range(6000):
            time.sleep(0.1)
            with sessions.begin() as session:
                deployment = session.get_one(Deployment, 1)
                if deployment.challenger is not None:
                    session.get_one(Policy, deployment.challenger).state = "verified"
                    deployment.previous, deployment.live = deployment.live, deployment.challenger
                    deployment.challenger = None
                    return

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def try_challengers(sessions: sessionmaker[Session]) -> threading.Thread:
    """Stands in for the service: puts the next challenger on trial, which it loses."""

    def watch() -> None:
        name = None
        for _ in range(6000):
            time.sleep(0.1)
            with sessions.begin() as session:
                deployment = session.get_one(Deployment, 1)
                if name is None and deployment.challenger is not None:
                    name = deployment.challenger
                    session.get_one(Policy, name).state = "verified"
                    votes = {"wins": 3, "losses": 17}
                    session.add(
                        Duel(
                            kind="trial",
                            challenger=name,
                            incumbent=deployment.live,
                            votes_per_user=1,
                            metrics=votes,
                        )
                    )
                elif name is not None and session.get_one(Cycle, 1).stage == "duel":
                    policy = session.get_one(Policy, name)
                    policy.state, policy.reason = "rejected", "the votes prove it worse"
                    deployment.challenger = None
                    return

    thread = threading.Thread(target=watch)
    thread.start()
    return thread
