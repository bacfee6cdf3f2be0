#!/bin/sh
# Makes what docker-compose.yml needs on this machine, once: `sh deploy/compose.sh cpu|gpu`. Passwords and keys are random, and lie
# in deploy/secrets/; .env says which build is run. What is there already stays. Then: docker compose up -d
set -eu
cd "$(dirname "$0")/.."

kind=${1:-}
case $kind in
cpu | gpu) ;;
*) echo "say which build: sh deploy/compose.sh cpu, or gpu (an NVIDIA GPU with its container toolkit)" >&2 && exit 1 ;;
esac

# Letters and digits alone, so that it can stand in a URL.
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

# keep NAME VALUE: the folder is closed to others, the files are not, as containers read them under users of their own.
keep() { [ -e "deploy/secrets/$1" ] || printf '%s' "$2" >"deploy/secrets/$1"; }

umask 022
mkdir -p deploy/secrets
chmod 700 deploy/secrets
keep postgres_password "$(random)"
keep database_url "postgresql://ratchet:$(cat deploy/secrets/postgres_password)@postgres:5432/ratchet"
keep ratchet_key "rk-$(random)"
keep grafana_password "$(random)"

touch .env
sed -i '/^COMPOSE_PROFILES=/d; /^BUILD=/d' .env
printf 'COMPOSE_PROFILES=%s\nBUILD=%s\n' "$kind" "$kind" >>.env
echo "Ready for: docker compose up -d"
