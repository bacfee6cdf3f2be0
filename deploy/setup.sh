#!/bin/sh
# Makes or refreshes a virtual environment, from the clone's root: `deploy/setup.sh cpu|gpu|test|peers|trl`.
# `test` makes `peers` beside it: the clients and gateways that tests try, in an environment of their own. `trl` is the PPO that ours
# is measured beside.
#
# What is installed is exactly what the lock file in requirements/ names, by hash: by uv, which takes a seventh of pip's time, or by pip
# where pip's settings, which uv does not read, name an index, or uv reaches none. torch on the CPU is a step of its
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
updated=
exec 3>&2
shown= # whether anybody sees what is going on
[ ! -t 1 ] || [ -n "${quiet:-}" ] || shown=1

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

# step TITLE COMMAND...: one line with its time; on a terminal its seconds meanwhile.
step() {
    attempt "$@" || fail "$1: failed. All of it is in $log."
}

# The same for what there is another way for, if it fails.
attempt() {
    title=$1
    shift
    began=$(date +%s)
    echo "== $title" >>"$log"
    start "$@" >>"$log" 2>&1 &
    child=$!
    children="$children $child"
    while [ -n "$shown" ] && [ "$1" != "$uv" ] && kill -0 "$child" 2>/dev/null; do
        printf '\r  %-36s %4d s' "$title" $(($(date +%s) - began))
        sleep 1
    done
    wait "$child" && status=0 || status=$?
    [ -z "$shown" ] || printf '\r\033[K'
    if [ $status = 0 ]; then
        printf '  %-36s %4d s\n' "$title" $(($(date +%s) - began))
    else
        tail -n 15 "$log" >&2
    fi
    return $status
}

# uv has bars of its own, for the terminal. A program takes this shell's place, so that it is ended by its id.
# (apt-get goes on to its end, as it should.)
start() {
    [ -z "$shown" ] || [ "$1" != "$uv" ] || exec 2>&3
    case $1 in
    */*) exec "$@" ;;
    *) "$@" ;;
    esac
}

# What the tests need beside Python: the machine's own, else the distribution's where we may install it. It hardly takes a core, so it goes
# on while pip does.
find_tools() {
    command -v curl >/dev/null || install_package curl || missing curl curl
    find_compose || install_package docker-compose --no-install-recommends || missing "Docker Compose" docker-compose
    # promtool checks the alerts. Installing the package would start a server.
    command -v promtool >/dev/null || [ -x "$venv/bin/promtool" ] || unpack_promtool || missing promtool prometheus
    has_browser || install_package chromium || true
}

# Docker Compose reads docker-compose.yml for the tests; it needs no daemon for that.
find_compose() {
    docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null
}

unpack_promtool() {
    folder=$(mktemp -d)
    [ "$(id -u)" != 0 ] || update_packages
    (cd "$folder" && apt-get download prometheus && dpkg-deb -x prometheus_*.deb .) &&
        mv "$folder/usr/bin/promtool" "$venv/bin/promtool"
    status=$?
    rm -rf "$folder"
    return $status
}

has_browser() {
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$name" >/dev/null && return
    done
    return 1
}

# Playwright's own, where the distribution's cannot be had.
find_browser() {
    has_browser || "$venv/bin/playwright" install chromium || missing Chromium chromium
}

missing() {
    echo "The tests need $1, and it cannot be fetched here: install it ($2), then make test."
    exit 1
}

# install_package NAME [OPTION]: from the distribution, where we may.
install_package() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null &&
        update_packages && DEBIAN_FRONTEND=noninteractive apt-get install -y "$@"
}

# Once is enough.
update_packages() {
    [ -n "$updated" ] || apt-get update && updated=1
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

install_packages() {
    if $pip config list | grep -q -E '[.](index-url|no-index|proxy)='; then
        step "packages of $lock" $install -r "$lock"
        return
    fi
    step "uv" $install -r requirements/uv.txt
    attempt "packages of $lock" "$uv" pip install --python "$venv/bin/python" --no-deps -r "$lock" ||
        step "packages of $lock, by pip instead" $install -r "$lock"
}

install_torch() {
    step "torch $torch, CPU build" $install --retries 1 \
        --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"
}

install_ratchet() {
    [ "$kind" = gpu ] || install_torch
    install_packages
    step "compiling them" compile
    step "ratchet" $install --no-build-isolation --editable .
}

install_peers() {
    install_packages
    step "compiling them" compile
    step "openai for Node" "$venv/bin/npm" --prefix "$node" ci
}

install_for_tests() {
    (children= log=$venv/tools.log shown= && : >"$log" && step "what else the tests need" find_tools) &
    tools=$!
    children="$children $tools"
    install_ratchet
    wait $tools || fail "What else the tests need could not be had: see $venv/tools.log."
    step "a browser" find_browser
}

# Without Ratchet itself: whatever runs here is given the clone's root as its path.
install_trl() {
    install_torch
    install_packages
    step "compiling them" compile
}

# Much of both is waiting, for the network and the disk. Asked for again at the end, for nothing where it went well, else for its error.
install_peers_meanwhile() {
    quiet=1 sh deploy/setup.sh peers 2>/dev/null &
    children=$!
}

[ "$kind" != test ] || install_peers_meanwhile
uv=$venv/bin/uv
pip="$venv/bin/pip --disable-pip-version-check --no-input"
# Compiled afterwards, by all cores.
install="$pip install --no-deps --no-compile --progress-bar off"
if [ ! -e "$stamp" ]; then
    make_venv
    case $kind in
    peers) install_peers ;;
    trl) install_trl ;;
    test) install_for_tests ;;
    *) install_ratchet ;;
    esac
    touch "$stamp"
fi
[ "$kind" != test ] || { wait $children || true; sh deploy/setup.sh peers; }
