"""What tinkex, the Elixir client, puts on the wire, and how strictly it reads the answers: JSON only, a `type` in every
result, failures as objects, a model's id in the first answer of create_model, a path beside every sampling session."""

import concurrent.futures
import io
import secrets
import tarfile
import threading
import urllib.request

import pytest

from common import tokens
from tinker_raw import Raw

HEADERS = {
    "accept": "application/json", "content-type": "application/json", "user-agent": "AsyncTinkex/Elixir 0.15.0",
    "x-stainless-package-version": "0.15.0", "x-stainless-os": "Linux", "x-stainless-arch": "x64",
    "x-stainless-runtime": "BEAM", "x-stainless-runtime-version": "1.18.4 (OTP 25)",
}


class UserError(Exception):
    """tinkex stops at these; any other failure it repeats for ever."""


class Tinkex:
    def __init__(self, url):
        self.url, self.local = url, threading.local()

    def call(self, method, path, body=None, **headers):
        raw = getattr(self.local, "raw", None)
        if raw is None:
            raw = self.local.raw = Raw(self.url)
        if method != "GET":
            headers["x-idempotency-key"] = secrets.token_hex(16)
        return raw.call(method, path, body, {**HEADERS, **headers})

    def ok(self, method, path, body=None, **headers):
        reply = self.call(method, path, body, **headers)
        if 400 <= reply.status < 500:
            assert reply.json["category"] == "user" and isinstance(reply.json["message"], str), reply
            raise UserError(reply.json["message"])
        assert 200 <= reply.status < 300, reply
        return reply.json

    def post(self, path, body, **headers):
        return self.ok("POST", path, body, **headers)

    def poll(self, ticket, kind):
        """A result as tinkex decodes it, clause by clause; what it has no clause for crashes it."""
        iteration, metadata = 0, True
        while True:
            reply = self.call("POST", "retrieve_future",
                              {"request_id": ticket["request_id"], "allow_metadata_only": metadata},
                              **{"x-tinker-request-type": kind, "x-tinker-request-iteration": str(iteration),
                                 "x-stainless-raw-response": "raw"})
            iteration += 1
            if reply.status == 408:
                continue
            if 400 <= reply.status < 500:
                raise UserError(reply.json["message"])
            assert reply.status == 200 and reply.headers["content-type"].startswith("application/json"), reply
            answer = reply.json
            if answer.get("type") == "try_again":
                assert isinstance(answer["request_id"], str) and isinstance(answer["queue_state"], str)
            elif answer.get("status") == "complete_metadata":
                assert metadata and answer["response_payload_size"] > 0
                metadata = False
            elif answer.get("status") == "failed":
                assert isinstance(answer["error"]["message"], str), answer
                assert answer["error"]["category"] == answer["category"] == "user", answer
                raise UserError(answer["error"]["message"])
            elif kind in ("Forward", "ForwardBackward"):
                assert answer["loss_fn_output_type"], answer
                return answer
            else:
                assert isinstance(answer["type"], str), answer
                return answer

    def submit_model(self, session, n, model="tiny", **lora):
        answer = self.post("create_model", {
            "session_id": session, "model_seq_id": n, "base_model": model, "user_metadata": None, "type": "create_model",
            "lora_config": {"rank": 8, "seed": None, "train_mlp": True, "train_attn": True, "train_unembed": True, **lora}})
        assert answer["model_id"] == f"{session}:train:{n}"  # it never polls for it
        return answer["model_id"]


def tensor(data, dtype):
    return {"data": data, "dtype": dtype}  # without a shape


def datum(seed=0, n=8, **inputs):
    t = tokens(n + 1, seed)
    return {"model_input": {"chunks": [{"tokens": t[:-1], "type": "encoded_text"}]},
            "loss_fn_inputs": {"target_tokens": tensor(t[1:], "int64"), **inputs}}


def sft(seed=0, weight=1.0):
    return datum(seed, weights=tensor([weight] * 8, "float32"))


class Model:
    """A model with its count of requests, as a training client has it."""

    def __init__(self, client, model_id):
        self.client, self.id, self.seq = client, model_id, 0

    def submit(self, call, **more):
        self.seq += 1
        return self.client.post(call, {"model_id": self.id, "seq_id": self.seq, **more})

    def forward_backward(self, data, loss_fn="cross_entropy", **config):
        body = {"data": data, "loss_fn": loss_fn}
        if config:
            body["loss_fn_config"] = config
        return self.submit("forward_backward", forward_backward_input=body)

    def optim_step(self):
        return self.submit("optim_step", adam_params={"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12,
                                                      "weight_decay": 0, "grad_clip_norm": 0})

    def save_sampler(self, name, n):
        return self.client.poll(self.submit("save_weights_for_sampler", path=name, sampling_session_seq_id=n, ttl_seconds=None,
                                            type="save_weights_for_sampler"), "SaveWeightsForSampler")

    def save(self, name):
        return self.client.poll(self.submit("save_weights", path=name, ttl_seconds=None, type="save_weights"),
                                "SaveWeights")["path"]

    def load(self, path, optimizer):
        return self.client.poll(self.submit("load_weights", path=path, optimizer=optimizer, type="load_weights"), "LoadWeights")


