"""The thread in which the model runs, and how the event loop speaks with it without ever waiting for it.

    event loop                                     this thread
    await thread.submit(requests) --inbox-->       engine.add(request)
                                                   engine.step()       as long as there is something to do
    async for event in stream     <--one call--    its events
    stream.cancel()               --inbox-->       engine.cancel(number), before the next step

Thousands of connections wait in the event loop at no cost, but only while nothing in it takes long; and a
step of the model takes long. So the loop hands over what it wants done, and each step hands back its events
by one call (call_soon_threadsafe). All that both sides touch is the inbox and that call.

Proof: tests/test_app.py.
"""

import asyncio
import queue
import threading
import time
import traceback
from contextlib import suppress

from runs_serve.live import picture
from runs_serve.request import ERROR, Event

LOOK_EVERY = 1 / 20  # seconds between two pictures for those who watch


class Stream:
    """What becomes of the requests of one client: an async iterator over (which request, Event)."""

    def __init__(self, thread, requests):
        self.thread, self.requests = thread, requests
        self.queue = asyncio.Queue()
        self.numbers = {}  # the engine's number of a request -> which one of ours
        self.num_open = sum(request.num_choices for request in requests)
        self.submitted = self.last = time.monotonic()
        self.is_over = False

    def cancel(self):
        """Its client went away: nothing more is written for it, and whoever iterates comes to the end."""
        if not self.is_over:
            self.end()
            self.thread.inbox.put(("cancel", self))

    def end(self):
        self.is_over = True
        self.thread.num_open -= self.num_open
        self.num_open = 0
        self.queue.put_nowait(None)

    def put(self, events):
        """In the event loop: the events of a step."""
        for event in events if not self.is_over else ():
            self.queue.put_nowait((self.numbers[event.request], event))
            if event.finish_reason:
                self.num_open -= 1
                self.thread.num_open -= 1
        if self.num_open == 0 and not self.is_over:
            self.end()

    async def __aiter__(self):
        while (item := await self.queue.get()) is not None:
            yield item


class ModelThread:
    def __init__(self, engine, metrics, pace=None):
        """pace: steps a second at most, for those who want to watch; None: as fast as it goes."""
        self.engine, self.metrics, self.pace = engine, metrics, pace
        self.inbox = queue.SimpleQueue()
        self.num_open = 0  # texts that somebody waits for; counted in the event loop
        self.streams = {}  # the engine's number of a request -> its Stream
        self.num_choices = {}  # the same -> how many of its texts are still being written
        self.watchers = set()  # queues of those who look at the live picture
        self.steps, self.looked = [], 0.0  # what they have not seen yet, and when they last saw something
        self.thread = threading.Thread(target=self.run, name="model", daemon=True)

    # In the event loop --------------------------------------------------------------------------------------

    async def start(self):
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    async def stop(self):
        """Ends after the step that is being made."""
        self.inbox.put(("stop", None))
        await asyncio.to_thread(self.thread.join, timeout=5)

    async def submit(self, requests):
        """A Stream of the answers, once the engine has taken the requests; its UserError if it does not."""
        stream = Stream(self, requests)
        self.num_open += stream.num_open
        taken = self.loop.create_future()
        self.inbox.put(("add", (stream, taken)))
        try:
            await taken
        except BaseException:
            stream.cancel()
            raise
        return stream

    def watch(self):
        """A queue of live pictures, of which the first comes at once; `unwatch` ends it."""
        watcher = asyncio.Queue(maxsize=16)
        self.watchers.add(watcher)
        self.inbox.put(("look", None))
        return watcher

    def stop_watching(self):
        for watcher in self.watchers:
            while watcher.full():
                watcher.get_nowait()
            watcher.put_nowait(None)

    def deliver(self, events, num_rows):
        """What a step made, to whoever waits for it."""
        now, streams = time.monotonic(), {}
        for stream, event in events:
            streams.setdefault(stream, []).append(event)
            first = stream.last == stream.submitted
            (self.metrics.first_token if first else self.metrics.per_token).add(now - stream.last)
        for stream, those in streams.items():
            stream.last = now
            stream.put(those)
        self.metrics.batch.add(num_rows)

    def show(self, picture):
        for watcher in self.watchers:
            if not watcher.full():  # who cannot keep up misses some
                watcher.put_nowait(picture)

    # In the model's thread ----------------------------------------------------------------------------------

    def run(self):
        while True:
            if not self.engine.has_work:
                self.look()
            wish, about = self.next_wish()
            if wish == "stop":
                return
            if wish is None:
                self.step()
            else:
                {"add": self.add, "cancel": self.cancel, "look": self.look}[wish](about)

    def next_wish(self):
        """What somebody wants done before the next step; (None, None) when that may be made."""
        try:
            return self.inbox.get(block=not self.engine.has_work)
        except queue.Empty:
            return None, None

    def add(self, about):
        stream, taken = about
        try:
            for index, request in enumerate(stream.requests):
                number = self.engine.add(request)
                stream.numbers[number] = index
                self.streams[number] = stream
                self.num_choices[number] = request.num_choices
        except Exception as error:
            self.cancel(stream)
            self.call(settle, taken, error)
        else:
            self.call(settle, taken, None)

    def cancel(self, stream):
        for number in stream.numbers:
            if self.streams.pop(number, None):
                self.engine.cancel(number)

    def step(self):
        start = time.monotonic()
        try:
            events = self.engine.step()
        except Exception:
            traceback.print_exc()
            events = self.give_up()
        expected = [(self.streams[event.request], event) for event in events if event.request in self.streams]
        self.call(self.deliver, expected, len(self.engine.work))
        for event in events:
            self.num_choices[event.request] -= event.finish_reason is not None
            if self.num_choices[event.request] == 0:
                del self.num_choices[event.request], self.streams[event.request]
        self.note(self.engine.work)
        if self.pace:
            time.sleep(max(0, start + 1 / self.pace - time.monotonic()))

    def give_up(self):
        """A step failed, nobody knows for whose sake: all that run end with an error, and others may come."""
        scheduler = self.engine.scheduler
        numbers = {sequence.number for sequence in scheduler.running or scheduler.waiting}
        lost = [each for each in [*scheduler.running, *scheduler.waiting] if each.number in numbers]
        for number in numbers:
            self.engine.cancel(number)
        return [Event(each.number, each.choice, None, "", ERROR) for each in lost]

    def note(self, work):
        """A step for those who watch."""
        if self.watchers:
            self.steps.append(work)
            if time.monotonic() > self.looked + LOOK_EVERY:
                self.look()

    def look(self, _=None):
        if self.watchers:
            self.call(self.show, picture(self.engine, self.steps))
        self.steps, self.looked = [], time.monotonic()

    def call(self, function, *arguments):
        with suppress(RuntimeError):  # the loop has ended, and nobody is there to hear
            self.loop.call_soon_threadsafe(function, *arguments)


def settle(future, error):
    """Its waiter may have gone away meanwhile."""
    if not future.done():
        future.set_exception(error) if error else future.set_result(None)
