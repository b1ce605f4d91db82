# reptrt with TensorRT for NVIDIA GPUs, CUDA 13.
#   docker build -t reptrt .
#   docker run --rm --gpus all -v "$PWD:/work" reptrt build-engine net.int8.onnx -o net.engine
# Another CUDA: --build-arg BASE=nvidia/cuda:12.9.1-devel-ubuntu24.04 --build-arg CUDA=cu12
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Versions of Ubuntu's packages are those of the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/reptrt
ENV PATH=/opt/reptrt/bin:${PATH}

COPY pyproject.toml README.md LICENSE constraints-dev.txt /src/
COPY reptrt /src/reptrt
# pycuda is compiled here: the base image has CUDA's compiler. TensorRT's package is that of the CUDA.
ARG CUDA=cu13
RUN pip install --no-cache-dir -c /src/constraints-dev.txt "tensorrt-${CUDA}>=10.12" "/src[gpu,detect]"

WORKDIR /work
ENTRYPOINT ["reptrt"]
