"""What every request passes before anything looks at it: is it for us, may it ask, is it small enough.

    Host             a server that listens on this machine alone answers to this machine's names alone: else a
                     web page could rename its own address to 127.0.0.1 and talk to it (DNS rebinding)
    Authorization    Bearer KEY, where a key is set, compared in constant time: how long a comparison takes
                     must not tell how many characters were right
    body             of at most max_body bytes; what comes beyond is read and forgotten, so that the client
                     gets to the answer, which says so

An ASGI application is a function (scope, receive, send); this one calls another, with a `receive` of its own.
https://asgi.readthedocs.io/en/latest/specs/www.html
Proof: tests/test_app.py.
"""

import hmac

from starlette.responses import JSONResponse

from runs_serve.protocol import Refused

LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
# Without a key: the page, which asks for one, and whether the server is there.
PUBLIC = ("/", "/info", "/health", "/page.css", "/writing.js", "/picture.js")
MOST_FORGOTTEN = 2**28  # bytes of a body that is too large; of more the end is not waited for


class Gate:
    def __init__(self, app, endpoints, count, api_key=None, hosts=None, max_body=2**20):
        """hosts: names that it answers to; None: any. count(endpoint, status) hears of each answer."""
        self.app, self.endpoints, self.count = app, endpoints, count
        self.api_key, self.hosts, self.max_body = api_key, hosts, max_body

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        send = self.counted(scope["path"], send)
        try:
            self.check_host(headers.get(b"host", b""))
            self.check_key(scope["path"], headers.get(b"authorization", b""))
            receive = await self.small_enough(receive) if scope["method"] == "POST" else receive
        except Refused as refused:
            return await JSONResponse(refused.body, refused.status)(scope, receive, send)
        return await self.app(scope, receive, send)

    def counted(self, path, send):
        endpoint = path if path in self.endpoints else "other"

        async def and_count(message):
            if message["type"] == "http.response.start":
                self.count(endpoint, message["status"])
            await send(message)

        return and_count

    def check_host(self, host):
        name = host.decode("latin-1").lower()
        name = name.rpartition(":")[0] if name.rpartition(":")[2].isdigit() else name
        if self.hosts is not None and name not in self.hosts:
            raise Refused(f"this server does not answer to the name {name!r}", 403)

    def check_key(self, path, authorization):
        if self.api_key is None or path in PUBLIC:
            return
        if not hmac.compare_digest(authorization, b"Bearer " + self.api_key.encode()):
            message = "the API key is missing or wrong; send it as: Authorization: Bearer KEY"
            raise Refused(message, 401, code="invalid_api_key")

    async def small_enough(self, receive):
        """A `receive` that hands on the body, which has been read; Refused if that was too large."""
        parts, size, more = [], 0, True
        while more and size < MOST_FORGOTTEN:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size <= self.max_body:
                parts.append(message.get("body", b""))
        if size > self.max_body:
            raise Refused(f"the request has more than {self.max_body} bytes; ask for less at a time", 413)
        body = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def and_then():
            return body.pop() if body else await receive()

        return and_then
