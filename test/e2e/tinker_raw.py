"""A small client of the Tinker wire API on the standard library alone: http.client, and just enough protobuf.

It sends exactly what it is told, so tests can send what no SDK would, and benchmarks measure the server and not a client.
"""

import http.client
import json
import socket
import struct
import urllib.parse

PROTO = "application/x-protobuf"


# ---------------------------------------------------------------------------------------------- protobuf
def varint(n):
    n &= (1 << 64) - 1
    out = bytearray()
    while True:
        if n < 0x80:
            out.append(n)
            return bytes(out)
        out.append((n & 0x7F) | 0x80)
        n >>= 7


def field(number, value):
    """One field: int and bool as varint, float as double, str and bytes with their length."""
    if isinstance(value, float):
        return varint(number << 3 | 1) + struct.pack("<d", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, str):
        value = value.encode()
    return varint(number << 3 | 2) + varint(len(value)) + bytes(value)


def parse(data):
    """A message as {number: [values]}; nested messages stay bytes."""
    fields, i = {}, 0

    def read_varint():
        nonlocal i
        shift = value = 0
        while True:
            byte = data[i]
            i += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while i < len(data):
        key = read_varint()
        kind = key & 7
        if kind == 0:
            value = read_varint()
        elif kind == 1:
            value = struct.unpack_from("<d", data, i)[0]
            i += 8
        elif kind == 2:
            n = read_varint()
            value = data[i:i + n]
            if len(value) != n:
                raise ValueError("truncated protobuf")
            i += n
        elif kind == 5:
            value = struct.unpack_from("<f", data, i)[0]
            i += 4
        else:
            raise ValueError(f"wire type {kind}")
        fields.setdefault(key >> 3, []).append(value)
    return fields


def floats(data):
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def ints(data):
    return list(struct.unpack(f"<{len(data) // 4}i", data))


def tensor(values, dtype=None, shape=None):
    """Message Tensor of a flat list; dtype "float32" or "int64"."""
    if dtype is None:
        dtype = "int64" if all(isinstance(v, int) for v in values) else "float32"
    raw = struct.pack(f"<{len(values)}{'q' if dtype == 'int64' else 'f'}", *values)
    dims = b"".join(varint(d) for d in ([len(values)] if shape is None else shape))
    return field(1, raw) + field(3, 2 if dtype == "int64" else 1) + field(4, dims)


def datum(tokens, **inputs):
    """Message Datum; inputs are lists, or ready Tensor messages."""
    out = field(1, field(1, field(1, struct.pack(f"<{len(tokens)}i", *tokens))))
    for name, value in inputs.items():
        message = value if isinstance(value, bytes) else tensor(value)
        out += field(2, field(1, name) + field(2, message))
    return out


def forward_backward_request(model_id, seq_id, data, loss_fn="cross_entropy", config=None, forward_only=False):
    out = field(1, model_id) + field(2, seq_id) + b"".join(field(3, d) for d in data) + field(4, loss_fn)
    for key, value in (config or {}).items():
        out += field(5, field(1, key) + field(2, float(value)))
        out += field(7, field(1, key) + field(2, field(1, float(value))))
    return out + (field(6, 1) if forward_only else b"")


def forward_backward_result(payload):
    """{"metrics": {...}, "logprobs": [[...], ...]} of a ForwardBackwardOutput."""
    message = parse(payload)
    metrics, logprobs = {}, []
    for entry in message.get(3, []):
        pair = parse(entry)
        metrics[pair[1][0].decode()] = pair.get(2, [0.0])[0]
    for record in message.get(2, []):
        for entry in parse(record).get(2, []):
            pair = parse(entry)
            if pair[1][0] == b"logprobs":
                batch = parse(pair[2][0])
                data = batch.get(1, [b""])[0]
                offsets = struct.unpack(f"<{len(batch[2][0]) // 8}q", batch[2][0])
                logprobs += [floats(data[a:b]) for a, b in zip(offsets, offsets[1:])]
    return {"metrics": metrics, "logprobs": logprobs}


def sample_result(payload):
    message = parse(payload)
    sequences = []
    for raw in message.get(1, []):
        seq = parse(raw)
        sequences.append({"stop_reason": "length" if seq.get(1, [0])[0] else "stop",
                          "tokens": ints(seq.get(2, [b""])[0]), "logprobs": floats(seq.get(3, [b""])[0])})
    prompt = message.get(2)
    return {"sequences": sequences, "prompt_logprobs": floats(prompt[0]) if prompt else None}


# ---------------------------------------------------------------------------------------------- HTTP
class Reply:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return f"<{self.status} {self.headers.get('content-type')} {self.body[:300]!r}>"


class Failed(Exception):
    """A future that failed; the answer's error and category."""

    def __init__(self, answer):
        super().__init__(f"{answer.get('category')}: {answer.get('error')}")
        self.answer = answer
        self.category = answer.get("category")


