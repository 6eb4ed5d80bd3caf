# Training: claims runs from the database (`shortlist worker`) or works offline (`python -m ml …`), on a GPU when the
# container is given one. Build from the repository's root:
#   docker build --file docker/training.Dockerfile --tag shortlist-training .
# torch's wheels carry the CUDA libraries; the host needs only the driver and the container toolkit.
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /srv/shortlist
COPY pyproject.toml constraints.txt README.md LICENSE alembic.ini ./
COPY ml ml
COPY app app
COPY alembic alembic
RUN pip install --constraint constraints.txt --editable '.[service,s3,retrieval,tune]' \
    && useradd --system --create-home shortlist \
    && install --directory --owner shortlist data
USER shortlist

ENV SHORTLIST_DATA_DIR=/srv/shortlist/data SHORTLIST_LOG_FORMAT=json
VOLUME /srv/shortlist/data
CMD ["shortlist", "worker"]
