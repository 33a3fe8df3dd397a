# syntax=docker/dockerfile:1

# Images are named by tags. Who needs the very same bytes again puts digests in their place:
#   docker build --build-arg BUILDER=rust@sha256:... --build-arg RUNTIME=gcr.io/distroless/cc-debian12@sha256:... .
# Both are Debian 12: the program finds the C library that it was built with.
ARG BUILDER=rust:1.95-slim-bookworm
ARG RUNTIME=gcr.io/distroless/cc-debian12:nonroot

FROM ${BUILDER} AS build
WORKDIR /src
COPY . .
# Crates as Cargo.lock has them. The caches make the next build short and are no part of an image.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/src/target,sharing=locked \
    cargo build --release --locked --bin session-broker \
    && install -D -m 0555 target/release/session-broker /out/session-broker

# Distroless: the C library, libgcc, root certificates and time zones, and no shell or package manager for whoever gets in
# to use, or for anybody to keep patched.
FROM ${RUNTIME}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="session-broker" \
      org.opencontainers.image.description="A gRPC session broker for PostgreSQL" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /out/session-broker /usr/local/bin/session-broker
# As a number, which Kubernetes needs to see that it is not root.
USER 65532:65532
EXPOSE 50051 9090
ENTRYPOINT ["/usr/local/bin/session-broker"]
CMD ["serve", "--config", "/etc/session-broker/broker.toml"]