class Raw:
    """One connection. Calls come in two kinds: `call` sends and returns whatever comes; the named ones raise unless all is
    well."""

    def __init__(self, base_url, key="tml-test", timeout=120):
        url = urllib.parse.urlsplit(base_url)
        self.host, self.port = url.hostname, url.port
        self.key, self.timeout = key, timeout
        self.http = None

    def close(self):
        if self.http:
            self.http.close()
            self.http = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _connect(self):
        self.http = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        self.http.connect()
        self.http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call(self, method, path, body=None, headers=None, key=True):
        """body: bytes go as they are, anything else as JSON. path: under /api/v1/ unless it begins with '/'."""
        if not path.startswith("/"):
            path = "/api/v1/" + path
        send = {"Accept": "application/json"}
        if key:
            send["X-API-Key"] = self.key
        if body is not None and not isinstance(body, (bytes, bytearray)):
            body = json.dumps(body).encode()
        if body is not None:
            send["Content-Type"] = "application/json"
        send.update(headers or {})
        for attempt in (0, 1):
            if self.http is None:
                self._connect()
                fresh = True
            else:
                fresh = False
            try:
                self.http.request(method, path, body=body, headers=send)
                answer = self.http.getresponse()
                data = answer.read()
                return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, data)
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                self.close()
                if fresh or attempt:
                    raise
        raise AssertionError("unreachable")

    def post(self, path, body=None, headers=None):
        return self.call("POST", path, body, headers)

    def get(self, path):
        return self.call("GET", path)

    def ok(self, path, body):
        reply = self.post(path, body)
        if reply.status != 200:
            raise RuntimeError(f"{path}: {reply}")
        return reply.json

    def retrieve_once(self, request_id, metadata=False, proto=True):
        return self.post("retrieve_future", {"request_id": request_id, "allow_metadata_only": metadata},
                         {"Accept": PROTO if proto else "application/json"})

    def retrieve(self, request_id, proto=True):
        """Polls until the result: bytes for protobuf, else the JSON object. Raises Failed."""
        while True:
            reply = self.retrieve_once(request_id, proto=proto)
            if reply.status == 408:
                continue
            if reply.status != 200:
                raise RuntimeError(f"retrieve_future {request_id}: {reply}")
            if PROTO in reply.headers.get("content-type", ""):
                return reply.body
            answer = reply.json
            if "error" in answer:
                raise Failed(answer)
            if answer.get("type") == "try_again":
                continue
            return answer

    # the calls of a training run
    def create_session(self):
        return self.ok("create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0",
                                          "type": "create_session"})["session_id"]

    def create_model(self, session_id, base_model, rank=8, seq=0, seed=None, **flags):
        lora = {"rank": rank, **flags}
        if seed is not None:
            lora["seed"] = seed
        ticket = self.ok("create_model", {"session_id": session_id, "model_seq_id": seq, "base_model": base_model,
                                          "lora_config": lora, "type": "create_model"})
        return self.retrieve(ticket["request_id"])["model_id"]

    def submit_forward_backward(self, model_id, seq_id, data, loss_fn="cross_entropy", config=None, forward_only=False):
        body = forward_backward_request(model_id, seq_id, data, loss_fn, config, forward_only)
        return self.post("forward_backward", body, {"Content-Type": PROTO})

    def forward_backward(self, *args, **kwargs):
        reply = self.submit_forward_backward(*args, **kwargs)
        if reply.status != 200:
            raise RuntimeError(f"forward_backward: {reply}")
        return forward_backward_result(self.retrieve(reply.json["request_id"]))

    def optim_step(self, model_id, seq_id, learning_rate=1e-4, **adam):
        ticket = self.ok("optim_step", {"model_id": model_id, "seq_id": seq_id, "type": "optim_step",
                                        "adam_params": {"learning_rate": learning_rate, **adam}})
        return self.retrieve(ticket["request_id"])

    def create_sampling_session(self, session_id, seq, base_model=None, model_path=None):
        body = {"session_id": session_id, "sampling_session_seq_id": seq, "type": "create_sampling_session"}
        body.update({"base_model": base_model} if base_model else {"model_path": model_path})
        return self.ok("create_sampling_session", body)["sampling_session_id"]

    def submit_sample(self, sampler_id, seq_id, prompt, n=1, **params):
        return self.post("asample", {
            "sampling_session_id": sampler_id, "seq_id": seq_id, "num_samples": n, "type": "sample",
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]}, "sampling_params": params,
            "prompt_logprobs": False, "topk_prompt_logprobs": 0})

    def sample(self, *args, **kwargs):
        reply = self.submit_sample(*args, **kwargs)
        if reply.status != 200:
            raise RuntimeError(f"asample: {reply}")
        return sample_result(self.retrieve(reply.json["request_id"]))
