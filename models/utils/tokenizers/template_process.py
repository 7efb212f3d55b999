"""The process in which chat templates run: they come from strangers, so they get little time and memory.

chat_template.py starts it, once, tells it the seconds that a rendering may take, and speaks with it by lines
of JSON: {"template": text, "variables": {...}} is answered by {"text": ...} or {"error": ...}. It imports
nothing of this project, so that it is there at once, and it ends with the process that asks.

Jinja's sandbox keeps a template from files, from Python's internals and from changing what it is given. It
bounds neither 10 ** 10 ** 8, nor "a" * 10 ** 10, nor a loop in a loop in a loop: the system does, here.
"""

import json
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

BYTES = 512 * 2**20  # of memory, for everything
LONGEST = 32 * 2**20  # characters of an answer


def main():
    for line in sys.stdin:
        limit(seconds=int(sys.argv[1]))
        try:
            answer = answer_to(**json.loads(line))
        except MemoryError:
            answer = {"error": "the chat template takes too much memory"}
        print(json.dumps(answer), flush=True)


def limit(seconds):
    """From now on so many seconds of computing; the system ends a process that takes more."""
    try:
        import resource
    except ImportError:  # Windows, where chat_template.py alone watches the clock
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime) + seconds
    for kind, most in ((resource.RLIMIT_CPU, until), (resource.RLIMIT_AS, BYTES)):
        hard = resource.getrlimit(kind)[1]
        if hard == resource.RLIM_INFINITY or most < hard:
            with suppress(OSError, ValueError):  # macOS does not limit the memory of a process
                resource.setrlimit(kind, (most, hard))


def answer_to(template, variables):
    try:
        text = compiled(template).render(variables)
    except jinja2.exceptions.SecurityError as error:
        return {"error": f"the chat template tries something unsafe: {one_line(error)}"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"the chat template is broken at line {error.lineno}: {one_line(error)}"}
    except MemoryError:
        raise
    except Exception as error:
        # Most often the template's own raise_exception("roles must alternate ..."), else a mistake in it.
        return {"error": f"the chat template refuses these messages: {one_line(error)}"}
    if len(text) > LONGEST:
        return {"error": f"the chat template writes {len(text):,} characters, which is no conversation"}
    return {"text": text}


def one_line(error):
    return " ".join(str(error)[:1000].split()) or type(error).__name__


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


if __name__ == "__main__":
    main()
