"""Files to import that are nearly right: exports with some of their values or bytes replaced. For `fuzzing.py`."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

MOST_ROWS = 3
MOST_CHANGES = 3
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["\0", "\ud800", "first", "user", "2026-01-01T00:00:00Z", "9999-12-31T23:59:59+14:00", 1 << 63]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def spoilt_files(exports: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Mostly what was exported, with a few changes; now and then just bytes."""
    jsonl = [content for content in exports if not content.startswith(b"PAR1")]
    parquet = [content for content in exports if content.startswith(b"PAR1")]
    return _spoilt_jsonl(jsonl) | _spoilt_parquet(parquet) | st.binary(max_size=100)


@st.composite
def _spoilt_jsonl(draw: st.DrawFn, exports: list[bytes]) -> bytes:
    lines = draw(st.sampled_from(exports)).splitlines()
    rows = [
        json.loads(line) for line in draw(st.lists(st.sampled_from(lines), min_size=1, max_size=MOST_ROWS))
    ]
    for _ in range(draw(st.integers(0, MOST_CHANGES))):
        _change(draw, draw(st.sampled_from(rows)))
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _change(draw: st.DrawFn, value: Any) -> None:
    """Replace, remove or add something somewhere in an object or list."""
    names = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not names:
        return
    name = draw(st.sampled_from(names))
    if isinstance(value[name], dict | list) and value[name] and draw(st.integers(0, 3)):
        _change(draw, value[name])
    elif draw(st.integers(0, 4)) == 0:
        del value[name]
    else:
        value[name] = draw(VALUES)


@st.composite
def _spoilt_parquet(draw: st.DrawFn, exports: list[bytes]) -> bytes:
    content = bytearray(draw(st.sampled_from(exports)))
    for _ in range(draw(st.integers(0, MOST_CHANGES))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)) | st.just(len(content)))])
