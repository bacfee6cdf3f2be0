"""The PPO benchmark's tables and goals. A round's figures of the two contestants belong together: ratios are taken within it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from tests.benchmarks.gateway_report import Goal, show, table
from tests.benchmarks.gateway_samples import Spread
from tests.benchmarks.ppo_model import Floor
from tests.benchmarks.ppo_visit import Figures, Job
from trainer.passes.layers import count_adapted

FASTER, SMALLER = 3.0, 0.5
"""Goals: samples a second at least this many times TRL's; peak memory at most this share of TRL's."""

DIFFERENCES = """### What each does for a sample

Both: sample the reply, log-probabilities of policy and reference, scores, values, {epochs} passes of updates in minibatches with
AdamW, the same adapter on the same base. Every reply has its full length: the model cannot end one.

- *Reward.* TRL's reward model is a sequence classifier, a copy of the base with a scalar head on the last token's last hidden state:
  a pass of its own. Ratchet's are 64 linear heads (an ensemble and the judge) on the reply's mean last hidden state
  and surprise, of the pass that the reference makes anyway. Both score on last hidden states of the same size.
- *Value.* TRL trains a second copy of the base, forward and backward in every update. Ratchet's is linear in the reference's
  states, fit by least squares once an iteration.
- *Layers below the adapter.* Both leave them out of passes backward. Ratchet computes them once, for reference and policy, and TRL
  in every pass forward.
- *Old log-probabilities.* Both keep those of the sampler. Ratchet reads one microbatch again, and all of them where that shows
  more than rounding.
- *Padding.* TRL pads every prompt of a batch to the longest one; Ratchet sorts by length.
- *Measuring.* Ratchet alone looks for repetition in the replies and asks the judge; TRL alone measures entropy in every update.

The floor counts what is left when all of that is gone: sampling, one pass of the reference, and {epochs} passes of
updates through the layers that are adapted, forward and backward to their inputs, at the rate of one large matrix product. It has
no adapter, no head, no memory to move."""


@dataclass(slots=True)
class Contest:
    """All rounds with one model."""

    name: str
    parameters: int
    job: Job
    num_layers: int
    floor: Floor
    ours: list[Figures] = field(default_factory=list)
    theirs: list[Figures] = field(default_factory=list)
    matrix_rates: list[dict[str, float]] = field(default_factory=list)
    """Operations a second by data type, once a round."""

    def speed(self, figures: Figures) -> float:
        """Samples a second."""
        return self.job.samples / median(figures.seconds)

    def cpu(self, figures: Figures) -> float:
        """CPU seconds a sample."""
        return median(figures.cpu_seconds) / self.job.samples

    def bounds(self) -> list[float]:
        """Samples a second that the floor allows, by round."""
        return [max(rates.values()) / self.floor.total for rates in self.matrix_rates]

    def ratio(self, measure: Callable[[Figures], float]) -> Spread:
        """Ours over theirs."""
        return Spread.of([measure(a) / measure(b) for a, b in zip(self.ours, self.theirs, strict=True)])


def above_idle(figures: Figures) -> float:
    """MiB on top of libraries and base model."""
    return figures.peak_mib - figures.idle_mib


def peak(figures: Figures) -> float:
    """MiB of the whole process."""
    return figures.peak_mib


def contest_report(contest: Contest) -> str:
    """One table: a row a contestant, their ratio, and the floor."""
    job = contest.job
    prompt = sum(map(len, job.prompts)) / len(job.prompts)
    head = [
        "",
        "samples/s",
        "share of the floor",
        "CPU s a sample",
        "peak MiB",
        "of it above idle",
        "trained",
        "in",
    ]
    rows = [_row("Ratchet", contest, contest.ours), _row("TRL 1.12.0", contest, contest.theirs)]
    ratios = [contest.speed, None, contest.cpu, peak, above_idle]
    rows.append(["Ratchet / TRL", *(show(contest.ratio(each), 2) if each else "" for each in ratios), "", ""])
    rates = {name: median(each[name] for each in contest.matrix_rates) for name in contest.matrix_rates[0]}
    rows.append(
        [
            "floor",
            show(Spread.of(contest.bounds()), 1),
            "1",
            "",
            "",
            "",
            "",
            max(rates, key=rates.__getitem__),
        ]
    )
    measured = ", ".join(f"{rate / 1e9:.0f} G/s in {name}" for name, rate in rates.items())
    parts = {
        "sampling": contest.floor.sampling,
        "reading": contest.floor.reading,
        "updates": contest.floor.updates,
    }
    counted = ", ".join(f"{name} {operations / 1e9:.2f}" for name, operations in parts.items())
    return "\n".join(
        [
            f"### {contest.name} parameters ({contest.parameters:,})",
            "",
            f"{job.samples} samples an iteration in minibatches of {job.minibatch}, prompts of {prompt:.0f} tokens on average, "
            f"replies of {job.reply_tokens}, {job.epochs} epochs, adapter of rank {job.rank} on the "
            f"last {count_adapted(contest.num_layers, job.layers)} of {contest.num_layers} layers. "
            f"Median of {len(contest.ours)} rounds [least, most].",
            "",
            table(head, rows),
            "",
            f"Floor: {contest.floor.total / 1e9:.2f} G operations a sample ({counted}); matrix products reach {measured}.",
        ]
    )


def _row(name: str, contest: Contest, all_figures: list[Figures]) -> list[str]:
    def spread(measure: Callable[[Figures], float], digits: int) -> str:
        return show(Spread.of([measure(figures) for figures in all_figures]), digits)

    shares = [
        contest.speed(figures) / bound for figures, bound in zip(all_figures, contest.bounds(), strict=True)
    ]
    return [
        name,
        spread(contest.speed, 1),
        show(Spread.of(shares), 3),
        spread(contest.cpu, 3),
        spread(peak, 0),
        spread(above_idle, 0),
        f"{all_figures[0].trained:,}",
        all_figures[0].dtype,
    ]


def contest_goals(contest: Contest) -> list[Goal]:
    """Speed, and memory both ways: of the process, and less what any process with the model has."""
    speed = contest.ratio(contest.speed)
    goals = [
        Goal(
            f"samples/s over TRL's, {contest.name}", f">= {FASTER:g}", show(speed, 2), speed.median >= FASTER
        )
    ]
    for what, measure in (("of the process", peak), ("above idle", above_idle)):
        ratio = contest.ratio(measure)
        name = f"peak memory over TRL's, {what}, {contest.name}"
        goals.append(Goal(name, f"<= {SMALLER:g}", show(ratio, 2), ratio.median <= SMALLER))
    return goals
