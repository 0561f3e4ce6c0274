#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Packs what the GPU check needs on a machine without a network, for two transfers (transfer.py):
#   .gpu/site.tar.xz         Python packages, vLLM among them (site.sh)
#   .gpu/extension.tar.xz    this package's extension, where nvcc is (extension.py)
#   .gpu/commit              what is checked
#   .gpu/model/, .gpu-model/ a real model, where it can be had (model.py)
# What is in build/gpu-pack/ from the last time, and is packed from the same, is taken again.
#   PYTHON         a Python with torch, pip and transformers
#   GPU_PYTHON312  a Python 3.12, for its headers
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
cache=$root/build/gpu-pack
export PYTHON=${PYTHON:-python3}
# So that both transfers are about as large.
first_part_bytes=30700000

# Runs a command where a step's inputs have changed: step NAME INPUTS... -- COMMAND...
step() {
  local name=$1 inputs=()
  shift
  while [[ $1 != -- ]]; do
    inputs+=("$1")
    shift
  done
  shift
  local now
  now=$(cat "${inputs[@]}" | sha256sum)
  if [[ -f $cache/$name.inputs && $(< "$cache/$name.inputs") == "$now" ]]; then
    echo "$name: as packed before"
    return
  fi
  rm -f "$cache/$name.inputs"
  echo "$name: packing"
  "$@" && echo "$now" > "$cache/$name.inputs"
}

cd "$here"
mkdir -p "$cache"
step site site.sh thin_fatbin.py requirements.txt "$root/requirements/cuda.txt" -- \
  bash site.sh "$cache/site.tar.xz"
step model model.py pack.sh ../gguf_llama.py ../packed_model.py "$root"/models/get.py \
  "$root"/models/pretrained/*.py "$root/requirements/models.txt" -- \
  "$PYTHON" model.py smollm2 "$cache/model" --parts "$first_part_bytes" ||
  echo "The model could not be packed: real_model.sh needs one from elsewhere."
"$PYTHON" extension.py "$cache/extension.tar.xz" --headers-of "${GPU_PYTHON312:-python3.12}" || {
  rm -f "$cache/extension.tar.xz"
  echo "The extension could not be built: the GPU machine builds it."
}

rm -rf "$root/.gpu" "$root/.gpu-model"
mkdir "$root/.gpu"
cp "$cache/site.tar.xz" "$root/.gpu/"
[[ ! -f $cache/extension.tar.xz ]] || cp "$cache/extension.tar.xz" "$root/.gpu/"
if [[ -f $cache/model.inputs ]]; then
  cp -r "$cache/model/0" "$root/.gpu/model"
  cp -r "$cache/model/1" "$root/.gpu-model"
fi
git -C "$root" describe --always --dirty > "$root/.gpu/commit"
"$PYTHON" transfer.py
