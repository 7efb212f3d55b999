"""Chat templates: from a list of messages to the exact text that a chat model was trained on.

A chat model has seen conversations only in one fixed layout, with special tokens that mark whose turn it is.
The layout comes with the checkpoint as a Jinja template, a little program that turns
[{"role": "user", "content": "Hi"}, ...] into text. Whoever published the checkpoint wrote it, so it runs in a
sandbox, and that in a process of its own, whose time and memory are limited (template_process.py).

The other danger sits in the messages. If a user types the name of a special token, say "<|eot_id|>", the
rendered text holds it twice, once from the template and once from the user, and only the first may become the
token. `render_guarded` tells them apart. Its proof is tests/test_tokenizer.py.
"""

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from models.utils.errors import UserError

PROCESS = Path(__file__).with_name("template_process.py")
SECONDS = 5  # of computing, for one rendering; a long conversation takes a hundredth of one
PATIENCE = 60  # seconds on the clock, where the system cannot count the others


def render(template, names, given):
    """The text that a template makes of the checkpoint's names (bos_token, ...) and of what the user gives.

    Always given are the messages, and whatever else this template knows: tools, enable_thinking, ...
    """
    check_messages(given["messages"])
    # Templates ask whether a key is there, not whether it is None: drop what is None, as `transformers` does.
    messages = [
        {key: value for key, value in message.items() if value is not None} for message in given["messages"]
    ]
    variables = {"tools": None, "documents": None, **names, **given, "messages": messages}
    try:
        question = json.dumps({"template": template, "variables": variables})
    except (TypeError, ValueError, RecursionError):
        raise UserError(
            "a chat is made of texts, numbers, lists and objects, as in JSON; here is more"
        ) from None
    answer = TEMPLATES.ask(question)
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["text"]


class TemplateProcess:
    """template_process.py, started when the first question comes, and anew when one has broken it."""

    def __init__(self):
        self.lock, self.process, self.parent = threading.Lock(), None, None
        atexit.register(self.stop)

    def ask(self, question):
        """The answer to a line of JSON, as a dict."""
        with self.lock:
            # It may have been ended by somebody; and a fork may not speak through its parent's pipes.
            if self.process is None or self.parent != os.getpid() or self.process.poll() is not None:
                self.start()
            timer = threading.Timer(PATIENCE, self.process.kill)
            timer.start()
            try:
                self.process.stdin.write(question + "\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:
                self.stop()  # or the next question would get the answer to this one
                raise
            finally:
                timer.cancel()
            if not answer.endswith("\n"):
                self.stop()
                raise UserError(
                    "the chat template takes too much time or memory; its author made a mistake, or worse"
                )
            return json.loads(answer)

    def start(self):
        # In a session of its own, since Ctrl-C in a terminal is not meant for it.
        self.process = subprocess.Popen(
            [sys.executable, str(PROCESS), str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,
        )
        self.parent = os.getpid()

    def stop(self):
        if self.process is not None and self.parent == os.getpid():
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                with suppress(OSError):
                    stream.close()
        self.process = None


TEMPLATES = TemplateProcess()


def check_messages(messages):
    if not isinstance(messages, list) or not messages:
        raise UserError("a chat is a list of at least one message, each with a role and a content")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(
                f'a message is an object like {{"role": "user", "content": "Hi"}}, not {message!r}'
            )


def render_guarded(template, names, given, special_tokens):
    """Render, and break up special tokens in what the user gives: "<|eot_id|>" -> "<" mark "|eot_id|>".

    Returns the text and the mark, a character that occurs nowhere else. What still reads as a special token
    was written by the template; dropping the marks gives the plain rendering.
    """
    text = render(template, names, given)
    # A token of one character cannot be broken up. Longer ones go first: one may begin like another.
    tokens = sorted((token for token in special_tokens if len(token) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
    mark = next(mark for mark in map(chr, range(0xF0000, 0xFFFFE)) if mark not in text + template)
    guarded = map_strings(given, lambda string: pattern.sub(lambda m: m[0][0] + mark + m[0][1:], string))
    if guarded == given:
        return text, ""

    marked = render(template, names, guarded)
    if marked.replace(mark, "") != text:
        # A template that looks for special tokens inside messages does something else to broken ones.
        token = next(token for token in tokens if token in str(given))
        raise UserError(
            f"the message holds {token}, which this chat template does not keep as text; leave it out"
        )
    return marked, mark


def map_strings(value, function):
    """Apply a function to every string in nested lists and objects; keys stay as they are."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {key: map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, function) for item in value]
    return value
