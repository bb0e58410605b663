# The site's image: `gretfound-site` and what it needs, for a hospital's machine. It runs as an ordinary user, needs no
# network, writes only to /out, /keys and /tmp, and holds no secret. docs/container.md tells how to run it.
#
#   docker build -f cluster/site.Dockerfile -t gretfound-site:0.1.0 .
#   docker build -f cluster/site.Dockerfile --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t gretfound-site:0.1.0-cpu .
#   docker run --rm --network none gretfound-site:0.1.0 columns
#   make site-image        builds it with buildah, without Docker, and has it contribute a drawn site
#
# Any base of Debian 12 will do; a release names one by its digest: --build-arg BASE=debian@sha256:...
ARG BASE=debian:bookworm-slim
FROM ${BASE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log /var/log/apt/*

# TORCH: the version of requirements.lock. TORCH_INDEX: where that build of torch comes from; empty is PyPI, whose build
# brings CUDA's libraries and runs on a CPU too.
ARG TORCH=2.14.1
ARG TORCH_INDEX=
WORKDIR /opt/gretfound
COPY requirements.lock cluster/site-requirements.txt ./
# The secret `pip`, a pip.conf, is for machines that install from an index of their own; it is not kept in the image.
# torch's own requirements come last: those that are in the file are there by then, CUDA's are held to the lock.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /opt/venv \
    && sed "s/^torch==.*/torch==${TORCH}/" requirements.lock > constraints.txt \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} "torch==${TORCH}" \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps --requirement site-requirements.txt \
    && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt "torch==${TORCH}" \
    && /opt/venv/bin/pip freeze > installed.txt \
    && /opt/venv/bin/pip uninstall --yes setuptools pip \
    && rm constraints.txt site-requirements.txt

COPY LICENSE ./
COPY gretfound gretfound
COPY conf/disclosure conf/disclosure
COPY conf/gate conf/gate
RUN echo /opt/gretfound > /opt/venv/lib/python3.11/site-packages/gretfound.pth \
    && printf '#!/opt/venv/bin/python\nimport sys\nfrom gretfound.site import main\n\nif __name__ == "__main__":\n    sys.exit(main())\n' \
        > /opt/venv/bin/gretfound-site \
    && chmod 755 /opt/venv/bin/gretfound-site \
    && /opt/venv/bin/python -m compileall -q gretfound \
    && useradd --uid 1000 --user-group --no-create-home --home-dir /tmp gretfound \
    && mkdir /data /base /out /keys \
    && chown gretfound:gretfound /out /keys

# Keys lie in /keys, whoever runs it: XDG_CONFIG_HOME. USER: torch asks for a name, and `--user 1234` has none.
ENV PATH=/opt/venv/bin:/usr/bin:/bin HOME=/tmp USER=gretfound XDG_CONFIG_HOME=/keys \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME=/tmp/huggingface \
    RAY_USAGE_STATS_ENABLED=0 AWS_EC2_METADATA_DISABLED=true \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER gretfound
WORKDIR /tmp
ENTRYPOINT ["gretfound-site"]
CMD ["--help"]
