#!/usr/bin/env bash
# Others' own clients, in an environment of their own and without torch, play tabletop episodes through `agra serve`:
# openpi-client on openpi's wire, that of strands-robots on GR00T's.
#   bash runs/foreign_client.sh openpi|groot CHECKPOINT [EPISODES]
set -euo pipefail
cd "$(dirname "$0")/.."
wire=$1 checkpoint=$2 episodes=${3:-1}
environment=.venv-clients
case $wire in
  openpi) scheme=ws ;;
  groot) scheme=tcp ;;
  *) echo "expected openpi or groot, got $wire"; exit 2 ;;
esac

if [ ! -e "$environment/.installed" ]; then
  python3 -m venv "$environment"
  # openpi-client imports typing_extensions without asking for it; strands-robots asks for much that its client never imports
  "$environment/bin/pip" install -q openpi-client typing_extensions msgpack "pyzmq>=27" -e '.[tabletop]'
  "$environment/bin/pip" install -q --no-deps strands-robots==0.3.8
  touch "$environment/.installed"
fi

log=$(mktemp)
agra serve "$checkpoint" --port 0 --groot-port 0 >"$log" 2>&1 &
server=$!
trap 'kill "$server"; rm -f "$log"' EXIT
until port=$(grep -oP "$scheme://127.0.0.1:\K[0-9]+" "$log"); do
  kill -0 "$server" || { cat "$log"; exit 1; }
  sleep 1
done
"$environment/bin/python" benchmarks/client_episode.py "$wire" "$port" "$episodes"
