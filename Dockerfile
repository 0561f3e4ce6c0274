# syntax=docker/dockerfile:1
# vLLM's own image with this package added: docker build -t ems-vllm .
# Run it as that image: docker run --gpus all -p 8000:8000 ems-vllm MODEL --kv-compression ems
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

# The same image compiles the kernels: torch and CUDA are then those that the server has.
FROM ${VLLM_IMAGE} AS builder
# GPU architectures, in torch's notation; all but 9.0a serve the later ones of their kind too.
ARG TORCH_CUDA_ARCH_LIST="8.0 9.0a 10.0 12.0"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# CUDA's headers at the release of its compiler in the image. No versions of packages: archives drop
# the old ones, and builds would end.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
       "cuda-cudart-dev-$(nvcc --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1-\2/p')" \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY requirements/build.txt requirements/
RUN python3 -m pip install --no-cache-dir --no-deps -r requirements/build.txt
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY configs configs
COPY ems_vllm ems_vllm
RUN EMS_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" python3 -m pip wheel \
    --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${VLLM_IMAGE}
RUN --mount=type=bind,from=builder,source=/wheels,target=/wheels \
    python3 -m pip install --no-cache-dir /wheels/*.whl
# The image's unprivileged user, by number so that Kubernetes can tell that it is not root.
USER 2000:0
ENV HOME=/home/vllm
WORKDIR /home/vllm
EXPOSE 8000
# Loading a large model takes minutes.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m \
    CMD ["curl", "--fail", "--silent", "http://localhost:8000/health"]
ENTRYPOINT ["vllm", "serve"]
