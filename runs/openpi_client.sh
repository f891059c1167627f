#!/usr/bin/env bash
# The real openpi-client, in an environment of its own and without torch, plays tabletop episodes through `agra serve`.
#   bash runs/openpi_client.sh CHECKPOINT [EPISODES]
set -euo pipefail
cd "$(dirname "$0")/.."
checkpoint=$1 episodes=${2:-1}
environment=${OPENPI_ENVIRONMENT:-.openpi}

if [ ! -x "$environment/bin/python" ]; then
  python3 -m venv "$environment"
  # openpi-client imports typing_extensions without asking for it
  "$environment/bin/pip" install -q openpi-client typing_extensions -e '.[tabletop]'
fi

log=$(mktemp)
agra serve "$checkpoint" --port 0 >"$log" 2>&1 &
server=$!
trap 'kill "$server"; rm -f "$log"' EXIT
until port=$(grep -oP 'ws://127.0.0.1:\K[0-9]+' "$log"); do
  kill -0 "$server" || { cat "$log"; exit 1; }
  sleep 1
done
"$environment/bin/python" benchmarks/openpi_episode.py "$port" "$episodes"
