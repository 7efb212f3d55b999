"""The model behind an address: which page answers what.

    GET  /                      a page to write with the model, and to watch the engine at work
    GET  /v1/models             what there is
    POST /v1/completions, /v1/chat/completions       a decoder writes
    POST /v1/embeddings         an encoder makes vectors of texts
    GET  /health, /metrics      for those who run the server
    GET  /info, /live           for the page at /

Nothing here waits for the model: a request becomes token ids (writing.py), goes to the model's thread
(model_thread.py), and what comes back is put into words and sent. A client that goes away is noticed by a
task that does nothing but listen for that, and its texts end before the next step.

Proof: tests/test_app.py.
"""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from models.utils.errors import UserError
from runs_serve.gate import LOCAL_HOSTS, Gate
from runs_serve.metrics import Metrics
from runs_serve.model_thread import ModelThread
from runs_serve.protocol import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Refused,
    embeddings,
    refusal_of,
)
from runs_serve.writing import Reply

PAGE = Path(__file__).parent / "page"
# The page loads its own files, from here, and nothing else.
PAGE_HEADERS = {"Content-Security-Policy": "default-src 'self'; img-src data:", "Cache-Control": "no-cache"}
FULL = "so many texts are being written or wait already; try again in a moment"


class Service:
    """What every model has behind its address. info: what /info tells the page."""

    def __init__(self, name, info, most_open=64, api_key=None, is_local=True, max_body=2**20):
        """most_open: texts at once, those that wait included. is_local: no other machine gets here."""
        self.name, self.most_open, self.metrics = name, most_open, Metrics()
        self.info = {"model": name, "needs_key": api_key is not None, **info}
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=self.lifespan)
        for method, path, endpoint in self.routes():
            app.add_api_route(path, endpoint, methods=[method], response_model=None)
        for file in PAGE.iterdir():
            app.add_api_route(f"/{file.name}", partial(page_file, file), response_model=None)
        for error, answer in HANDLERS.items():
            app.add_exception_handler(error, answer)
        endpoints = {path for _, path, _ in self.routes()}
        limits = {"api_key": api_key, "hosts": LOCAL_HOSTS if is_local else None, "max_body": max_body}
        app.add_middleware(Gate, endpoints=endpoints, count=self.count, **limits)
        self.app = app

    def routes(self):
        yield "GET", "/", partial(page_file, PAGE / "page.html")
        yield "GET", "/v1/models", self.models
        yield "GET", "/v1/models/{name:path}", self.model
        yield "GET", "/health", self.health
        yield "GET", "/metrics", self.show_metrics
        yield "GET", "/info", self.tell
        for path in "/v1/completions", "/v1/chat/completions", "/v1/embeddings":
            if path not in self.offers:
                yield "POST", path, self.is_of_another_kind

    @asynccontextmanager
    async def lifespan(self, app):
        await self.start()
        yield
        await self.stop()

    def count(self, endpoint, status):
        self.metrics.answers[endpoint, status] += 1

    async def models(self):
        return {"object": "list", "data": [self.card()]}

    async def model(self, name: str):
        self.check_name(name)
        return self.card()

    def card(self):
        return {"id": self.name, "object": "model", "created": STARTED, "owned_by": "annotated-model-zoo"}

    def check_name(self, name):
        if name != self.name:
            message = f"there is no model {name!r} here; this server has {self.name!r}"
            raise Refused(message, 404, param="model", code="model_not_found")

    def check_queue(self, num_open, num_new):
        if num_open + num_new > self.most_open:
            raise Refused(f"{num_open} texts: {FULL}", 429, code="queue_full", kind="rate_limit_error")

    async def health(self):
        return {"status": "ok"}

    async def show_metrics(self):
        return PlainTextResponse(self.metrics.text(self.statistics()), media_type="text/plain; version=0.0.4")

    async def tell(self):
        return self.info

    async def is_of_another_kind(self):
        raise Refused(f"{self.name} {self.does}; this server has {' and '.join(self.offers)}", 404)


STARTED = int(time.time())


