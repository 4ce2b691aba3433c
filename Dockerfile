# One file for both targets:
#   docker build -t hessquik:cpu .
#   docker build -t hessquik:cuda --build-arg TARGET=cuda .
#   docker build -t hessquik:cuda --build-arg TARGET=cuda --build-arg LOCK=cuda-arm64 --platform linux/arm64 .
# The CUDA libraries come with torch's own wheels, so both start from the same small base.
ARG BASE=docker.io/library/python:3.11.15-slim-bookworm@sha256:d29f48a31a8b408ed19272ca1e7b10ebae13b240a27e862d3d4217c528e2e0c3

# What the service needs: a layer of its own, which stays the same for as long as the lock does.
FROM ${BASE} AS dependencies
ARG TARGET=cpu
# A file in requirements/.
ARG LOCK=${TARGET}
# torch's CPU build lies on PyTorch's own index. Only files whose hash is in the lock are installed, so a second index
# adds no trust. Without access to an index: PIP_NO_INDEX=1 and PIP_FIND_LINKS, a mounted folder of wheels.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
COPY requirements/${LOCK}.lock /requirements.lock
COPY deploy/image/trim.py /trim.py
# pip stays in an environment of its own, and so in this stage. Unused parts of torch and plotly are left out.
RUN python3 -m venv /tools && python3 -m venv --without-pip /opt/hessquik && \
    /tools/bin/pip --python /opt/hessquik/bin/python install --no-cache-dir \
        --require-hashes --no-deps --only-binary :all: -r /requirements.lock && \
    python3 /trim.py /opt/hessquik

# The project itself, a small layer on top.
FROM dependencies AS code
# The CPU kernel is C. Its compiler stays in this stage, and Debian's current one will do.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# mypyc compiles the modules that every request meets; it stays in this stage, too.
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
COPY requirements/build.lock /build.lock
RUN /tools/bin/pip --python /opt/hessquik/bin/python install --no-cache-dir --target /compiler \
        --require-hashes --no-deps --only-binary :all: -r /build.lock
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY hessquik hessquik
COPY hessquik_client hessquik_client
COPY service service
# The lock holds setuptools, which torch needs; so nothing is fetched here. Without its kernel the image is not built.
RUN HESSQUIK_KERNEL=required HESSQUIK_COMPILE=1 PYTHONPATH=/compiler \
    /tools/bin/pip --python /opt/hessquik/bin/python install \
        --no-cache-dir --no-index --no-deps --no-build-isolation --target /layer/lib/python3.11/site-packages . && \
    mv /layer/lib/python3.11/site-packages/bin /layer/bin
# Triton would compile its C module for CUDA when it meets the first device, where there is no compiler.
RUN PYTHONPATH=/layer/lib/python3.11/site-packages /opt/hessquik/bin/python -P -m hessquik.backends.gpu_driver

FROM ${BASE} AS service
ARG TARGET=cpu
ARG LOCK=${TARGET}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hessquik-service" \
      org.opencontainers.image.description="Exact derivatives of saved hessQuik networks over HTTP" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}-${TARGET}" \
      org.opencontainers.image.revision="${REVISION}"
# A name for the user: torch asks for it. Nobody can log in with it. It owns the folder on which a volume for
# Triton's compiled kernels may be mounted, and nothing else.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin hessquik && \
    mkdir /var/cache/hessquik && chown hessquik: /var/cache/hessquik
COPY --from=dependencies /opt/hessquik /opt/hessquik
COPY requirements/${LOCK}.cdx.json /opt/hessquik/sbom.cdx.json
COPY --from=code /layer /opt/hessquik
COPY --chmod=755 models /models
# NumPy's OpenBLAS would start a thread per core in every process, up to 64, and multiplies nothing here.
ENV PATH=/opt/hessquik/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    OPENBLAS_NUM_THREADS=1 \
    TRITON_STORE_BINARY_ONLY=1 \
    HESSQUIK_DEVICE=${TARGET} \
    HESSQUIK_HOST=0.0.0.0 \
    HESSQUIK_PORT=8000 \
    HESSQUIK_MODELS=/models
USER 10001:10001
EXPOSE 8000
# The service drains for up to 20 s (HESSQUIK_DRAIN_S): whoever stops the container waits 30 s before killing it.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=600s --retries=3 \
    CMD ["python", "-m", "hessquik_service.healthcheck"]
ENTRYPOINT ["hessquik"]
CMD ["serve"]
