"""The proof of app.py: OpenAI's own client, unmodified, against a server in a process of its own.

What a text should be, `transformers` says; what a client may send, the types of the `openai` package.
"""

import asyncio
import base64
import http.client
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import openai
import pytest
import torch
import transformers
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params

import app
from models import load_model
from models.utils.errors import UserError
from runs_ar.generate import TextStream
from runs_serve import protocol
from runs_serve.live import LiveEngine
from runs_serve.metrics import Metrics
from runs_serve.model_thread import ModelThread
from runs_serve.request import Request
from tests.browser import FLAGS
from tests.tiny_checkpoints import EOS, load, save_checkpoint

ROOT = Path(__file__).parent.parent
CONTEXT, BLOCK_SIZE = 192, 8
SIZES = ["--num-blocks", 96, "--block-size", BLOCK_SIZE, "--max-running", 6, "--dtype", "float32"]
CHAT = [{"role": "user", "content": "x"}]
KEY = "a key of some length"
PROMPTS = [
    "def load(folder):",
    "import json",
    "return the tokenizer of a checkpoint",
    "for name in names:\n    print(name)",
    "x",
    "A small vocabulary of its own text's pieces; other characters become bytes. " * 2,
    "Größe, 中文, 🙂",
    "{% for m in messages %}",
]


# Servers ----------------------------------------------------------------------------------------------------


class Server:
    """app.py in a process of its own, at a free port of 127.0.0.1."""

    def __init__(self, *options, api_key=None):
        environment = os.environ | ({"ZOO_API_KEY": api_key} if api_key else {})
        self.api_key = api_key or "none"
        self.process = subprocess.Popen(
            [sys.executable, "app.py", "--port", "0", "--device", "cpu", *map(str, options)],
            cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said = []
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"at http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise AssertionError("".join(self.said))
        threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True).start()
        self.name = Path(options[options.index("--checkpoint") + 1]).name
        self.address = f"http://127.0.0.1:{self.port}"
        self.client = self.new_client()

    def new_client(self, **options):
        options = {"api_key": self.api_key, "max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.address}/v1", **options)

    def complete(self, prompt, client=None, **options):
        options = {"temperature": 0, "max_tokens": 12} | options
        return (client or self.client).completions.create(model=self.name, prompt=prompt, **options)

    def send(self, method, path, body=None, **headers):
        """(status, headers, body) of a request as it stands, however wrong."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, body, kind | headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, response.headers, content

    def metrics(self):
        """{sample: value} of /metrics."""
        lines = self.send("GET", "/metrics")[2].decode().splitlines()
        return {
            name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")
        }

    def wait_until_idle(self):
        for _ in range(200):
            now = self.metrics()
            if now["zoo_running"] == now["zoo_waiting"] == 0:
                return now
            time.sleep(0.02)
        raise AssertionError("a text is still being written")

    def end(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(the oracle, our tokenizer, the folder) of a tiny Llama that chats."""
    folder = tmp_path_factory.mktemp("app") / "tiny-chat"
    oracle = save_checkpoint(folder, "llama", chat=True, max_seq_len=CONTEXT)
    return oracle, load(folder)[1], folder


@pytest.fixture(scope="module")
def server(checkpoint):
    server = Server("--checkpoint", checkpoint[2], *SIZES, "--queue", 200, "--max-tokens", 100)
    yield server
    server.end()


@pytest.fixture(scope="module")
def slow(checkpoint):
    """A server of at most 25 steps a second, where one text is written and one may wait."""
    options = ["--num-blocks", 48, "--block-size", BLOCK_SIZE, "--dtype", "float32", "--max-running", 1]
    server = Server("--checkpoint", checkpoint[2], *options, "--queue", 1, "--pace", 25)
    yield server
    server.end()


@pytest.fixture(scope="module")
def expected(checkpoint):
    """expected(prompt or token ids, count) -> (the tokens, their text) that the oracle writes greedily."""
    oracle, tokenizer, _ = checkpoint
    known = {}

    def expected(prompt, count=12):
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if (tuple(ids), count) not in known:
            given = torch.tensor([ids])
            options = {"do_sample": False, "max_new_tokens": count, "pad_token_id": EOS, "eos_token_id": EOS}
            made = oracle.generate(given, attention_mask=torch.ones_like(given), **options)
            tokens = made[0, len(ids) :].tolist()
            stream = TextStream(tokenizer, ids)
            known[tuple(ids), count] = tokens, "".join(map(stream.push, tokens)) + stream.finish()
        return known[tuple(ids), count]

    return expected


