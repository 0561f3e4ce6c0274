#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Packs what `make gpu-check` needs on a GPU machine without a network, into .gpu/ (ignored by git):
#   wheels/        Python packages for Python 3.12 on x86-64 (requirements.txt beside this)
#   vllm.tar.zst   vLLM's Python and FlashAttention 3, without its other compiled parts
#   commit         what is checked
# Copy the checkout with .gpu/ there and run `make gpu-check`. Of vLLM's compiled operators only
# FlashAttention 3 comes along; its attention backends write the cache with Triton.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=$root/.gpu
python=${PYTHON:-python3}
limit_mib=60
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

vllm=$(grep '^vllm==' "$root/requirements/cuda.txt")
platforms=()
for tag in manylinux_2_{17,24,26,27,28,31}_x86_64 manylinux{2014,2010,1}_x86_64; do
  platforms+=(--platform "$tag")
done
fetch=("$python" -m pip -qq --disable-pip-version-check download --no-deps --only-binary=:all:
  --python-version 3.12)

rm -rf "$out"
mkdir -p "$out/wheels" "$work/tree"
"${fetch[@]}" --implementation cp "${platforms[@]}" -d "$out/wheels" -r "$here/requirements.txt"
"${fetch[@]}" -d "$work" "$vllm"

unzip -q "$work"/vllm-*.whl -d "$work/tree" -x \
  '*.hpp' '*.cuh' '*.h' '*.cu' 'vllm/vllm-rs' '*swagger-ui*' '*/deep_gemm/*.so' \
  '*/_C_*.so' '*/_moe_C*.so' '*/_flashkda*.so' '*/_deepselect*.so' '*/_flashmla*.so' \
  '*/_qutlass*.so' '*/_vllm_fa2_C*.so'
find "$work/tree" -name '*.so' -exec strip --strip-unneeded {} +
# Imported on a GPU, but nothing of it is called with these attention backends.
: > "$work/tree/vllm/_C_stable_libtorch.py"
tar -C "$work/tree" -cf - . | zstd -q -15 --long=27 -T0 -o "$out/vllm.tar.zst"
git -C "$root" rev-parse --short HEAD > "$out/commit"

for part in "$out/wheels" "$out/vllm.tar.zst"; do
  mib=$(du -sm "$part" | cut -f1)
  echo "$mib MiB in ${part#"$root"/}"
  if ((mib >= limit_mib)); then
    echo "That is more than one transfer takes ($limit_mib MiB)." >&2
    exit 1
  fi
done
