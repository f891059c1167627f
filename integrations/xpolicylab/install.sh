#!/usr/bin/env bash
# Installs XPolicyLab and agra into the active Python environment.
# Usage: bash install.sh AGRA_CHECKOUT [EXTRA]
# EXTRA is train for checkpoints (the default), or client for a policy behind agra serve, which needs no torch.
set -euo pipefail

checkout=${1:?"usage: bash install.sh AGRA_CHECKOUT [train|client]"}
extra=${2:-train}
xpolicylab="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

python -m pip install -e "${xpolicylab}"
python -m pip install "${checkout}[${extra},client]"
python -c "import agra.serving.batch_client, XPolicyLab.model_template"
