#!/bin/sh
# Makes or refreshes a virtual environment, from the clone's root: `deploy/setup.sh cpu|gpu|test|peers|trl`.
# `test` makes `peers` beside it: the clients and gateways that tests try, in an environment of their own. `trl` is the PPO that ours
# is measured beside.
#
# What is installed is exactly what the lock file in requirements/ names, by hash. torch on the CPU is a step of its
# own: its CPU builds lie on an index of their own, and where that cannot be reached any index or folder that
# pip is told of will do. A stamp named after the lock lets the next start skip all this.
set -eu

kind=$1
venv=.venv
lock=requirements/$kind.txt
inputs="$lock deploy/setup.sh pyproject.toml"
node=tests/clients/node
torch=2.13.0
case $kind in
gpu) venv=.venv-gpu ;;
peers) venv=.venv-peers inputs="$lock deploy/setup.sh $node/package-lock.json" ;;
trl) venv=.venv-trl inputs="$lock deploy/setup.sh" ;;
esac
log=$venv/setup.log

key=$(cat $inputs | { cat; pwd; } | sha256sum | cut -c1-16)
stamp=$venv/.installed-$kind-$key
children=
quiet=${quiet:-}

# What runs in the background hears no Ctrl-C of its own.
trap 'kill $children 2>/dev/null; exit 130' INT TERM

fail() {
    echo "$1" >&2
    [ -z "$children" ] || kill $children 2>/dev/null || true
    exit 1
}

# The first Python that vLLM has wheels for.
find_python() {
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    fail "Ratchet needs Python 3.11 to 3.14 as python3; this machine has $(python3 --version 2>&1 || echo none)."
}

# step TITLE COMMAND...: one line with its time, and while pip works on a terminal, a bar of packages.
step() {
    title=$1
    shift
    began=$(date +%s)
    echo "== $title" >>"$log"
    "$@" >>"$log" 2>&1 &
    child=$!
    children="$children $child"
    while [ -t 1 ] && [ -z "$quiet" ] && kill -0 "$child" 2>/dev/null; do
        show_progress
        sleep 1
    done
    if ! wait "$child"; then
        printf '\r\033[K' >&2
        tail -n 15 "$log" >&2
        fail "$title: failed. All of it is in $log."
    fi
    [ -t 1 ] && [ -z "$quiet" ] && printf '\r\033[K'
    printf '  %-36s %4d s\n' "$title" $(($(date +%s) - began))
}

show_progress() {
    total=$(grep -c '==' "$lock")
    seen=$(sed -n "/^== $title/,\$p" "$log" | grep -c '^Collecting ' || true)
    filled=$((seen * 30 / total))
    printf '\r  %-36s %4d s  [%-30s] %d/%d ' "$title" $(($(date +%s) - began)) \
        "$(printf '%*s' "$filled" '' | tr ' ' '#')" "$seen" "$total"
}

# A browser for the tests: the machine's own, else Playwright's, else the distribution's where we may install it.
find_browser() {
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$name" >/dev/null && return
    done
    echo "  no Chromium on this machine: fetching one"
    "$venv/bin/playwright" install chromium >>"$log" 2>&1 && return
    install_package chromium ||
        fail "The tests need Chromium, and it cannot be fetched here: install chromium, then make test. See $log."
}

find_curl() {
    command -v curl >/dev/null || install_package curl ||
        fail "The tests need curl, and it cannot be fetched here: install curl, then make test. See $log."
}

# Docker Compose reads docker-compose.yml for the tests; it needs no daemon for that.
find_compose() {
    docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null ||
        install_package docker-compose --no-install-recommends ||
        fail "The tests need Docker Compose, and it cannot be fetched here: install it (docker-compose), then make test. See $log."
}

# promtool checks the alerts: the machine's own, else taken out of the distribution's package. Installing that would start a server.
find_promtool() {
    command -v promtool >/dev/null || [ -x "$venv/bin/promtool" ] || unpack_promtool >>"$log" 2>&1 ||
        fail "The tests need promtool, and it cannot be fetched here: install prometheus, then make test. See $log."
}

unpack_promtool() {
    folder=$(mktemp -d)
    [ "$(id -u)" != 0 ] || apt-get update
    (cd "$folder" && apt-get download prometheus && dpkg-deb -x prometheus_*.deb .) &&
        mv "$folder/usr/bin/promtool" "$venv/bin/promtool"
    status=$?
    rm -rf "$folder"
    return $status
}

# install_package NAME [OPTION]: from the distribution, where we may.
install_package() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null &&
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y "$@"; } >>"$log" 2>&1
}

make_venv() {
    python=$(find_python)
    if [ ! -x "$venv/bin/pip" ]; then
        rm -rf "$venv"
        "$python" -m venv "$venv" >/dev/null 2>&1 ||
            fail "$python -m venv does not work here; on Debian and Ubuntu: apt-get install python3-venv"
    fi
    echo "Setting up $venv from $lock (takes minutes the first time)"
    rm -f "$venv"/.installed-"$kind"-*
    : >"$log"
}

# What is not Python, such as a template, fails, which is as well. Left out is a quarter of it, that hardly anything imports:
# libraries' own tests, and the hundreds of models of transformers.
compile() {
    "$venv/bin/python" -m compileall -q -j 0 -x 'site-packages/.*/tests?/|/transformers/models/(?!auto|llama)' "$venv"/lib/python3*/site-packages || true
}

install_torch() {
    step "torch $torch, CPU build" $install --retries 1 \
        --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"
}

install_ratchet() {
    [ "$kind" = gpu ] || install_torch
    step "packages of $lock" $install -r "$lock"
    step "compiling them" compile
    step "ratchet" $install --no-build-isolation --editable .
}

install_peers() {
    step "packages of $lock" $install -r "$lock"
    step "compiling them" compile
    step "openai for Node" "$venv/bin/npm" --prefix "$node" ci
}

# Without Ratchet itself: whatever runs here is given the clone's root as its path.
install_trl() {
    install_torch
    step "packages of $lock" $install -r "$lock"
    step "compiling them" compile
}

# Both take one core each, to unpack. Asked for again at the end, for nothing where it went well, else for its error.
install_peers_meanwhile() {
    quiet=1 sh deploy/setup.sh peers 2>/dev/null &
    children=$!
}

[ "$kind" != test ] || install_peers_meanwhile
pip="$venv/bin/pip --disable-pip-version-check --no-input"
# Compiled afterwards by all cores: pip uses one, and is a third of its time at it.
install="$pip install --no-deps --no-compile --progress-bar off"
if [ ! -e "$stamp" ]; then
    make_venv
    case $kind in
    peers) install_peers ;;
    trl) install_trl ;;
    test) install_ratchet && find_browser && find_curl && find_promtool && find_compose ;;
    *) install_ratchet ;;
    esac
    touch "$stamp"
fi
[ "$kind" != test ] || { wait $children || true; sh deploy/setup.sh peers; }
