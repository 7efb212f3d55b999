"""What the server counts, in Prometheus' text format, which is lines of `name{labels} value`.

    # HELP zoo_tokens_total Tokens that the model has read, and made.
    # TYPE zoo_tokens_total counter
    zoo_tokens_total{kind="read"} 1250

A counter only grows; whoever watches takes differences and so knows rates. A gauge is what there is now. A
histogram counts in bins that contain each other: le="0.1" holds all that took at most 0.1 seconds.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/
Proof: tests/test_app.py.
"""

from collections import Counter

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    """
    >>> seconds = Histogram((0.1, 1))
    >>> seconds.add(0.05), seconds.add(3)
    (None, None)
    >>> print(*seconds.lines("wait"), sep=chr(10))
    wait_bucket{le="0.1"} 1
    wait_bucket{le="1"} 1
    wait_bucket{le="+Inf"} 2
    wait_sum 3.05
    wait_count 2
    """

    def __init__(self, bounds):
        self.bounds, self.counts = bounds, [0] * len(bounds)
        self.sum, self.count = 0.0, 0

    def add(self, value):
        self.sum += value
        self.count += 1
        for n, bound in enumerate(self.bounds):
            self.counts[n] += value <= bound

    def lines(self, name):
        bins = [*zip(self.bounds, self.counts), ("+Inf", self.count)]
        yield from (f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in bins)
        yield from (f"{name}_sum {self.sum}", f"{name}_count {self.count}")


class Metrics:
    """Written by the event loop alone, so that no lock is needed."""

    def __init__(self):
        self.requests = Counter()  # (endpoint, HTTP status)
        self.batch = Histogram(ROWS)
        self.first_token, self.per_token = Histogram(SECONDS), Histogram(SECONDS)

    def text(self, statistics=None):
        """What /metrics shows; statistics: of the engine, where the model is a decoder."""
        requests = [({"endpoint": e, "status": s}, n) for (e, s), n in sorted(self.requests.items())]
        families = [("zoo_requests_total", "counter", "Answers, by endpoint and HTTP status.", requests)]
        if statistics:
            families += self.of_engine(statistics)
        lines = []
        for name, kind, about, samples in families:
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            if kind == "histogram":
                lines += samples.lines(name)
            else:
                lines += [f"{name}{labelled(labels)} {value}" for labels, value in samples]
        return "\n".join(lines) + "\n"

    def of_engine(self, numbers):
        """The same of the engine that writes, from its statistics()."""
        states = {
            "in_use": numbers["num_blocks_in_use"],
            "kept": numbers["num_blocks_known"],
            "free": numbers["num_blocks"] - numbers["num_blocks_in_use"] - numbers["num_blocks_known"],
        }
        blocks = [({"state": state}, count) for state, count in states.items()]
        here = [({"state": state}, numbers[f"num_{state}"]) for state in ("running", "waiting")]
        tokens = [({"kind": kind}, numbers[f"num_tokens_{kind}"]) for kind in ("read", "made")]
        prefix = [({"kind": kind}, numbers[f"num_tokens_{kind}"]) for kind in ("sought", "found")]
        steps, preempted = [({}, numbers["num_steps"])], [({}, numbers["num_preempted"])]
        yield "zoo_tokens_total", "counter", "Tokens that the model has read, and made.", tokens
        yield "zoo_prefix_tokens_total", "counter", "Tokens of prompts sought and found in blocks.", prefix
        yield "zoo_steps_total", "counter", "Steps of the engine.", steps
        yield "zoo_preemptions_total", "counter", "Texts that had to wait again as blocks ran out.", preempted
        yield "zoo_sequences", "gauge", "Texts that are being written, and that wait for a place.", here
        yield "zoo_blocks", "gauge", "Blocks: in use, kept for a prompt that begins alike, free.", blocks
        yield "zoo_batch_rows", "histogram", "Texts that a step worked on.", self.batch
        yield "zoo_time_to_first_token_seconds", "histogram", "From request to first token.", self.first_token
        yield "zoo_time_per_token_seconds", "histogram", "From a text's token to its next.", self.per_token


def labelled(labels):
    """
    >>> labelled({"endpoint": "/v1/models", "status": 200})
    '{endpoint="/v1/models",status="200"}'
    """
    pairs = ",".join(f'{name}="{escaped(str(value))}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def escaped(value):
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
