#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Packs Python packages for a GPU machine without a network: site.sh OUT.tar.xz
# What is in requirements.txt beside this, for Python 3.12 on x86-64; vLLM's Python; and of its
# compiled parts the operators and FlashAttention 3, with code for Hopper alone.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
out=$1
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site

vllm=$(grep '^vllm==' "$root/requirements/cuda.txt")
platforms=()
for tag in manylinux_2_{17,24,26,27,28,31}_x86_64 manylinux{2014,2010,1}_x86_64; do
  platforms+=(--platform "$tag")
done
pip=("$python" -m pip -qq --disable-pip-version-check)
target=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}")

mkdir -p "$site"
"${pip[@]}" install "${target[@]}" --no-compile --target "$site" -r "$here/requirements.txt"
"${pip[@]}" download --no-deps --only-binary=:all: --python-version 3.12 -d "$work" "$vllm"

# Left out: what is compiled for other models and methods; deep_gemm, which without its library
# prints a page of errors at every start; cumem_allocator, which needs libnvrtc where the loader
# finds it, and which vLLM does without where it is not there at all.
unzip -q "$work"/vllm-*.whl -d "$site" -x \
  '*.hpp' '*.cuh' '*.h' '*.cu' 'vllm/vllm-rs' '*swagger-ui*' '*/deep_gemm/*' '*/cumem_allocator*' \
  '*/_moe_C*.so' '*/_flashkda*.so' '*/_deepselect*.so' '*/_flashmla*.so' '*/_qutlass*.so' \
  '*/_vllm_fa2_C*.so'
# Some libraries of packages are stripped already, in ways that strip does not read.
find "$site" -name '*.so' -exec strip --strip-unneeded {} \; 2>/dev/null

thin() {
  "$python" "$here/thin_fatbin.py" "$site/$1" "$work/thin.so" --without "$2"
  mv "$work/thin.so" "$site/$1"
}
# Without quantised weights and without layers of other architectures.
thin vllm/_C_stable_libtorch.abi3.so \
  'marlin|machete|cutlass|selective_scan|router_gemm|kda|gptq|hadamard|deepseek|kimi|minimax'
# Without float8, and without head sizes but 64 and 128.
thin vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so \
  'float_e4m3|ILi(96|192|256)EEEEEELi|EEELi(256|512)ENS_'

# Sources of a library that is compiled in, tests, what was tuned for mixtures of experts, matrices
# of a quantisation, lists of files and of parts, types for checkers.
rm -rf "$site"/{bin,tvm_ffi/3rdparty,vllm/model_executor/layers/fused_moe/configs}
rm -rf "$site"/{jsonschema/{tests,benchmarks},referencing/tests,zmq/tests}
rm -rf "$site"/*.dist-info/sboms
find "$site" \( -name hadamards.safetensors -o -path '*.dist-info/RECORD' -o -name '*.pyi' \) -delete
find "$site" -name __pycache__ -type d -prune -exec rm -rf {} +
tar -C "$site" --sort=name --owner=0 --group=0 --mtime=@0 -cf - . |
  xz -T1 --lzma2=preset=9e,dict=192MiB > "$out"
