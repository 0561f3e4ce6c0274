#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Evaluates the packed model on a GPU machine, after a GPU check (docs/gpu-check.md):
#   real_model.sh SECONDS PRESET FOLDER_OF_PARTS...
# Into $OUT come eval.tar.gz, with every answer, and results.json and results.md where it got so
# far. Where time runs out, eval.tar.gz holds what was asked until then.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
seconds=$1 preset=$2
shift 2
python=${PYTHON:-python3}
site=$root/build/gpu-site
work=${WORK:-/tmp/ems-eval}
out=${OUT:-$work}
if [[ ! -x $site/bin/vllm ]] && ! command -v vllm > /dev/null; then
  echo "There is no vLLM: benchmarks/gpu_check.py --stages packages build unpacks .gpu/." >&2
  exit 1
fi
mkdir -p "$work" "$out"
export PYTHONPATH=$root:$site${PYTHONPATH:+:$PYTHONPATH} PATH=$site/bin:$PATH PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_HOST_IP=127.0.0.1
export VLLM_USE_V2_MODEL_RUNNER=${VLLM_USE_V2_MODEL_RUNNER:-1}
[[ -f $work/model/model.safetensors ]] ||
  "$python" benchmarks/gpu/unpack_model.py "$@" --out "$work/model" || exit 1
"$python" benchmarks/gpu/limited.py "$seconds" \
  "$python" -c 'from ems_vllm.cli import main; main()' \
  eval "$work/model" --preset "$preset" --output "$work/eval" ${EVAL_ARGS:-}
status=$?
tar -C "$work" -czf "$out/eval.tar.gz" eval
cp "$work"/eval/results.{json,md} "$out/" 2> /dev/null
exit $status
