"""A real local server that judges: well at some of its addresses, and in every wrong way at the others."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse
from PIL import Image


def make_app() -> FastAPI:
    app = FastAPI()
    seen: list[dict[str, Any]] = []  # what the address /words was asked

    @app.post("/brightness")
    async def brightness(body: dict[str, Any]) -> dict[str, Any]:
        assert body["media"] == "image"
        pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in body["completions"]]
        return {"scores": [float(np.asarray(picture, np.float64).mean()) for picture in pictures]}

    @app.post("/words")
    async def words(body: dict[str, Any], request: Request) -> dict[str, Any]:
        seen.append({**body, "authorization": request.headers.get("authorization")})
        texts = [text[0]["content"] if isinstance(text, list) else text for text in body["completions"]]
        return {"scores": [float(len(text.split())) if text else None for text in texts]}

    @app.get("/seen")
    async def told() -> list[dict[str, Any]]:
        return seen

    @app.post("/nan")
    async def nan(body: dict[str, Any]) -> Response:
        return Response('{"scores": [' + ", ".join(["NaN"] * len(body["completions"])) + "]}")

    @app.post("/short")
    async def short(body: dict[str, Any]) -> dict[str, Any]:
        return {"scores": [1.0] * (len(body["completions"]) - 1)}

    @app.post("/strings")
    async def strings(body: dict[str, Any]) -> dict[str, Any]:
        return {"scores": ["good"] * len(body["completions"])}

    @app.post("/html")
    async def html() -> Response:
        return HTMLResponse("<html>It works!</html>")

    @app.post("/500")
    async def broken() -> Response:
        return Response("out of\nmemory", status_code=500)

    @app.post("/unknown")
    async def unknown(request: Request) -> Response:
        return Response(f"do not know {request.headers.get('authorization')}", status_code=401)

    @app.post("/elsewhere")
    async def elsewhere() -> Response:
        return RedirectResponse("/words", status_code=307)

    @app.post("/empty")
    async def empty() -> dict[str, Any]:
        return {}

    @app.post("/endless")
    async def endless() -> StreamingResponse:
        return StreamingResponse(b" " * 2**16 for _ in range(2**16))  # 4 GiB

    @app.post("/bomb")
    async def bomb() -> Response:
        return Response(gzip.compress(b" " * 2**28), headers={"content-encoding": "gzip"})

    @app.post("/slow")
    async def slow(body: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(20)
        return {"scores": [1.0] * len(body["completions"])}

    return app


@contextlib.contextmanager
def judging() -> Iterator[str]:
    """The address of the server while the block runs; it listens on this machine alone."""
    config = uvicorn.Config(
        make_app(), host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=0, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
