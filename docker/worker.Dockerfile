# A worker. As it stands it serves from the CPU or, where the host has the NVIDIA container toolkit, from a GPU: the torch of
# PyPI brings CUDA with it. For a CPU-only image a tenth of the size:
#   docker build -f docker/worker.Dockerfile --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t lowbit-worker .
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX=https://pypi.org/simple
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /app && /app/bin/pip install --no-cache-dir --disable-pip-version-check \
  --index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY service service
COPY models models
COPY quant_runtime quant_runtime
RUN /app/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ".[worker]"

FROM ${BASE}
# Triton compiles the launcher of each kernel with the C compiler it finds.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
  && useradd --uid 10001 --create-home lowbit && install -d -o lowbit -g lowbit /data
COPY --from=build /app /app
ENV PATH=/app/bin:$PATH LOWBIT_DATA=/data LOWBIT_ARTIFACTS=/artifacts LOWBIT_METRICS_HOST=0.0.0.0 LOWBIT_METRICS_PORT=9100
USER 10001
WORKDIR /data
EXPOSE 9100
# Healthy is a worker whose loop still tells the queue that it lives, and that has something to run: not one whose
# self-test has refused all its artifacts.
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s CMD ["python", "-c", \
  "import re, urllib.request; \
text = urllib.request.urlopen('http://127.0.0.1:9100/metrics', timeout=5).read().decode(); \
alive = float(re.search(r'^lowbit_worker_beat_age_seconds (\\S+)', text, re.M)[1]) < 60; \
raise SystemExit(not alive or 'lowbit_worker_state{state=\"refused\"} 1.0' in text)"]
ENTRYPOINT ["lowbit"]
CMD ["worker"]
