#!/usr/bin/env bash
# Plays a task on this machine: the policy server in its own Python environment, and XPolicyLab's environment client.
# Usage: bash eval.sh BENCH TASK CKPT ENV_CFG ACTION_TYPE SEED POLICY_GPU ENV_GPU POLICY_ENV EVAL_CONDA_ENV [KEY=VALUE ...]
# POLICY_ENV is the folder of a Python environment, or the name of a conda environment.
# KEY=VALUE replaces a setting of deploy.yml, such as policy=ws://127.0.0.1:8000.
set -euo pipefail

if (($# < 10)); then
    sed -n 's/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
bench=$1 task=$2 checkpoint=$3 env_cfg=$4 action_type=$5 seed=$6 policy_gpu=$7 env_gpu=$8 policy_env=$9 eval_env=${10}
shift 10

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "${here}/../.." && pwd)"
name="$(basename "${here}")"

python=""
for candidate in "${policy_env}/bin/python" "${policy_env}/.venv/bin/python"; do
    if [[ -z "${python}" && -x "${candidate}" ]]; then python="${candidate}"; fi
done
if [[ -z "${python}" ]]; then
    python="$(conda run -n "${policy_env}" python -c "import sys; print(sys.executable)")"
fi

port="$(bash "${root}/utils/get_free_port.sh")"
CUDA_VISIBLE_DEVICES="${policy_gpu}" PYTHONPATH="${root}${PYTHONPATH:+:${PYTHONPATH}}" \
    "${python}" "${root}/setup_policy_server.py" --config_path "${here}/deploy.yml" --overrides \
    port="${port}" host=localhost policy_name="${name}" bench_name="${bench}" task_name="${task}" \
    ckpt_name="${checkpoint}" env_cfg_type="${env_cfg}" action_type="${action_type}" seed="${seed}" "$@" &
server=$!
trap 'kill "${server}" 2>/dev/null || true' EXIT
bash "${root}/utils/wait_for_policy_server.sh" localhost "${port}" "${server}" "agra" 1200

bash "${here}/setup_eval_env_client.sh" "${bench}" "${task}" "${checkpoint}" "${env_cfg}" "${action_type}" "${seed}" \
    "${env_gpu}" "${eval_env}" "ckpt_name=${checkpoint},action_type=${action_type}" "${port}" localhost
