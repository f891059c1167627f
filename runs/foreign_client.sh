#!/usr/bin/env bash
# Tabletop episodes through `agra serve` by clients of other projects, in an environment of their own without torch:
# openpi-client for openpi's protocol, strands-robots for GR00T's.
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
  # openpi-client needs a numpy below 2, which has no wheels for Python 3.13.
  python=$(command -v python3.12 || command -v python3.11 || command -v python3)
  "$python" -m venv "$environment"
  # openpi-client does not list typing_extensions, which it imports. The client of strands-robots needs few of its dependencies.
  "$environment/bin/pip" install -q openpi-client typing_extensions msgpack "pyzmq>=27" -e '.[tabletop]'
  "$environment/bin/pip" install -q --no-deps strands-robots==0.3.8
  touch "$environment/.installed"
fi

work=$(mktemp -d)
agra serve "$checkpoint" --port 0 --groot-port 0 --ready-file "$work/ready.json" >"$work/log" 2>&1 &
server=$!
trap 'kill "$server"; rm -rf "$work"' EXIT
until [ -e "$work/ready.json" ]; do
  kill -0 "$server" || { cat "$work/log"; exit 1; }
  sleep 1
done
port=$(sed "s|.*\"$scheme://[^\"]*:\([0-9]*\)\".*|\1|" "$work/ready.json")
"$environment/bin/python" benchmarks/client_episode.py "$wire" "$port" "$episodes"
