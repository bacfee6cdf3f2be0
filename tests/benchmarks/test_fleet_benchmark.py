"""The fleet benchmark's own arithmetic: how a reply ended, as its client saw it."""

import json

import pytest

from tests.benchmarks.fleet_report import end_of
from tests.benchmarks.swap_clients import Exchange
from tests.benchmarks.swap_replies import read
from tests.benchmarks.test_swap_benchmark import event

ERROR = b"data: " + json.dumps({"error": {"message": "The engine went away."}}).encode() + b"\n\n"
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("stream", "fault", "end"),
    [
        (event((7, -1.0)) + event((8, -1.0), finish_reason="stop") + DONE, "", "whole"),
        (event((7, -1.0)) + ERROR, "", "error event"),
        (event((7, -1.0)), "", "cut silently"),
        (event((7, -1.0)), "ClientPayloadError: cut", "cut silently"),
        (event() + ERROR, "", "failed before its first token"),
        (b"", "503: no engine", "failed before its first token"),
        (event(), "", "failed before its first token"),
    ],
)
def test_how_a_reply_ended(stream: bytes, fault: str, end: str) -> None:
    received = [(1.0, stream)] if stream else []
    assert end_of(read(Exchange("hi", 0.0, received, ended=2.0, fault=fault))) == end
