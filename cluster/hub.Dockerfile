# The hub's image: every Ray node and the endpoint run it. Not yet built where it could be tried on a GPU.
#
#   docker build -f cluster/hub.Dockerfile -t registry.example.org/gretfound/hub:0.1.0 .
#   docker build -f cluster/hub.Dockerfile --build-arg BASE=ubuntu:22.04 -t gretfound-hub:cpu .
#   docker run --rm gretfound-hub:cpu python -m jobs.pretrain_encoder --help
#
# The runtime flavour, not devel: torch's wheels bring CUDA's libraries, and no operator is compiled (DeepSpeed runs
# with torch's own AdamW). CUDA's major version must be that of torch's wheels in requirements.lock.
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu22.04
FROM ${BASE}

# rsync and openssh-client: Ray's cluster launcher copies files into containers. wget: KubeRay's probes.
# Python 3.11 comes from the deadsnakes archive; Ubuntu 22.04 itself has only a release candidate of it.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends software-properties-common gpg-agent \
    && add-apt-repository -y ppa:deadsnakes/ppa \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates openssh-client python3.11 python3.11-venv rsync wget \
    && apt-get purge -y software-properties-common gpg-agent \
    && apt-get autoremove -y \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/gretfound
RUN python3.11 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# The lock first: a change of the code alone does not install 5 GB again.
COPY requirements.lock ./
RUN pip install --no-cache-dir --no-deps -r requirements.lock

COPY pyproject.toml README.md LICENSE ./
COPY gretfound gretfound
COPY jobs jobs
COPY serve serve
COPY conf conf
RUN pip install --no-cache-dir --no-deps -e .

# Ray's launcher uses login shells, in which /etc/profile resets PATH.
RUN echo 'PATH=/opt/venv/bin:$PATH' > /etc/profile.d/gretfound.sh \
    && useradd --uid 1000 --user-group --create-home gretfound
USER gretfound

# No output is held back, and no __pycache__ is written where the user may not.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
CMD ["ray", "--version"]
