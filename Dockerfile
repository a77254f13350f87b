# The daemon in a container: docs/deploy.md says how to build and run it.
#
# The base is pinned to a Python minor version and a Debian release, so that a rebuild brings their security fixes.
# For builds on the same base each time pin its digest too, as your registry shows it
# (`docker buildx imagetools inspect python:3.11-slim-bookworm`):
#   --build-arg BASE=python:3.11-slim-bookworm@sha256:...
ARG BASE=python:3.11-slim-bookworm

# Everything but our own code. It changes seldom and weighs gigabytes, so it is a layer of its own: a change of the
# code neither installs nor pushes it again.
FROM ${BASE} AS dependencies
# Where pip looks for wheels beside its index: a page that lists links, or a folder that is mounted into the build.
ARG PIP_FIND_LINKS=
# There is no compiler here, so what has no wheel fails by name instead of halfway through a build of its own.
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_ONLY_BINARY=:all:
WORKDIR /build
# pip works from outside: the environment that is shipped has none.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/vqserve
COPY pyproject.toml constraints.txt ./
RUN python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*project['dependencies'], *project['optional-dependencies']['server'], sep='\n')" > requirements.txt \
    && /opt/pip/bin/pip --python /opt/vqserve/bin/python install -c constraints.txt -r requirements.txt

# The wheel, unpacked where it can be laid over the environment.
FROM dependencies AS project
COPY . .
RUN /opt/pip/bin/pip wheel --no-deps -w dist . \
    && /opt/pip/bin/pip --python /opt/vqserve/bin/python install --no-deps --prefix /project dist/*.whl \
    && cp -a /project/. /opt/vqserve/ \
    && /opt/pip/bin/pip --python /opt/vqserve/bin/python check

FROM ${BASE} AS runtime
# A number, so that Kubernetes can verify runAsNonRoot. Caches go to /tmp, the one place that may be writable.
RUN groupadd --gid 10001 vqserve \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp --shell /usr/sbin/nologin vqserve
COPY --from=dependencies /opt/vqserve /opt/vqserve
COPY --from=project /project /opt/vqserve
# The NVIDIA variables are read by its container runtime and by nothing else.
ENV PATH=/opt/vqserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /
USER 10001:10001
EXPOSE 50051
STOPSIGNAL SIGTERM
# The port is bound only when every codebook is loaded and warm: until then this fails, and --start-period forgives it.
# The command gives up before the engine does, so that the health log says why.
HEALTHCHECK --interval=30s --timeout=10s --start-period=300s --retries=3 CMD ["vqserve", "status", "--quiet", "--timeout", "5"]
# Without arguments: the demo codebook, reachable through `-p`. Arguments replace all of CMD: a command that is given in
# its place must contain the address too. --insecure: the connections are not encrypted (docs/security.md says how to).
ENTRYPOINT ["vqserved"]
CMD ["serve", "--host", "0.0.0.0", "--insecure"]

# Last, since they differ in every build.
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="vqserve" \
      org.opencontainers.image.description="Exact vector-quantizer tokens over gRPC: latents to indices and back" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/vqserve/vqserve" \
      org.opencontainers.image.documentation="https://github.com/vqserve/vqserve/tree/main/docs" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