class DecoderService(Service):
    """A model that writes."""

    offers = ("/v1/completions", "/v1/chat/completions")
    does = "writes"

    def __init__(self, engine, writer, pace=None, **options):
        self.engine, self.writer, self.pace = engine, writer, pace
        super().__init__(**options)
        self.thread = ModelThread(engine, self.metrics, pace)
        self.start, self.stop, self.stop_watching = (
            self.thread.start,
            self.thread.stop,
            self.thread.stop_watching,
        )

    def routes(self):
        yield from super().routes()
        yield "POST", "/v1/completions", self.completions
        yield "POST", "/v1/chat/completions", self.chat
        yield "GET", "/live", self.live

    def statistics(self):
        return self.engine.statistics()

    async def completions(self, asked: CompletionRequest, request: Request):
        return await self.write(asked, request)

    async def chat(self, asked: ChatRequest, request: Request):
        return await self.write(asked, request)

    async def write(self, asked, request):
        self.check_name(asked.model)
        # Cutting a text into tokens takes a while, and a template may take longer.
        requests = await asyncio.to_thread(self.writer.requests, asked)
        self.check_queue(self.thread.num_open, sum(each.num_choices for each in requests))
        stream = await self.thread.submit(requests)
        listener = asyncio.create_task(cancel_when_gone(request, stream))
        reply = Reply(asked, self.writer, stream, self.name)
        if asked.stream:
            return StreamingResponse(sent(reply, listener), media_type="text/event-stream")
        try:
            return JSONResponse(await reply.whole())
        finally:
            listener.cancel()

    async def live(self):
        return StreamingResponse(self.pictures(), media_type="text/event-stream")

    async def pictures(self):
        watcher = self.thread.watch()
        try:
            while (picture := await watcher.get()) is not None:
                yield f"data: {json.dumps(picture, separators=(',', ':'))}\n\n"
        finally:
            self.thread.watchers.discard(watcher)


class EncoderService(Service):
    """A model that makes vectors. embed: lists of token ids -> their vectors, in the model's thread."""

    offers = ("/v1/embeddings",)
    does = "reads, it does not write"

    def __init__(self, embedder, **options):
        super().__init__(**options)
        self.embedder, self.num_open = embedder, 0
        self.thread = ThreadPoolExecutor(1, "model")

    def routes(self):
        yield from super().routes()
        yield "POST", "/v1/embeddings", self.embeddings

    def statistics(self):
        return None

    async def start(self):
        pass

    def stop_watching(self):
        pass

    async def stop(self):
        self.thread.shutdown(wait=False, cancel_futures=True)

    async def embeddings(self, asked: EmbeddingRequest):
        self.check_name(asked.model)
        texts = await asyncio.to_thread(self.embedder.encode, asked.input)
        self.check_queue(self.num_open, 1)
        self.num_open += 1
        try:
            vectors = await asyncio.get_running_loop().run_in_executor(
                self.thread, self.embedder.vectors, texts
            )
        finally:
            self.num_open -= 1
        return JSONResponse(embeddings(self.name, vectors, sum(map(len, texts)), asked.encoding_format))


# One request ------------------------------------------------------------------------------------------------


async def cancel_when_gone(request, stream):
    while (await request.receive())["type"] != "http.disconnect":
        pass
    stream.cancel()


async def sent(reply, listener):
    """The chunks of a reply as server-sent events; what goes wrong now is one more of them."""
    try:
        async for chunk in reply.chunks():
            yield event_of(chunk)
        yield "data: [DONE]\n\n"
    except Refused as refused:
        yield event_of(refused.body)
    finally:
        listener.cancel()
        reply.stream.cancel()


def event_of(value):
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def page_file(path):
    return FileResponse(path, headers=PAGE_HEADERS)


# Errors in the protocol's form ------------------------------------------------------------------------------


async def answer_refused(request, error):
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body, error.status, headers)


async def answer_user_error(request, error):
    return await answer_refused(request, Refused(str(error)))


async def answer_invalid(request, error):
    return await answer_refused(request, refusal_of(error.errors()))


async def answer_http(request, error):
    """No such page, no such method, no JSON."""
    return await answer_refused(request, Refused(f"{request.url.path}: {error.detail}", error.status_code))


async def answer_fault(request, error):
    return await answer_refused(
        request, Refused("the server failed; its log says how", 500, kind="server_error")
    )


HANDLERS = {
    Refused: answer_refused,
    UserError: answer_user_error,
    RequestValidationError: answer_invalid,
    HTTPException: answer_http,
    Exception: answer_fault,
}
