"""What the tests of the faces for text share: schemas, prompts, streams over plain HTTP, the server's gauges."""

import contextlib
import http.client
import json
import re
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

QUESTION = [{"role": "system", "content": "You answer."}, {"role": "user", "content": "What is the capital of France?"}]
# as the demo model's template renders QUESTION
RENDERED = ("<|im_start|>system\nYou answer.<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
            "<|im_start|>assistant\n")

SHOP = {  # the page that a portfolio generator asks for
    "type": "object",
    "properties": {
        "brand_name": {"type": "string", "minLength": 1, "maxLength": 30},
        "tagline": {"anyOf": [{"type": "string", "maxLength": 20}, {"type": "null"}]},
        "hero": {"type": "object", "required": ["title", "subtitle"], "additionalProperties": False, "properties": {
            "title": {"type": "string", "maxLength": 20}, "subtitle": {"type": "string", "maxLength": 20}}},
        "repos": {"type": "array", "minItems": 1, "maxItems": 3, "items": {
            "type": "object", "required": ["name", "stars", "tags"], "additionalProperties": False, "properties": {
                "name": {"type": "string", "maxLength": 12}, "stars": {"type": "integer", "minimum": 0, "maximum": 100000},
                "tags": {"type": "array", "maxItems": 3, "items": {"enum": ["c", "python", "rust"]}}}}},
    },
    "required": ["brand_name", "tagline", "hero", "repos"],
    "additionalProperties": False,
}
SCHEMAS = {
    "shop": SHOP,
    "open": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "number": {"type": "number", "minimum": -3, "maximum": 12.5},
    "integer": {"type": "integer", "exclusiveMinimum": 7, "maximum": 1234},
    "enum": {"enum": ["red", "green", 3, None, [1, 2]]},
    "const": {"const": {"k": [True, "x"]}},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "string", "maxLength": 5}], "items": False,
              "minItems": 2},
    "array": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
    "string": {"type": "string", "minLength": 3, "maxLength": 9},
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{2,6}-[0-9]+$"},
    "date": {"type": "string", "format": "date"},
    "union": {"oneOf": [{"type": "object", "properties": {"kind": {"const": "circle"}, "r": {"type": "number"}},
                         "required": ["kind", "r"], "additionalProperties": False},
                        {"type": "object", "properties": {"kind": {"const": "box"}, "w": {"type": "integer"}},
                         "required": ["kind", "w"], "additionalProperties": False}]},
    "tree": {"$defs": {"t": {"type": "object", "properties": {
        "v": {"type": "integer"}, "c": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}},
        "required": ["v", "c"], "additionalProperties": False}}, "$ref": "#/$defs/t"},
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
}


class Stream:
    """A POST whose answer is read as it comes. Closing it is what a client does that went away."""

    def __init__(self, url, path, body, headers=None):
        at = urllib.parse.urlsplit(url)
        self.http = http.client.HTTPConnection(at.hostname, at.port, timeout=120)
        self.http.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **(headers or {})})

    def lines(self):
        """The lines of the answer, which must each be UTF-8."""
        self.answer = self.http.getresponse()
        assert self.answer.status == 200, self.answer.read()
        for line in self.answer:
            line = line.decode("utf-8")
            if line.strip():
                yield line.rstrip("\n")

    def events(self):
        """What `data:` lines hold, as text."""
        for line in self.lines():
            assert line.startswith("data: "), line
            yield line[len("data: "):]

    def close(self):
        sock = self.http.sock
        if sock is None and getattr(self, "answer", None) is not None:
            self.answer.close()
        self.http.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def post(url, path, body, headers=None):
    """(status, answer)"""
    at = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(at.hostname, at.port, timeout=120)
    data = body if isinstance(body, (str, bytes)) else json.dumps(body)
    connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    out = answer.status, json.loads(answer.read().decode("utf-8"))
    connection.close()
    return out


def get(url, path):
    at = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(at.hostname, at.port, timeout=120)
    connection.request("GET", path)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def gauge(url, name):
    status, text = get(url, "/metrics")
    assert status == 200
    return int(re.search("^" + re.escape(name) + r" (\d+)$", text, re.M).group(1))


RUNNING, SAMPLED = 'tinkerbell_tasks_running{kind="sample"}', "tinkerbell_sampled_tokens_total"
STEPS = "tinkerbell_steps_total"


def until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def until_idle(url):
    """Nothing is sampled any more, and the KV cache keeps only what is found again."""
    def idle():
        pages = {k: gauge(url, "tinkerbell_kv_pages" + k) for k in ("", "_free", "_cached")}
        waiting = gauge(url, 'tinkerbell_tasks_waiting{kind="sample"}')
        return gauge(url, RUNNING) + waiting == 0 and pages["_free"] + pages["_cached"] == pages[""]
    until(idle, "no samples, and all KV pages free or cached")


def parallel(n, fn, items):
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(fn, items))


def check_slow_readers(demo, path, body, text):
    """Clients that stop reading hold nobody up, and in the end have all that one has who reads at once. text: of a line."""
    with Stream(demo.url, path, body) as s:
        whole = "".join(map(text, s.lines()))
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(Stream(demo.url, path, body)).lines() for _ in range(8)]
        got = [text(next(lines)) for lines in streams]
        assert post(demo.url, "/completion", {"prompt": "x", "n_predict": 3})[0] == 200
        until(lambda: gauge(demo.url, RUNNING) == 0, "the end of their samples")
        assert [first + "".join(map(text, lines)) for first, lines in zip(got, streams)] == [whole] * 8


class Training:
    """A model in training on the demo server; each publish() is a checkpoint that can be named as a model."""

    def __init__(self, raw, base):
        self.raw, self.seq = raw, 0
        self.session = raw.create_session()
        self.id = raw.create_model(self.session, base, rank=8, seq=1, seed=1)

    def step(self, datum, rate=1e-2):
        self.seq += 2
        result = self.raw.forward_backward(self.id, self.seq - 1, [datum])
        self.raw.optim_step(self.id, self.seq, rate)
        return result

    def publish(self, name):
        self.seq += 1
        ticket = self.raw.ok("save_weights_for_sampler", {"model_id": self.id, "path": name, "seq_id": self.seq,
                                                          "type": "save_weights_for_sampler"})
        return self.raw.retrieve(ticket["request_id"])["path"]