# What the client reads --------------------------------------------------------------------------------------


def test_models(server):
    assert [model.id for model in server.client.models.list()] == [server.name] == ["tiny-chat"]
    assert server.client.models.retrieve("tiny-chat").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.models.retrieve("some/other")
    assert caught.value.code == "model_not_found" and "'tiny-chat'" in caught.value.message
    assert json.loads(server.send("GET", "/health")[2]) == {"status": "ok"}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_completion_is_the_oracles(prompt, server, checkpoint, expected):
    tokens, text = expected(prompt, 20)
    done = server.complete(prompt, max_tokens=20)
    assert done.object == "text_completion" and done.choices[0].text == text
    assert done.choices[0].finish_reason == ("stop" if tokens[-1] == EOS else "length")
    assert done.usage.prompt_tokens == len(checkpoint[1].encode(prompt))
    assert done.usage.completion_tokens == len(tokens)
    chunks = list(server.complete(prompt, max_tokens=20, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == done.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1 and all(chunk.usage is None for chunk in chunks)


def test_a_chat_is_the_oracles(server, checkpoint, expected):
    messages = [{"role": "user", "content": "load a folder"}, {"role": "assistant", "content": "ok"}]
    messages += [
        {
            "role": "user",
            "content": [{"type": "text", "text": "and <|end|> "}, {"type": "text", "text": "now"}],
        }
    ]
    flat = [*messages[:2], {"role": "user", "content": "and <|end|> now"}]
    text = expected(checkpoint[1].encode_chat(flat), 20)[1].partition("<|end|>")[0]
    options = {"model": server.name, "messages": messages, "temperature": 0, "max_completion_tokens": 20}
    done = server.client.chat.completions.create(**options)
    assert done.object == "chat.completion" and done.choices[0].message.role == "assistant"
    assert done.choices[0].message.content == text
    more = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(server.client.chat.completions.create(**options, **more))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    used = chunks[-1].usage
    assert chunks[-1].choices == [] and used.completion_tokens == done.usage.completion_tokens
    # Whole blocks of the prompt were known from the answer before, but the last token is always read.
    known = (used.prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert used.prompt_tokens == done.usage.prompt_tokens > BLOCK_SIZE
    assert (used.prompt_tokens_details.cached_tokens, used.total_tokens) == (known, done.usage.total_tokens)
    assert 0 <= done.usage.prompt_tokens_details.cached_tokens <= known
    # What the client was given goes back as it is.
    again = [*messages, done.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]
    assert server.client.chat.completions.create(model=server.name, messages=again, max_tokens=3).choices


def test_several_prompts_and_token_ids(server, checkpoint, expected):
    done = server.complete(PROMPTS[:3], n=2)
    assert [choice.index for choice in done.choices] == list(range(6))
    assert [choice.text for choice in done.choices] == [expected(p)[1] for p in PROMPTS[:3] for _ in "ab"]
    ids = checkpoint[1].encode(PROMPTS[0])
    assert server.complete(ids).choices[0].text == expected(ids)[1]
    texts = [""] * 2
    for chunk in server.complete([ids, checkpoint[1].encode(PROMPTS[1])], stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [expected(p)[1] for p in PROMPTS[:2]]


def test_echo_and_stop(server, expected):
    prompt, text = PROMPTS[0], expected(PROMPTS[0], 20)[1]
    assert server.complete(prompt, max_tokens=20, echo=True).choices[0].text == prompt + text
    echoed = server.complete(prompt, max_tokens=20, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in echoed) == prompt + text
    stop = text[5:8]
    done = server.complete(prompt, max_tokens=20, stop=["not to be found", stop]).choices[0]
    assert done.text == text[: text.index(stop)] and done.finish_reason == "stop"
    chunks = list(server.complete(prompt, max_tokens=20, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == done.text


def test_a_seed_means_the_same_text(server):
    def sampled(**options):
        done = server.complete(PROMPTS[0], max_tokens=16, temperature=1.5, **options)
        return [choice.text for choice in done.choices]

    three = sampled(n=3, seed=7)
    assert len(set(three)) == 3 and three == sampled(n=3, seed=7)
    assert three == [sampled(seed=seed)[0] for seed in (7, 8, 9)], "choice c draws as seed + c"
    assert sampled() != sampled(), "without a seed a new one each time"
    narrow = (
        sampled(seed=7, extra_body={"top_k": 1}),
        sampled(seed=8, top_p=0),
        sampled(extra_body={"min_p": 1}),
    )
    assert len(set(map(tuple, narrow))) == 1, "only the most probable token is left"


def test_probabilities_are_the_oracles(server, checkpoint, expected):
    oracle, tokenizer, _ = checkpoint
    prompt = PROMPTS[1]
    ids, (tokens, text) = tokenizer.encode(prompt), expected(PROMPTS[1])
    assert EOS not in tokens
    with torch.no_grad():
        logits = oracle(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    logprobs = logits.log_softmax(dim=-1)
    wanted = logprobs[range(len(tokens)), tokens].tolist()

    said = server.complete(prompt, logprobs=4).choices[0].logprobs
    assert said.token_logprobs == pytest.approx(wanted, abs=1e-4)
    assert "".join(said.tokens) == text and said.text_offset[:2] == [0, len(said.tokens[0])]
    for row, top in zip(logprobs, said.top_logprobs):
        # By their text, which several tokens may have.
        assert max(top.values()) == pytest.approx(row.max().item(), abs=1e-4) and len(top) <= 5
    streamed = list(server.complete(prompt, logprobs=4, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    for name in ("tokens", "text_offset"):
        assert [each for part in parts for each in getattr(part, name)] == getattr(said, name)
    flat = [each for part in parts for each in part.token_logprobs]
    assert flat == pytest.approx(said.token_logprobs, abs=1e-4)
    assert [set(top) for part in parts for top in part.top_logprobs] == [
        set(top) for top in said.top_logprobs
    ]

    ids = tokenizer.encode_chat(CHAT)
    with torch.no_grad():
        wanted = oracle(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1).topk(6)
    options = {"logprobs": True, "top_logprobs": 6, "temperature": 0, "max_tokens": 3}
    done = server.client.chat.completions.create(model=server.name, messages=CHAT, **options)
    first = done.choices[0].logprobs.content[0]
    assert first.logprob == first.top_logprobs[0].logprob and bytes(first.bytes).decode() == first.token
    assert [top.logprob for top in first.top_logprobs] == pytest.approx(wanted.values.tolist(), abs=1e-4)
    shown = [bytes(top.bytes) for top in first.top_logprobs if top.bytes is not None]
    assert shown == [each for each in map(tokenizer.token_bytes, wanted.indices.tolist()) if each is not None]


# Vectors ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    server = Server("--checkpoint", "tiny-bert-python", "--dtype", "float32", api_key=KEY)
    yield server
    server.end()


def test_embeddings_are_the_oracles(encoder):
    folder = ROOT / "checkpoints/tiny-bert-python"
    oracle = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    cut = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["Return the length of the list.", "x", "How many items are there in this long list of items?"]
    batch = cut(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = oracle(**batch).last_hidden_state
    means = [row[mask.bool()].mean(dim=0) for row, mask in zip(states, batch["attention_mask"])]
    wanted = torch.nn.functional.normalize(torch.stack(means), dim=-1)
    # The client asks for base64 unless told otherwise.
    made = encoder.client.embeddings.create(model=encoder.name, input=texts)
    assert torch.allclose(torch.tensor([each.embedding for each in made.data]), wanted, atol=1e-5)
    assert made.usage.prompt_tokens == batch["attention_mask"].sum()
    floats = encoder.client.embeddings.create(model=encoder.name, input=texts[0], encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(wanted[0].tolist(), abs=1e-5)
    ids = batch["input_ids"][1][batch["attention_mask"][1].bool()].tolist()
    given = encoder.client.embeddings.create(model=encoder.name, input=ids, encoding_format="float")
    assert given.data[0].embedding == pytest.approx(wanted[1].tolist(), abs=1e-5)
    body = json.dumps({"model": encoder.name, "input": texts[0], "encoding_format": "base64"})
    key = {"Authorization": f"Bearer {KEY}"}
    raw = json.loads(encoder.send("POST", "/v1/embeddings", body, **key)[2])["data"][0]["embedding"]
    assert struct.unpack("<f", base64.b64decode(raw)[:4])[0] == pytest.approx(wanted[0][0].item(), abs=1e-5)


def test_what_a_kind_does_not_offer_is_said(encoder, server):
    with pytest.raises(openai.NotFoundError, match="does not write; this server has /v1/embeddings"):
        encoder.complete("x")
    with pytest.raises(openai.NotFoundError, match="this server has /v1/completions"):
        server.client.embeddings.create(model=server.name, input="x")
    for wrong in {"input": []}, {"input": "x", "dimensions": 4}, {"input": [[]]}, {"input": "word " * 600}:
        with pytest.raises(openai.BadRequestError):
            encoder.client.embeddings.create(model=encoder.name, **wrong)


# Bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1, 2], "x", 3]}, "prompt"),
        ({"prompt": [1, 10**9]}, None),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": ["x"] * 17}, "prompt"),
        ({"prompt": "x " * 400}, None),
        ({"prompt": "\ud800"}, None),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 17}, "n"),
        ({"prompt": ["x"] * 5, "n": 4}, None),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"logprobs": 1, "echo": True}, None),
        ({"temprature": 1}, "temprature"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"best_of": 2}, "best_of"),
        ({"messages": 7}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [7]}, "messages.0"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages"),
        ({"messages": CHAT, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": CHAT, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": CHAT, "top_logprobs": 3}, None),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_a_wrong_field_is_named(fields, param, server):
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    asked = {"model": server.name} | ({} if "messages" in fields else {"prompt": "x"}) | fields
    status, headers, content = server.send("POST", path, json.dumps(asked))
    error = json.loads(content)["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and error["param"] == param, error
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 300


DEEP = '{"model": "tiny-chat", "prompt": "x", "user": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    "method, path, body, headers, status",
    [
        ("POST", "/v1/completions", "{", {}, 400),
        ("POST", "/v1/completions", "", {}, 400),
        ("POST", "/v1/completions", "[]", {}, 400),
        ("POST", "/v1/completions", b"\xff\xfe\x00", {}, 400),
        ("POST", "/v1/completions", DEEP, {}, 400),
        ("POST", "/v1/completions", '{"prompt": "' + "x" * 10_000_000 + '"}', {}, 413),
        ("POST", "/v1/completions", '{"prompt": "x"}', {}, 400),
        ("POST", "/v1/completions", '{"model": "gpt-4", "prompt": "x"}', {}, 404),
        ("POST", "/v1/completions", '{"model": "tiny-chat"}', {"Content-Type": "text/plain"}, 400),
        ("GET", "/v1/completions", None, {}, 405),
        ("POST", "/v1/responses", "{}", {}, 404),
        ("GET", "/../app.py", None, {}, 404),
        ("GET", "/health", None, {"Host": "evil.example"}, 403),
        ("GET", "/health", None, {"Host": "evil.example:8000"}, 403),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_a_wrong_request_is_answered_in_the_protocols_form(
    method, path, body, headers, status, server, expected
):
    found, _, content = server.send(method, path, body, **headers)
    assert found == status
    assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
    assert server.complete("x").choices[0].text == expected("x")[1], "others are answered as before"


def test_every_field_of_the_client_is_used_ignored_or_refused():
    """The fields are those that the types of OpenAI's package have."""
    cases = [
        (protocol.CompletionRequest, completion_create_params.CompletionCreateParamsNonStreaming),
        (protocol.ChatRequest, chat_create_params.CompletionCreateParamsNonStreaming),
        (protocol.EmbeddingRequest, embedding_create_params.EmbeddingCreateParams),
    ]
    here = protocol.IGNORED | set(protocol.NOT_HERE)
    for ours, theirs in cases:
        fields = set(typing.get_type_hints(theirs))
        assert "model" in fields and fields <= set(ours.model_fields) | here, fields - here
        assert set(ours.model_fields) - fields <= {"top_k", "min_p"}
        assert not set(ours.model_fields) & here


def test_what_changes_nothing_may_be_sent(server, expected):
    more = {
        "user": "me",
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "best_of": 1,
        "logit_bias": {},
        "suffix": None,
    }
    assert server.complete("x", **more).choices[0].text == expected("x")[1]
    more = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "tools": [], "tool_choice": "none"}
    options = {"response_format": {"type": "text"}, "reasoning_effort": "low", "max_tokens": 2}
    assert server.client.chat.completions.create(model=server.name, messages=CHAT, **more, **options)


def test_a_readme_lists_the_fields():
    text = (ROOT / "runs_serve/README.md").read_text(encoding="utf-8")
    for name in (*protocol.IGNORED, *protocol.NOT_HERE, "top_k", "min_p"):
        assert f"`{name}`" in text, name


# Who may ask ------------------------------------------------------------------------------------------------


def test_a_key(encoder):
    for key in "wrong", KEY[:-1], KEY + "x":
        with pytest.raises(openai.AuthenticationError) as caught:
            list(encoder.new_client(api_key=key).models.list())
        assert caught.value.code == "invalid_api_key"
    assert list(encoder.client.models.list())
    for headers in {}, {"Authorization": KEY}, {"Authorization": "Bearer ä".encode()}:
        assert encoder.send("GET", "/v1/models", **headers)[0] == 401
        assert encoder.send("GET", "/metrics", **headers)[0] == 401
    assert encoder.send("GET", "/health")[0] == encoder.send("GET", "/")[0] == 200
    body = '{"prompt": "' + "x" * 10_000_000 + '"}'
    assert encoder.send("POST", "/v1/embeddings", body)[0] == 401, "before the body is looked at"


# Many at once -----------------------------------------------------------------------------------------------


def test_a_full_queue_says_so(slow):
    """One text is written, one waits, and a third is told at once; its client asks again by itself."""
    streams = [slow.complete("x", max_tokens=50, stream=True) for _ in range(2)]
    next(iter(streams[0]))
    with pytest.raises(openai.RateLimitError) as caught:
        slow.complete("x")
    assert caught.value.code == "queue_full" and caught.value.response.headers["retry-after"] == "1"
    with pytest.raises(openai.RateLimitError):
        slow.complete(["x", "y", "z"])
    for stream in streams:
        stream.close()
    patient = slow.new_client(max_retries=3)
    assert slow.complete("x", patient, max_tokens=2).choices[0].text
    slow.wait_until_idle()


def test_who_goes_away_frees_its_place_within_a_step(slow):
    for is_waiting in False, True:
        streams = [slow.complete("x", max_tokens=100, stream=True) for _ in range(1 + is_waiting)]
        next(iter(streams[0]))
        if is_waiting:
            assert slow.metrics()["zoo_waiting"] == 1
        before = slow.metrics()["zoo_steps_total"]
        for stream in reversed(streams):
            stream.close()
        after = slow.wait_until_idle()
        # One that was being made, and one that began before the closed connection was heard of.
        assert after["zoo_steps_total"] <= before + 2 and after["zoo_blocks_in_use"] == 0
    # An answer that comes as a whole, to a client that does not wait for it.
    before = slow.metrics()["zoo_steps_total"]
    with pytest.raises(openai.APITimeoutError):
        slow.complete("x", slow.new_client(timeout=0.4), max_tokens=100)
    assert slow.wait_until_idle()["zoo_steps_total"] < before + 50


def test_200_requests_of_16_clients(server, expected):
    """Whole and streamed, left in the middle and malformed: nothing lost, no wrong text, all blocks back."""
    before = server.wait_until_idle()
    wanted = {prompt: expected(prompt, 40)[1] for prompt in PROMPTS}
    left = threading.Semaphore(0)

    def one(number):
        random, prompt = Random(number), PROMPTS[number % len(PROMPTS)]
        client = clients[number % 16]
        kind = random.choice(["whole", "stream", "leave", "malformed", "sampled"])
        if kind == "malformed":
            wrong = random.choice(
                ['{"model": 7}', "{", '{"model": "x", "prompt": "x"}', '{"model":"tiny-chat","n":0}']
            )
            return kind, server.send("POST", "/v1/completions", wrong)[0] in (400, 404)
        if kind == "whole":
            return kind, server.complete(prompt, client, max_tokens=40).choices[0].text == wanted[prompt]
        if kind == "sampled":
            done = server.complete(prompt, client, max_tokens=30, temperature=1, seed=number, n=2)
            return kind, len(done.choices) == 2
        stream = server.complete(prompt, client, max_tokens=40, stream=True)
        if kind == "leave":
            text = "".join(chunk.choices[0].text for chunk, _ in zip(stream, range(random.randrange(1, 9))))
            stream.close()
            left.release()
            return kind, wanted[prompt].startswith(text)
        return kind, "".join(chunk.choices[0].text for chunk in stream) == wanted[prompt]

    clients = [server.new_client() for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(one, range(200)))
    assert len(results) == 200 and {kind for kind, _ in results} == {
        "whole",
        "stream",
        "leave",
        "malformed",
        "sampled",
    }
    assert [(number, kind) for number, (kind, right) in enumerate(results) if not right] == []
    after = server.wait_until_idle()
    assert after["zoo_blocks_in_use"] == before["zoo_blocks_in_use"] == 0
    assert after["zoo_blocks"] == 96
    assert after["zoo_tokens_found_total"] > before["zoo_tokens_found_total"]
    assert not [line for line in server.said if "Traceback" in line or "Error" in line], "".join(server.said)


def test_a_step_that_fails_ends_who_runs_and_nobody_else(checkpoint, expected, monkeypatch, capsys):
    _, tokenizer, folder = checkpoint
    engine = LiveEngine(load_model(folder), tokenizer, num_blocks=32, block_size=8, max_running=1)
    request = Request(tokenizer.encode("x"), max_new_tokens=12, num_choices=2)

    async def scenario():
        thread = ModelThread(engine, Metrics(), pace=100)
        await thread.start()
        first, waiting = await thread.submit([request]), await thread.submit([request])
        hidden = engine.model.hidden
        with monkeypatch.context() as patch:
            patch.setattr(engine.model, "hidden", lambda *arguments: 1 / 0)
            lost = [event async for _, event in first]
            patch.setattr(engine.model, "hidden", hidden)
            saved = [event async for _, event in waiting]
        later = [event async for _, event in await thread.submit([request])]
        await thread.stop()
        assert thread.num_open == 0 and not thread.streams and not thread.num_choices
        return lost, saved, later

    lost, saved, later = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert [event.finish_reason for event in lost][-2:] == ["error", "error"]
    # Who waited may have come in before the fault was over; who comes after it gets the text.
    assert saved[-1].finish_reason
    texts = ["".join(event.text for event in later if event.choice == choice) for choice in (0, 1)]
    assert texts == [expected("x")[1]] * 2
    assert later[-1].finish_reason != "error" and engine.blocks.num_in_use == 0
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_metrics_are_in_prometheus_format(server):
    """Names, labels and values by the format's grammar; histograms grow from bin to bin."""
    server.complete("x")
    status, headers, content = server.send("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    kinds, names = {}, set()
    for line in content.decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds and kind in ("counter", "gauge", "histogram")
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            found = re.fullmatch(
                r'([a-z_:][a-z0-9_:]*)(\{(?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)+\})? (\S+)', line
            )
            assert found and float(found[3]) >= 0, line
            names.add(found[1])
            family = found[1] if found[1] in kinds else found[1].rpartition("_")[0]
            assert kinds[family] != "counter" or family.endswith("_total")
    now = server.metrics()
    for name in (name for name, kind in kinds.items() if kind == "histogram"):
        assert {f"{name}_bucket", f"{name}_sum", f"{name}_count"} <= names
        bins = [value for sample, value in now.items() if sample.startswith(f"{name}_bucket")]
        assert bins == sorted(bins) and bins[-1] == now[f"{name}_count"] > 0
    assert now['zoo_answers_total{endpoint="/v1/completions",status="200"}'] > 0


# The page, in a browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver):
    """page(server) opens it; at the end nothing went wrong, and nothing came from elsewhere."""
    opened = []
    driver.get("about:blank")
    driver.get_log("browser"), driver.get_log("performance")

    def open_page(server, key=""):
        opened.append(server.address)
        driver.get(server.address)
        wait_for(driver, "return document.body.dataset.kind")
        driver.execute_script("document.querySelector('#key').value = arguments[0]", key)
        return driver

    yield open_page
    driver.get("about:blank")
    # What a server refuses, the browser notes too.
    assert [each for each in driver.get_log("browser") if "status of 400" not in each["message"]] == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith((*opened, "about:", "data:")) for url in asked), asked


def wait_for(driver, script, *arguments):
    """What a script returns, once that is something."""
    for _ in range(400):
        if found := driver.execute_script(script, *arguments):
            return found
        time.sleep(0.025)
    raise AssertionError(f"never true: {script}")


def write_on(driver, prompt, **fields):
    """Press Write, and wait for the end of the text."""
    driver.execute_script(
        "for (const [name, value] of Object.entries(arguments[1])) $('#ask').elements[name].value = value;"
        "$('#prompt').value = arguments[0]; $('#send').click()",
        prompt, fields,
    )  # fmt: skip
    return wait_for(driver, "return !running && document.querySelector('#remark').textContent")


def test_the_page_continues_and_chats(page, server, checkpoint, expected):
    driver = page(server)
    assert driver.title == "tiny-chat"
    write_on(driver, PROMPTS[0], temperature=0, max_tokens=24)
    text = "return document.querySelector('#sheet').textContent"
    assert driver.execute_script(text) == PROMPTS[0] + expected(PROMPTS[0], 24)[1]
    driver.find_element("css selector", "[data-for=chat] span").click()
    write_on(driver, "hello", temperature=0, max_tokens=24)
    turns = driver.execute_script("return all('.turn').map((turn) => turn.textContent)")
    ids = checkpoint[1].encode_chat([{"role": "user", "content": "hello"}])
    assert turns == ["hello", expected(ids, 24)[1].partition("<|end|>")[0]]
    assert write_on(driver, "x " * 300) == driver.execute_script("return $('.remark.wrong').textContent")


def test_the_page_shows_probabilities(page, server, checkpoint, expected):
    oracle, tokenizer, _ = checkpoint
    driver = page(server)
    driver.find_element("css selector", "#probabilities").click()
    write_on(driver, PROMPTS[1], temperature=0, max_tokens=16)
    assert driver.execute_script("return all('.token').length") == len(expected(PROMPTS[1], 16)[0])
    shares = (
        "$('.token').focus(); return all('#popover:not([hidden]) .choice').map((each) =>"
        " [each.className, parseFloat($('.bar', each).style.width)])"
    )
    shown = driver.execute_script(shares)
    with torch.no_grad():
        logits = oracle(torch.tensor([tokenizer.encode(PROMPTS[1])])).logits[0, -1]
    assert shown[0] == ["choice chosen", pytest.approx(100 * logits.softmax(dim=-1).max().item(), abs=0.01)]
    assert [share for _, share in shown] == sorted((share for _, share in shown), reverse=True)


def test_the_page_draws_the_engine(page, slow):
    """A text of its own: its line, its blocks, the same in the pool; Stop frees them."""
    driver = page(slow)
    driver.execute_script("$('#prompt').value = 'import json'; $('#send').click()")
    drawn = """
        const row = live?.rows.find((row) => row.stored > 24), block = (each) => Number(each.dataset.block);
        if (!row) return null;
        const squares = all(`.sequence[data-id="${row.id}"] .block`);
        const used = all('#pool .block').filter((each) => each.title.includes('#'));
        return [row, squares.map((each) => [block(each), parseFloat($('.fill', each).style.width)]),
            used.map(block), all('.step').length, all('.step .decode').length]"""
    row, squares, in_pool, num_steps, num_decoded = wait_for(driver, drawn)
    assert [block for block, _ in squares] == row["blocks"] and sorted(in_pool) == sorted(row["blocks"])
    fills = [min(100, max(0, 100 * (row["stored"] / BLOCK_SIZE - n))) for n in range(len(squares))]
    assert [fill for _, fill in squares] == pytest.approx(fills)
    assert num_steps >= row["stored"] - row["prompt"] and num_decoded > 0
    driver.execute_script("$('#send').click()")
    assert "its place in the batch is free" in wait_for(driver, "return !running && $('#remark').textContent")
    wait_for(driver, "return live.rows.length === 0 && all('.sequence:not(.gone)').length === 0")
    slow.wait_until_idle()


def test_shared_blocks_are_hatched_and_kept_ones_grey(page, server):
    driver = page(server)
    wait_for(driver, "return live")
    shown = driver.execute_script("""
        isPaused = true;
        const row = {state: 'running', prompt: 16, tokens: 20, stored: 19};
        show({steps: [[['7', 'prefill', 16], ['8', 'decode', 1]]], kept: [5], totals: live.totals,
            rows: [{...row, id: '7', blocks: [1, 2, 3]}, {...row, id: '8', blocks: [1, 2, 4]}]});
        const classes = (selector) => all(selector).map((each) => each.className);
        const colours = all('.sequence .name').map((each) => getComputedStyle(each).color);
        return [classes('#pool .block').slice(0, 6), classes('.sequence[data-id="7"] .block'), colours,
            $('#step-says').textContent]""")
    pool, table, colours, step = shown
    assert pool == ["block shared fed"] * 2 + ["block fed"] * 2 + ["block kept", "block"]
    assert [("shared" in each) for each in table] == [True, True, False] and len(set(colours)) == 2
    assert step == "16 of the prompt of #7, one new token for each of 1"


@pytest.mark.parametrize("experiment, count", [("many", 2), ("same", 2), ("long", 2), ("samples", 1)])
def test_the_experiments_run(experiment, count, page, server):
    driver, before = page(server), server.metrics()
    wait_for(driver, "return live")
    # The most sequences of a picture, and the most blocks that are hatched in one.
    driver.execute_script("""
        window.seen = {rows: 0, shared: 0};
        const before = show;
        show = (event) => {
            before(event);
            seen.rows = Math.max(seen.rows, event.rows.length);
            seen.shared = Math.max(seen.shared, all('#pool .shared').length);
        };
        $(`[data-try=${arguments[0]}]`).click()""", experiment)  # fmt: skip
    answers = 'zoo_answers_total{endpoint="/v1/completions",status="200"}'
    while server.metrics().get(answers, 0) < before.get(answers, 0) + count:
        time.sleep(0.02)
    wait_for(driver, "return seen.rows > 0 && live.rows.length === 0")
    seen = driver.execute_script("return seen")
    assert driver.execute_script("return $('#remark').textContent") == ""
    if experiment in ("many", "samples"):
        assert seen["rows"] >= 4 and seen["shared"] > 0
    after = server.wait_until_idle()
    assert after["zoo_tokens_found_total"] > before["zoo_tokens_found_total"] or experiment == "long"


def test_the_page_of_an_encoder(page, encoder):
    driver = page(encoder, key=KEY)
    sentences = ["Return the list.", "Return the length of the list.", "x"]
    write_on(driver, "\n".join(sentences))
    cells = driver.execute_script("return all('.similar td').map((cell) => Number(cell.textContent))")
    made = encoder.client.embeddings.create(model=encoder.name, input=sentences).data
    vectors = torch.tensor([each.embedding for each in made])
    assert cells == pytest.approx((vectors @ vectors.T).flatten().tolist(), abs=0.0006)


# Starting ---------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "app.py", "--checkpoint", checkpoint[2], "--port", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"error: --host 127\.0\.0\.1 --port {port}: cannot listen there .+\n", done.stderr)


@pytest.mark.parametrize(
    "options, says",
    [
        (["--checkpoint", "tiny-transformer-dates"], "is neither"),
        (["--checkpoint", "tiny-vit-digits"], "is neither"),
        (["--checkpoint", "no-such-thing"], "no-such-thing"),
        (["--port", "70000"], "--port is 70000"),
        (["--host", "256.1.1.1"], "cannot listen there"),
        (["--num-blocks", "0"], "--num-blocks"),
        (["--quantize", "int3"], "--quantize"),
    ],
    ids=repr,
)
def test_a_wrong_option_is_one_line(options, says):
    with pytest.raises(UserError) as caught:
        app.main(["--device", "cpu", *([] if "--port" in options else ["--port", "0"]), *options])
    assert says in str(caught.value) and "\n" not in str(caught.value)


# The end: what stands below ends the servers ---------------------------------------------------------------


def test_ctrl_c_lets_answers_end(slow):
    """Of who writes and of who waits; who only watches is sent away."""
    streams = [slow.complete("x", max_tokens=20, stream=True) for _ in range(2)]
    next(iter(streams[0]))
    watching = socket.create_connection(("127.0.0.1", slow.port), timeout=30)
    watching.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert watching.recv(15) == b"HTTP/1.1 200 OK"
    slow.process.send_signal(signal.SIGINT)
    for stream in streams:
        assert list(stream)[-1].choices[0].finish_reason == "length"
    assert slow.process.wait(timeout=10) == 0
    assert "ending once all answers are complete" in "".join(slow.said)
    assert "Traceback" not in "".join(slow.said)


def test_a_second_ctrl_c_ends_at_once(server):
    streams = [server.complete("x", max_tokens=100, n=6, temperature=1, stream=True) for _ in range(9)]
    next(iter(streams[0]))
    server.process.send_signal(signal.SIGINT)
    while "ending once" not in "".join(server.said):
        time.sleep(0.01)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=20) == 130
    assert "Traceback" not in "".join(server.said)
