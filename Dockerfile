# The daemon in a container: docs/deploy.md says how to build and run it.
#
# The base is pinned to a Python minor version and a Debian release, so that a rebuild brings their security fixes.
# For builds on the same base each time pin its digest too, as your registry shows it
# (`docker buildx imagetools inspect python:3.11-slim-bookworm`):
#   --build-arg BASE=python:3.11-slim-bookworm@sha256:...
ARG BASE=python:3.11-slim-bookworm

# What the other stages install, and nothing else of pyproject.toml and constraints.txt: when a tool of the developers
# changes, this stage writes the same files again, and the stages below are taken from the cache.
FROM ${BASE} AS requirements
WORKDIR /requirements
COPY pyproject.toml constraints.txt scripts/image_requirements.py ./
RUN python3 image_requirements.py out

# pip works from outside: the environment that is shipped has none.
FROM ${BASE} AS tools
RUN python3 -m venv /opt/pip

# The compiled search. The compiler weighs 100 MB and takes a minute, so a change of Python does not reach this stage.
FROM tools AS search
# Where pip looks for wheels beside its index: a page that lists links, or a folder that is mounted into the build.
ARG PIP_FIND_LINKS=
# 1: pip looks nowhere else.
ARG PIP_NO_INDEX=
WORKDIR /build
COPY --from=requirements /requirements/out/build ./
RUN /opt/pip/bin/pip install --no-compile --no-cache-dir --only-binary :all: -c constraints.txt -r requirements.txt
COPY hatch_build.py ./
COPY server/vqserve_server/search/native/*.[ch] server/vqserve_server/search/native/
RUN /opt/pip/bin/python hatch_build.py /build/libsearch.so

# The kernels of the search on NVIDIA's GPUs. Triton compiles them without a GPU, and stays here: the image has no use for
# it. Where it has no wheel the image has no kernels.
FROM tools AS kernels
ARG PIP_FIND_LINKS=
ARG PIP_NO_INDEX=
WORKDIR /build
COPY --from=requirements /requirements/out/kernels ./
RUN /opt/pip/bin/pip install --no-compile --no-cache-dir --only-binary :all: -c constraints.txt -r requirements.txt
COPY server/vqserve_server/search/cuda/cubins.py server/vqserve_server/search/cuda/kernels.py \
    server/vqserve_server/search/cuda/variants.py vqserve_server/search/cuda/
RUN mkdir compiled \
    && if /opt/pip/bin/pip show --quiet triton; then \
        /opt/pip/bin/python -m vqserve_server.search.cuda.cubins compiled; fi

# The wheel, unpacked where it can be laid over the environment. pip's own .pyc files would hold times; these hold
# hashes, so that two builds are equal.
FROM search AS project
# The time of the files in the wheel.
ARG SOURCE_DATE_EPOCH=
COPY . .
COPY --from=kernels /build/compiled /kernels
RUN python3 -m venv --without-pip /opt/vqserve \
    && VQSERVE_LIBSEARCH=/build/libsearch.so VQSERVE_KERNELS=/kernels /opt/pip/bin/pip wheel --no-deps --no-build-isolation -w dist . \
    && /opt/pip/bin/pip --python /opt/vqserve/bin/python install --no-compile --no-deps --prefix /project dist/*.whl \
    && python3 -m compileall -q --invalidation-mode unchecked-hash -s /project -p /opt/vqserve /project/lib

FROM ${BASE} AS runtime
ARG PIP_FIND_LINKS=
ARG PIP_NO_INDEX=
# The NVIDIA variables are read by its container runtime and by nothing else.
ENV PATH=/opt/vqserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# A number, so that Kubernetes can verify runAsNonRoot. Caches go to /tmp, the one place that may be writable. useradd
# would write the day, too.
RUN echo 'vqserve:x:10001:' >> /etc/group \
    && echo 'vqserve:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd
# Everything but our own code. It changes seldom and weighs gigabytes, so it is a layer of its own, made here and not
# copied: a change of the code neither installs, copies nor pushes it again. There is no compiler, so what has no wheel
# fails by name instead of halfway through a build of its own.
COPY --from=requirements /requirements/out/runtime /opt/vqserve/
RUN --mount=type=bind,from=tools,source=/opt/pip,target=/opt/pip \
    cd /opt/vqserve && python3 -m venv --without-pip . \
    && /opt/pip/bin/pip --python bin/python install --no-compile --no-cache-dir --only-binary :all: \
        --root-user-action ignore -c constraints.txt -r requirements.txt \
    && /opt/pip/bin/pip --python bin/python check \
    # torch's wheel for CUDA asks for it, and uses it for torch.compile alone. It weighs 690 MB.
    && /opt/pip/bin/pip --python bin/python uninstall --yes --root-user-action ignore triton \
    # torch has a file in the syntax of a newer Python: like pip, go on without it.
    && { python3 -m compileall -qq -j 0 --invalidation-mode unchecked-hash lib || true; }
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
# After the settings, so that a change of the code makes no other layer again.
COPY --from=project /project /opt/vqserve

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
