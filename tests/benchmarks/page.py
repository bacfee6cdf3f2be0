"""`make bench-page`: what the pages weigh, how soon they can be used, and how smoothly two answers stream, in a real browser.

The service, with its PostgreSQL, on loopback, and an engine that gives two long answers 50 tokens a second each, in step. The first
load is of a new browser context each time, so with an empty cache. While the answers stream the page asks for every frame, and keeps
how long each one took: a frame that comes late is one that was dropped.

Prints tables in Markdown; writes `results/page.json`.

    python -m tests.benchmarks.page [--seconds 60] [--loads 7]
"""

import argparse
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console

from service.pieces import Piece
from tests.benchmarks.durability_parts import fresh_settings, running
from tests.benchmarks.gateway_report import Goal, goals_report, table
from tests.benchmarks.tables import write_results
from tests.service.browsing import MEASURE, say, wait_for_end
from tests.service.conftest import address_of
from tests.service.conftest import running as serving
from tests.service.fake_engine import FakeEngine

TOKENS_A_SECOND = 50
"""Of each answer."""
PATHS = ("/", "/label", "/operator")
SIZES = {"desk": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 780}}
LATE_MS = 100
MOST_BYTES, MOST_MS = 300_000, 1000
MOST_SHIFT = 0.01
WORDS = [
    "a",
    "lemon",
    "is",
    "*yellow*",
    "and",
    "**sour**",
    "as",
    "everyone",
    "`knows`",
    "who",
    "has",
    "ever",
    "bitten",
    "into",
    "one",
]
FRAMES = """
window.frames = [];
window.lastFrame = performance.now();
function frame(now) { window.frames.push(now - window.lastFrame); window.lastFrame = now; requestAnimationFrame(frame); }
requestAnimationFrame((now) => { window.lastFrame = now; requestAnimationFrame(frame); });
"""
LOAD = """() => {
  const [page] = performance.getEntriesByType("navigation");
  const loaded = [page, ...performance.getEntriesByType("resource")];
  const [paint] = performance.getEntriesByName("first-contentful-paint");
  return { bytes: loaded.reduce((sum, entry) => sum + entry.transferSize, 0), requests: loaded.length,
           paint_ms: paint.startTime, interactive_ms: page.domContentLoadedEventEnd };
}"""
ERR = Console(stderr=True)


class InStep(FakeEngine):
    """Gives the words of all its replies in turn."""

    def _plan(self, replies: Sequence[str], model: str, count: int) -> list[Piece]:
        plan = super()._plan(replies, model, count)
        return sorted(plan, key=lambda piece: (piece.completion_tokens, piece.reply))


@dataclass(frozen=True, slots=True)
class Load:
    """The first load of one page: medians."""

    path: str
    bytes: int
    """Over the wire, headers included."""
    requests: int
    paint_ms: float
    """First contentful paint."""
    interactive_ms: float
    """All scripts have run; of the loads, the slowest."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Two answers on one size of screen. Times in milliseconds."""

    size: str
    seconds: float
    characters: int
    """Of both answers, as shown."""
    frames: int
    median_ms: float
    p99_ms: float
    longest_ms: float
    late: int
    """Frames after more than `LATE_MS`."""
    shift: float
    """Layout shift, all of it."""


def main() -> None:
    """Run it all."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="ratchet-page-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL may run as somebody else
        settings = fresh_settings(folder / "state", folder / "no-model")
        engine = InStep(
            replies=(_prose(options.seconds, 0), _prose(options.seconds, 1)),
            pause_seconds=1 / (2 * TOKENS_A_SECOND),
        )
        with (
            running(settings, []),
            serving(settings, lambda _: lambda url: engine) as server,
            sync_playwright() as playwright,
        ):
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
                args=["--no-sandbox"],
            )
            url = address_of(server)
            loads = [_load(browser, url, path, options.loads) for path in PATHS]
            streams = [_stream(browser, url, size) for size in SIZES]
            version = browser.version
            browser.close()
    print(_report(loads, streams, version))
    print()
    print(goals_report(_goals(loads, streams)))
    write_results(
        "page",
        {
            "browser": version,
            "options": vars(options),
            "loads": [asdict(each) for each in loads],
            "streams": [asdict(each) for each in streams],
        },
    )


def _prose(seconds: float, seed: int) -> str:
    """As many words as are said in this time, with Markdown in them."""
    chance = random.Random(seed)
    words = [chance.choice(WORDS) for _ in range(round(seconds * TOKENS_A_SECOND))]
    for number in range(40, len(words), 40):
        words[number] = chance.choice(["\n\n", "\n\n- ", "\n\n## "]) + words[number]
    return " ".join(words)


def _load(browser: Browser, url: str, path: str, times: int) -> Load:
    """The first one of all, which is the server's first too, is not counted."""
    ERR.print(f"loading {path}")
    found = [_load_once(browser, url + path) for _ in range(times + 1)][1:]
    return Load(
        path,
        bytes=int(median(each["bytes"] for each in found)),
        requests=int(median(each["requests"] for each in found)),
        paint_ms=median(each["paint_ms"] for each in found),
        interactive_ms=max(each["interactive_ms"] for each in found),
    )


