# Engine, trainer and preparation: torch and vLLM, for the CPU or for NVIDIA GPUs. From the clone's root:
# docker build -f deploy/worker.Dockerfile --build-arg BUILD=cpu .
FROM python:3.12-slim
ARG BUILD=cpu
# Triton, of the GPU build, compiles its launchers where it runs.
RUN if [ "$BUILD" = gpu ]; then apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*; fi
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin ratchet \
    && install -d -o ratchet -g ratchet /state
# As deploy/setup.sh does, whose versions these are: torch for the CPU lies on an index of its own.
COPY deploy/setup.sh requirements /requirements/
RUN python -m venv /venv && torch=$(sed -n 's/^torch=//p' /requirements/setup.sh) \
    && if [ "$BUILD" = cpu ]; then /venv/bin/pip install --no-cache-dir --no-deps \
        --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"; fi \
    && /venv/bin/pip install --no-cache-dir --no-deps -r "/requirements/$BUILD.txt"
COPY migrations /app/migrations
COPY service /app/service
COPY trainer /app/trainer
ENV PATH=/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 10001:10001
CMD ["python", "-m", "service.cli", "--help"]
