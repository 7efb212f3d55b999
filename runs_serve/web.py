"""The model behind an address: which page answers what, and who may ask. The protocol's forms are in protocol.py.

    GET  /                        a page to write with the model, and to watch the engine at work
    GET  /v1/models               what there is
    POST /v1/completions          /v1/chat/completions: a decoder writes
    POST /v1/embeddings           an encoder turns texts into vectors
    GET  /health  /metrics        for those who run the server
    GET  /info  /live             for the page at /

Nothing here waits for the model: a request becomes token ids, goes to the model's thread (model_thread.py),
and what comes back is put into words and sent. A client that goes away is noticed by a task that does nothing
but listen for that, and its texts end before the next step.

Proof: tests/test_app.py.
"""

import asyncio
import contextlib
import json
import random
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from models.utils.errors import UserError
from models.utils.sampling import Sampling
from runs_ar.chat import end_of_turn_ids
from runs_ar.generate import check_prompts
from runs_serve import protocol
from runs_serve.gate import Gate
from runs_serve.metrics import Metrics
from runs_serve.model_thread import ModelThread
from runs_serve.protocol import Answer, ChatRequest, CompletionRequest, EmbeddingRequest, Refused
from runs_serve.request import ERROR, Request as EngineRequest

PAGE = Path(__file__).parent / "page"
PAGE_FILES = ("page.html", "page.css", "writing.js", "picture.js")
# What the page may load: its own files, from here, and nothing else.
PAGE_HEADERS = {"Content-Security-Policy": "default-src 'self'; img-src data:", "Cache-Control": "no-cache"}