def _load_once(browser: Browser, url: str) -> dict[str, float]:
    context = browser.new_context()
    page = context.new_page()
    page.goto(url, wait_until="networkidle")
    found: dict[str, float] = page.evaluate(LOAD)
    context.close()
    return found


def _stream(browser: Browser, url: str, size: str) -> Stream:
    ERR.print(f"two answers, {size}")
    context = browser.new_context(viewport=SIZES[size], has_touch=size == "phone")
    page = context.new_page()
    page.add_init_script(MEASURE)
    page.goto(url, wait_until="networkidle")
    say(page, "hello", two=True)
    page.locator(".answer .body", has_text="a").first.wait_for()
    began = page.evaluate("performance.now()")
    page.evaluate(FRAMES)
    page.set_default_timeout(600_000)
    page.locator("body:not(.running)").wait_for(state="attached")
    seconds = (page.evaluate("performance.now()") - began) / 1000
    frames = sorted(page.evaluate("window.frames"))
    wait_for_end(page)
    stream = Stream(
        size,
        seconds=seconds,
        characters=_characters(page),
        frames=len(frames),
        median_ms=median(frames),
        p99_ms=frames[int(0.99 * (len(frames) - 1))],
        longest_ms=frames[-1],
        late=sum(each > LATE_MS for each in frames),
        shift=sum(value for value, _ in page.evaluate("window.shifts")),
    )
    context.close()
    return stream


def _characters(page: Page) -> int:
    return sum(map(len, page.locator(".answer .body").all_text_contents()))


def _report(loads: list[Load], streams: list[Stream], version: str) -> str:
    loaded = [
        [
            each.path,
            f"{each.bytes / 1000:.0f} kB",
            str(each.requests),
            f"{each.paint_ms:.0f}",
            f"{each.interactive_ms:.0f}",
        ]
        for each in loads
    ]
    streamed = [
        [
            each.size,
            f"{each.seconds:.0f}",
            f"{each.characters:,}",
            f"{each.frames:,}",
            f"{each.median_ms:.1f}",
            f"{each.p99_ms:.1f}",
            f"{each.longest_ms:.0f}",
            str(each.late),
            f"{each.shift:.4f}",
        ]
        for each in streams
    ]
    return "\n\n".join(
        [
            f"### First load, empty cache (Chromium {version})",
            table(
                ["page", "over the wire", "requests", "first paint, ms", "interactive, ms, slowest"], loaded
            ),
            f"### Two answers at once, {TOKENS_A_SECOND} tokens/s each",
            table(
                [
                    "screen",
                    "s",
                    "characters",
                    "frames",
                    "median ms",
                    "p99 ms",
                    "longest ms",
                    f"over {LATE_MS} ms",
                    "layout shift",
                ],
                streamed,
            ),
        ]
    )


def _goals(loads: list[Load], streams: list[Stream]) -> list[Goal]:
    light = [each for each in loads if each.path != "/operator"]  # that one has charts
    return [
        *(
            Goal(
                f"{each.path}: first load", "< 300 kB", f"{each.bytes / 1000:.0f} kB", each.bytes < MOST_BYTES
            )
            for each in light
        ),
        *(
            Goal(
                f"{each.path}: interactive",
                "< 1 s",
                f"{each.interactive_ms:.0f} ms",
                each.interactive_ms < MOST_MS,
            )
            for each in light
        ),
        *(
            Goal(f"{each.size}: frames over {LATE_MS} ms", "0", str(each.late), each.late == 0)
            for each in streams
        ),
        *(
            Goal(f"{each.size}: layout shift", "0", f"{each.shift:.4f}", each.shift < MOST_SHIFT)
            for each in streams
        ),
    ]


def _options() -> Any:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.page")
    parser.add_argument("--seconds", type=float, default=60, help="that the answers stream")
    parser.add_argument("--loads", type=int, default=7, help="of each page")
    return parser.parse_args()


if __name__ == "__main__":
    main()
