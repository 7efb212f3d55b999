"""Chat templates: from a list of messages to the exact text that a chat model was trained on.

A chat model has seen conversations only in one fixed layout, with special tokens that mark whose turn it is.
The layout comes with the checkpoint as a Jinja template, a little program that turns
[{"role": "user", "content": "Hi"}, ...] into text. Whoever published the checkpoint wrote it, so it runs in a
sandbox: it cannot reach files or Python's internals, nor change what it is given.

The other danger sits in the messages. If a user types the name of a special token, say "<|eot_id|>", the
rendered text holds it twice, once from the template and once from the user, and only the first may become the
token. `render_guarded` tells them apart. Its proof is tests/test_tokenizer.py.
"""

import json
import re
from datetime import datetime
from functools import lru_cache

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.utils.errors import UserError
from models.utils.files import one_line


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
        return compiled(template).render(variables)
    except jinja2.exceptions.SecurityError as error:
        raise UserError(f"the chat template tries something unsafe: {one_line(error)}") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is broken at line {error.lineno}: {one_line(error)}") from None
    except Exception as error:
        # Most often the template's own raise_exception("roles must alternate ..."), else a mistake in it.
        raise UserError(f"the chat template refuses these messages: {one_line(error)}") from None


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


@lru_cache
def compiled(template):
    """The template as a program, with the options and functions that published templates count on."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own tojson writes for HTML pages (< becomes \\u003c); models were trained on plain JSON."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def raise_exception(message):
    raise jinja2.TemplateError(message)


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, with which templates mark the assistant's words for training.

    For rendering it changes nothing: the body stands as it is, in a scope of its own.
    """

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()