@pytest.fixture
def client(server):
    return Tinkex(server.url)


@pytest.fixture
def session(client):
    return client.post("create_session", {"tags": ["tinkex-elixir"], "user_metadata": None, "sdk_version": "0.15.0",
                                          "project_id": None, "type": "create_session"})["session_id"]


@pytest.fixture
def model(client, session):
    return Model(client, client.submit_model(session, 0))


def open_sampler(client, session, n, base_model=None, model_path=None):
    return client.post("create_sampling_session", {
        "session_id": session, "sampling_session_seq_id": n, "base_model": base_model, "model_path": model_path,
        "type": "create_sampling_session"})["sampling_session_id"]


def submit_sample(client, sampler, seq, n=1, max_tokens=4, **more):
    return client.post("asample", {
        "sampling_session_id": sampler, "seq_id": seq, "num_samples": n, "type": "sample", "topk_prompt_logprobs": 0,
        "prompt": {"chunks": [{"tokens": tokens(6, 3), "type": "encoded_text"}]},
        "sampling_params": {"max_tokens": max_tokens, "seed": 7, "temperature": 1.0, "top_k": -1, "top_p": 1.0}, **more},
        **{"x-tinker-sampling-backpressure": "1"})


@pytest.mark.smoke
def test_service(client, session):
    assert client.ok("GET", "healthz")["status"] == "ok"
    models = client.ok("GET", "get_server_capabilities")["supported_models"]
    assert "tiny" in [m["model_name"] for m in models]
    client.post("session_heartbeat", {"session_id": session})
    assert client.call("POST", "heartbeat", {"session_id": session}).status == 404  # a probe of its examples
    client.post("telemetry", {"session_id": session, "platform": "linux", "sdk_version": "0.15.0", "events": []})
    assert session in client.ok("GET", "sessions?limit=20&offset=0")["sessions"]


def test_parallel_creation(client, session):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(client.submit_model, session, 0), pool.submit(client.submit_model, session, 1),
                pool.submit(open_sampler, client, session, 0, "tiny"), pool.submit(client.ok, "GET", "get_server_capabilities")]
        first, second, sampler, _ = [j.result() for j in jobs]
    assert first != second
    for m in (first, second):
        info = client.post("get_info", {"model_id": m, "type": "get_info"})
        assert info["model_id"] == m and info["model_data"]["model_name"] == "tiny" and info["lora_rank"] == 8
    seen = client.ok("GET", f"sessions/{session}")
    assert set(seen["training_run_ids"]) == {first, second} and seen["sampler_ids"] == [sampler]
    with pytest.raises(UserError, match="nobody"):
        client.submit_model(session, 2, model="nobody")


@pytest.mark.smoke
def test_training(client, session, model):
    other = Model(client, client.submit_model(session, 1))
    forward = client.poll(model.submit("forward", forward_input={"data": [sft()], "loss_fn": "cross_entropy"}), "Forward")
    logprobs = forward["loss_fn_outputs"][0]["logprobs"]
    assert len(logprobs["data"]) == 8 and logprobs["dtype"] == "float32"
    assert forward["metrics"]["loss:sum"] == pytest.approx(-sum(logprobs["data"]), rel=1e-4)
    # await_many: requests of two models, all submitted before the first is awaited, awaited in parallel
    tickets = []
    for m in (model, other, model):
        tickets += [(m.forward_backward([sft(1), sft(2)]), "ForwardBackward"), (m.optim_step(), "OptimStep")]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda t: client.poll(*t), reversed(tickets)))[::-1]
    losses = [r["metrics"]["loss:sum"] for r in results[::2]]
    assert losses[2] < losses[0] == pytest.approx(losses[1], rel=0.2)
    assert all(":" in key for r in results[::2] for key in r["metrics"])
    # its custom losses are signed weights
    client.poll(model.forward_backward([sft(1, weight=-0.5)]), "ForwardBackward")
    rl = datum(2, logprobs=tensor([-5.0] * 8, "float32"), advantages=tensor([0.5] * 8, "float32"))
    for loss_fn in ("importance_sampling", "ppo", "cispo"):
        client.poll(model.forward_backward([rl], loss_fn), "ForwardBackward")
    with pytest.raises(UserError, match="nonsense"):
        client.poll(model.forward_backward([sft()], "nonsense"), "ForwardBackward")
    client.poll(model.optim_step(), "OptimStep")  # and goes on
    assert client.poll(client.post("unload_model", {"model_id": other.id, "type": "unload_model"}), "UnloadModel")["model_id"]


