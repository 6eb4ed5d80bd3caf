# The service: API, migrations, keys, imports. Build from the repository's root:
#   docker build --file docker/service.Dockerfile --tag shortlist .
# Ranking needs no GPU. On a plain Linux host pip chooses a CUDA build of torch; pass an index of CPU wheels with
# --build-arg PIP_EXTRA_INDEX_URL=… to save about 3 GB.
FROM python:3.11-slim

ARG PIP_EXTRA_INDEX_URL
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /srv/shortlist
COPY pyproject.toml constraints.txt README.md LICENSE alembic.ini ./
COPY ml ml
COPY app app
COPY alembic alembic
RUN pip install --constraint constraints.txt --editable '.[service,s3,retrieval]' \
    && useradd --system --create-home shortlist \
    && install --directory --owner shortlist data
USER shortlist

ENV SHORTLIST_HOST=0.0.0.0 SHORTLIST_DATA_DIR=/srv/shortlist/data SHORTLIST_LOG_FORMAT=json SHORTLIST_EMBEDDED_WORKER=false
VOLUME /srv/shortlist/data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
CMD ["shortlist", "serve"]
