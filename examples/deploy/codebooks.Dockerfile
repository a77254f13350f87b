# docker build -f codebooks.Dockerfile -t registry.example/codebooks:1 books
# The codebook files of the folder `books` as an image: Kubernetes copies them from it, or mounts it.
# On the server's image, so that the nodes have all layers but the last; for a mount alone --build-arg BASE=scratch will do.
ARG BASE=vqserve
FROM ${BASE}
COPY . /codebooks/
