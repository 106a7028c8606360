# The image that ./dev image makes, for those who have a container engine: docker build -t registry.example/sluice:0.1.0 .
# Debian 12, whose nft and iptables it has; BASE is for mirrors.
ARG BASE=docker.io/library/debian:12
FROM ${BASE} AS build
COPY . /src
RUN /src/dev image --root /image

FROM scratch
COPY --from=build /image/ /
ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin
CMD ["/usr/local/bin/sluiced"]
