# The service alone: no torch, no vLLM, no trainer. From the clone's root: docker build -f deploy/service.Dockerfile .
FROM python:3.12-slim AS packages
COPY requirements/service.txt /
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir --no-deps --require-hashes -r /service.txt

FROM python:3.12-slim
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin ratchet \
    && install -d -o ratchet -g ratchet /state \
    && printf '#!/bin/sh\nexec python -m service.cli "$@"\n' >/usr/local/bin/ratchet && chmod 755 /usr/local/bin/ratchet
COPY --from=packages /venv /venv
COPY migrations /app/migrations
COPY service /app/service
ENV PATH=/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 10001:10001
EXPOSE 8000
HEALTHCHECK CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
CMD ["python", "-m", "service"]
