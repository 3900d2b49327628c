# docker build --target cpu  -t pgrl:cpu  .
# docker build --target cuda -t pgrl:cuda .
# docker run --rm            -v "$PWD:/runs" pgrl:cpu  algo=ppo env=CartPole-v1
# docker run --rm --gpus all -v "$PWD:/runs" pgrl:cuda algo=ppo env=HalfCheetah-v5 device=cuda
#
# The mounted folder stands for the one a native command would be run in: the run lies in ./runs/<algo>/<env>/, and
# resume=runs/... means the same inside and outside. It must be writable for user 1000; if it is another's, add
# --user "$(id -u):$(id -g)". `docker stop` sends SIGTERM; give the checkpoint time with `--stop-timeout 30`.

ARG BASE=python:3.11-slim-bookworm


# The wheel of pgrl itself, without its dependencies.
FROM ${BASE} AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .


# pgrl and what it needs, in a virtual environment that the last stages copy. torch comes first: it is by far the
# largest part and changes least.
FROM ${BASE} AS venv
RUN python -m venv /opt/pgrl
ENV PATH=/opt/pgrl/bin:$PATH
COPY constraints.txt /tmp/

# On Linux the default build of torch carries the CUDA libraries, so no CUDA base image is needed.
FROM venv AS venv-cuda
ARG EXTRAS=mujoco,box2d
RUN pip install --no-cache-dir -c /tmp/constraints.txt torch
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheel/*.whl)[${EXTRAS}]"

# The build of torch for CPUs lies in an index of its own: --build-arg TORCH_INDEX_URL=<the index that PyTorch's
# installation page names>. Without it this image works too, but on x86-64 it is as large as the one for CUDA.
FROM venv AS venv-cpu
ARG EXTRAS=mujoco,box2d
ARG TORCH_INDEX_URL
RUN pip install --no-cache-dir -c /tmp/constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheel/*.whl)[${EXTRAS}]"


FROM ${BASE} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="pgrl" \
      org.opencontainers.image.description="Policy-gradient reinforcement learning in PyTorch" \
      org.opencontainers.image.authors="The pgrl authors" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# g++ is for torch.compile, for acting and for MKL; tini is the init process.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home pgrl \
    && install --directory --owner=pgrl --group=pgrl /runs
# HOME and USER serve a --user of any number, which has no entry in /etc/passwd.
ENV PATH=/opt/pgrl/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=pgrl
WORKDIR /runs
VOLUME /runs
USER pgrl
# As process 1, python would drop a SIGTERM that comes before pgrl's handler is set, and would reap no orphans. So tini
# is process 1 and part of the entry point: it passes every signal on and ends with python's exit code (143 after SIGTERM).
ENTRYPOINT ["/usr/bin/tini", "--", "python", "-m", "pgrl.train"]


FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=venv-cuda /opt/pgrl /opt/pgrl


# Last, and so the one that `docker build .` makes.
FROM runtime AS cpu
COPY --from=venv-cpu /opt/pgrl /opt/pgrl