def test_weights(client, session, model):
    client.poll(model.forward_backward([sft()]), "ForwardBackward")
    client.poll(model.optim_step(), "OptimStep")
    path = model.save("state")
    assert path == f"tinker://{model.id}/weights/state"
    for optimizer in (False, True):
        assert model.load(path, optimizer)["type"] == "load_weights"
    info = client.post("weights_info", {"tinker_path": path})
    assert (info["base_model"], info["is_lora"], info["lora_rank"]) == ("tiny", True, 8)
    new = Model(client, client.submit_model(session, 5, train_unembed=info["train_unembed"]))
    new.load(path, True)
    with pytest.raises(UserError, match="nowhere"):
        new.load(f"tinker://{model.id}/weights/nowhere", False)
    run = client.ok("GET", f"training_runs/{model.id}")
    assert run["training_run_id"] == model.id and run["last_checkpoint"]["tinker_path"] == path
    page = client.ok("GET", "training_runs?limit=20&offset=0")
    assert page["cursor"]["total_count"] >= 2 and model.id in [r["training_run_id"] for r in page["training_runs"]]
    (item,) = client.ok("GET", f"training_runs/{model.id}/checkpoints")["checkpoints"]
    assert item["checkpoint_id"] == "weights/state" and item["checkpoint_type"] == "training"
    assert client.ok("GET", "checkpoints?limit=100&offset=0")["cursor"]["limit"] == 100
    url = f"training_runs/{model.id}/checkpoints/weights/state"
    client.ok("POST", url + "/publish", {})
    assert client.ok("GET", f"training_runs/{model.id}/checkpoints")["checkpoints"][0]["public"] is True
    client.ok("DELETE", url + "/publish")
    client.ok("PUT", url + "/ttl", {"ttl_seconds": 7200})
    assert client.ok("GET", f"training_runs/{model.id}/checkpoints")["checkpoints"][0]["expires_at"]
    client.ok("PUT", url + "/ttl", {"ttl_seconds": None})
    archive = client.call("GET", url + "/archive")
    where = archive.headers["location"] if archive.status == 302 else archive.json["url"]
    with urllib.request.urlopen(where, timeout=60) as response:  # no key, no headers, not compressed
        names = tarfile.open(fileobj=io.BytesIO(response.read()), mode="r:").getnames()
    assert any(n.endswith("adapter_model.safetensors") for n in names)
    client.ok("DELETE", url)
    assert client.ok("GET", f"training_runs/{model.id}/checkpoints")["checkpoints"] == []


@pytest.mark.smoke
def test_sampling(client, session, model):
    """It counts sampling sessions and unnamed saves apart, so both have number 0 here."""
    base = open_sampler(client, session, 0, "tiny")
    assert open_sampler(client, session, 0, "tiny") == base
    client.poll(model.forward_backward([sft()]), "ForwardBackward")
    client.poll(model.optim_step(), "OptimStep")
    unnamed = model.save_sampler(None, 0)
    assert unnamed["sampling_session_id"] not in (None, base) and isinstance(unnamed["path"], str)
    named = open_sampler(client, session, 1, model_path=model.save_sampler("s", None)["path"])
    texts = {}
    for sampler in (base, unnamed["sampling_session_id"], named):
        info = client.ok("GET", "samplers/" + sampler.replace(":", "%3A"))
        assert info["sampler_id"] == sampler and info["base_model"] == "tiny"
        result = client.poll(submit_sample(client, sampler, 0, n=2), "Sample")
        assert result["type"] == "sample" and len(result["sequences"]) == 2
        for s in result["sequences"]:
            assert s["stop_reason"] in ("length", "stop") and len(s["tokens"]) == len(s["logprobs"]) <= 4
        texts[sampler] = [s["logprobs"] for s in result["sequences"]]
    assert texts[named] == texts[unnamed["sampling_session_id"]] != texts[base]
    scored = client.poll(submit_sample(client, base, 1, max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=2), "Sample")
    assert scored["prompt_logprobs"][0] is None and all(p < 0 for p in scored["prompt_logprobs"][1:])
    assert scored["topk_prompt_logprobs"][0] is None and len(scored["topk_prompt_logprobs"][1]) == 2
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: client.poll(submit_sample(client, base, 10 + i), "Sample"), range(8)))
    assert len({str(r["sequences"]) for r in results}) == 1  # one seed
    with pytest.raises(UserError):
        client.poll({"request_id": "nonsense"}, "Sample")
