# The server and its bundled model, offline and without root.
#
#     docker build -t tocom-serve .                                  # for processors
#     docker build -t tocom-serve:cuda --build-arg TORCH=cu128 .     # for NVIDIA GPUs
#     docker build -t tocom-serve --build-arg TORCH= .               # with no index but the usual one
#     docker build -t tocom-serve:ray --build-arg EXTRAS=openvino,otel,ray .  # with extras of pyproject.toml
#     docker run --rm -p 8000:8000 [--gpus all] tocom-serve

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build

# The build of torch by uv's name, from an index of torch's own; none: the usual index's default
# wheel. CUDA's libraries come inside the wheels, so one base image serves both; the host brings the
# driver.
ARG TORCH=cpu
# Extras of pyproject.toml, with commas between them: openvino compiles forwards for processors,
# otel sends traces, ray is for `server.ray`.
ARG EXTRAS=openvino

RUN pip install --no-cache-dir 'uv>=0.7' && uv venv /opt/tocom
ENV VIRTUAL_ENV=/opt/tocom \
    UV_NO_CACHE=1 \
    UV_COMPILE_BYTECODE=1

WORKDIR /src
# Dependencies first: they change rarely, and torch is most of the image.
COPY pyproject.toml ./
# uv takes one extra an option.
RUN uv pip install ${TORCH:+--torch-backend "${TORCH}"} --requirements pyproject.toml \
    $(echo "${EXTRAS}" | sed 's/^./--extra &/; s/,/ --extra /g')
COPY . .
RUN uv pip install --no-deps .


FROM python:${PYTHON}-slim

# Nothing belongs to this user but its home, where a cache of other models may be mounted.
RUN useradd --create-home --uid 10001 tocom
COPY --from=build /opt/tocom /opt/tocom

ENV PATH=/opt/tocom/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    TOCOM_HOST=0.0.0.0 \
    TOCOM_PORT=8000

# By number: Kubernetes cannot tell that a name is not root.
USER 10001
WORKDIR /home/tocom
EXPOSE 8000

# Readiness, not mere life: it also tells when the model has been loaded.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['TOCOM_PORT']}/readyz\", timeout=4)"]

# The exec form makes the server PID 1: it gets SIGTERM itself and drains.
ENTRYPOINT ["tocom-serve"]
