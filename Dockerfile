# Two targets from one file: `cpu` (what a plain `docker build .` gives) and `cuda`.
#
#   docker build -t internvl-server:0.1.0 .
#   docker build -t internvl-server:0.1.0-cuda --target cuda .
#
# BASE needs apt-get and python3 (3.11 or 3.12) with its venv module. It serves both targets: the
# CUDA libraries come with torch's wheels and the driver from the host's container toolkit.
ARG BASE=python:3.11-slim-bookworm
ARG TORCH=torch==2.13.0

# An init that forwards signals and reaps, and a user without rights.
FROM ${BASE} AS runtime
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 internvl \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home \
        --shell /usr/sbin/nologin internvl
# The file system may be read-only: /tmp is all that is ever written to. Nothing is downloaded.
ENV PATH=/opt/app/bin:/opt/venv/bin:$PATH \
    HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    INTERNVL_HOST=0.0.0.0 \
    INTERNVL_PORT=8000
ARG BASE
ARG VERSION=0.1.0
ARG SOURCE=""
LABEL org.opencontainers.image.title="internvl-server" \
      org.opencontainers.image.description="OpenAI-compatible inference server for InternVL3" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE}"
EXPOSE 8000
WORKDIR /models
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s --retries=3 \
    CMD ["python3", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['INTERNVL_PORT']), timeout=4); c.request('GET', '/live'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--", "internvl"]
CMD ["serve"]

# The dependencies live in /opt/venv and the server in /opt/app, in layers of their own: a change
# of code ships a few megabytes.
FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# hadolint ignore=DL3013
RUN python3 -m venv /opt/venv \
    && python3 -c "import sysconfig; print('/opt/app', file=open(sysconfig.get_path('purelib') + '/app.pth', 'w'))" \
    && python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && python3 -m venv /opt/sbom \
    && /opt/sbom/bin/pip install --constraint constraints.txt cyclonedx-bom
# What is done to an installed /opt/venv: away with pip and with packages' own tests (200 MB), and a
# bill of materials that names each package with its version and licence.
ENV FINISH="pip uninstall --yes pip \
    && find /opt/venv/lib -type d '(' -name test -o -name tests ')' -prune -exec rm -r {} + \
    && find /opt/venv/lib -path '*/torch/bin/*' '(' -name '*[Tt]est*' -o -name 'protoc*' ')' -delete \
    && /opt/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --gather-license-texts \
        --output-reproducible --output-file /opt/venv/sbom.cdx.json /opt/venv/bin/python3"

# torch first, at one exact version, so that nothing else picks a build for us.
FROM build AS build-cpu
ARG TORCH
ARG TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
# hadolint ignore=DL3013
RUN pip install ${TORCH_ARGS} "${TORCH}" \
    && pip install --constraint constraints.txt --requirement requirements.txt \
    && sh -c "${FINISH}"

FROM build AS build-cuda
ARG TORCH
ARG TORCH_ARGS=""
# hadolint ignore=DL3013
RUN pip install ${TORCH_ARGS} "${TORCH}" \
    && pip install --constraint constraints.txt --requirement requirements.txt \
    && sh -c "${FINISH}"

# The compiler is for the C that computes and resizes on the CPU; it stays in this stage.
FROM build AS build-app
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY README.md LICENSE ./
COPY wire/ wire/
COPY preprocessing/ preprocessing/
COPY model/ model/
COPY engine/ engine/
COPY server/ server/
COPY demo/ demo/
RUN pip install --no-deps --target /opt/app .

FROM runtime AS cuda
# Triton compiles kernels when the server starts.
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/venv /opt/venv
COPY --from=build-app /opt/app /opt/app
# Last, as every build has its own.
ARG REVISION=""
ARG CREATED=""
LABEL org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
COPY --from=build-app /opt/app /opt/app
ARG REVISION=""
ARG CREATED=""
LABEL org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
