"""Serves TensorZero's gateway: `python gateway_tensorzero.py CONFIG`, in the peers' environment. Prints its address.

The wheel `tensorzero` carries the whole gateway and serves it over HTTP, on a port of its own choice, for its own patched
OpenAI client; there is no package of the stand-alone binary. It is Rust either way: Python only starts it and waits.
"""

import signal
import sys

import tensorzero  # type: ignore[import-not-found]

if __name__ == "__main__":
    gateway = tensorzero._start_http_gateway(
        config_file=sys.argv[1], clickhouse_url=None, postgres_url=None, valkey_url=None, async_setup=False
    )
    print(gateway.base_url, flush=True)
    signal.pause()
