"""`python -m service.guardian STATE`: outlives `ratchet up` by a moment, to end the parts where that was killed.

Its standard input is a pipe that only `ratchet up` holds open. When that closes, for whatever reason, all that
`run.json` still names is ended; after a clean stop it names nothing. (The kernel's parent-death signal would not
do: vLLM ignores a request to end while it loads, and its child processes do not notice that their parent is gone.)
"""

import signal
import sys
from pathlib import Path

from service.processes import end_leftovers


def main() -> None:
    """Wait for the end of the pipe; signals meant for `ratchet up` do not concern us."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_leftovers(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
