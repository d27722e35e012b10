# The GPU image. docker build -t megatron_sep .
# NVIDIA's libraries are built from source when asked for, since that takes an hour:
#   --build-arg TRANSFORMER_ENGINE=v2.8 --build-arg APEX=25.09
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

ARG TRANSFORMER_ENGINE=""
ARG APEX=""

# The versions are those of the base image's release, which its tag pins.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv git ninja-build \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1

WORKDIR /opt/megatron_sep
COPY scripts/constraints.txt scripts/
RUN pip install -c scripts/constraints.txt torch setuptools wheel

RUN if [ -n "$TRANSFORMER_ENGINE" ]; then \
        NVTE_FRAMEWORK=pytorch pip install --no-build-isolation \
            "git+https://github.com/NVIDIA/TransformerEngine.git@$TRANSFORMER_ENGINE"; fi \
    && if [ -n "$APEX" ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation "git+https://github.com/NVIDIA/apex.git@$APEX"; fi

COPY . .
RUN pip install -c scripts/constraints.txt --no-build-isolation -e ".[data,sentencepiece,hf,plot,watch,log,remote]"

ENTRYPOINT ["megatron_sep"]
