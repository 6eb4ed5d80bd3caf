"""The yardstick of benchmarks/serving.py: FastAPI with one empty endpoint and no middleware."""

import sys

import uvicorn
from fastapi import FastAPI

app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


@app.get("/")
async def get() -> dict[str, str]:
    return {}


@app.post("/")
async def post() -> dict[str, str]:
    return {}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_config=None, access_log=False, server_header=False)
