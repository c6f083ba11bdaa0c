# The HTTP API: no torch, no model. Build from the root of the repository:
#   docker build -f docker/api.Dockerfile -t lowbit-api .
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY service service
COPY models/__init__.py models/base.py models/
COPY quant_runtime/__init__.py quant_runtime/
RUN python -m venv /app && /app/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt .

FROM ${BASE}
RUN useradd --uid 10001 --create-home lowbit && install -d -o lowbit -g lowbit /data
COPY --from=build /app /app
ENV PATH=/app/bin:$PATH LOWBIT_HOST=0.0.0.0 LOWBIT_DATA=/data LOWBIT_ARTIFACTS=/artifacts
USER 10001
WORKDIR /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s CMD ["python", "-c", \
  "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=3)"]
ENTRYPOINT ["lowbit"]
CMD ["api"]
