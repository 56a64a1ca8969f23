"""Tinkerbell's API: its ten HTTP example scripts as requests of our own, then every rule of the wire, one by one.

The scripts' requests come in their order and with their ways of polling; the server is the demo model's.
"""

import base64
import gzip
import json
import math
import socket
import threading
import time

import pytest

from daemon import Daemon, end
from tinker_raw import Raw, datum

USER = {"role": "user", "content": "What is 2 + 3?"}
CHAT = [USER, {"role": "assistant", "content": "5"}]
TRAINING = ("forward", "forward_backward", "optim_step")
JOBS = (*TRAINING, "sample", "add_lora", "remove_lora")
LEGACY = {"/fwd": "forward", "/fwdbwd": "forward_backward", "/optim_step": "optim_step", "/add_lora": "add_lora",
          "/remove_lora": "remove_lora", "/load_weights": "load_weights", "/save_weights": "save_weights",
          "/save_weights_for_sampler": "save_weights_for_sampler"}


class Bell(Raw):
    """A client as the examples are: no key, no version, no long poll."""

    def call(self, method, path, body=None, headers=None, key=False):
        return super().call(method, path, body, headers, key)

    def submit(self, path, body):
        reply = self.post(path, body)
        assert reply.status == 200, reply
        assert reply.json["request_id"].startswith("future_") and len(reply.json["request_id"]) == 15
        return reply.json["request_id"]

    def poll(self, request_id):
        return self.post("/retrieve_future", {"request_id": request_id})

    def wait(self, request_id, pause=0.1, limit=120):
        """As every example: 200 is the result, 202 means wait, anything else is an error."""
        until = time.monotonic() + limit
        while time.monotonic() < until:
            reply = self.poll(request_id)
            if reply.status == 200:
                return reply.json
            assert reply.status == 202 and reply.json == {"status": "pending"}, reply
            time.sleep(pause)
        raise AssertionError(f"{request_id} took longer than {limit} s")

    def job(self, path, body):
        return self.wait(self.submit(path, body), pause=0.01)

    def failure(self, path, body):
        """What a failed job says, at every poll."""
        request_id = self.submit(path, body)
        while (reply := self.poll(request_id)).status == 202:
            time.sleep(0.01)
        assert reply.status == 500 and reply.json == self.poll(request_id).json
        prefix = "500 Internal Server Error: Job failed: "
        assert reply.json["detail"].startswith(prefix), reply
        return reply.json["detail"][len(prefix):]

    def loss(self, name, data=(CHAT,), **more):
        return self.ok("forward", {"model_id": name, "data": list(data), **more})["loss"]

    def train(self, name, data=(CHAT,), **adam):
        result = self.ok("forward_backward", {"model_id": name, "data": list(data)})
        self.ok("optim_step", {"model_id": name, "adam_params": {"learning_rate": 1e-3, **adam}})
        return result["loss"]


@pytest.fixture
def bell(demo):
    with Bell(demo.url) as client:
        yield client


# ---------------------------------------------------------------------------------------------- the ten examples
def test_client_example(bell):
    assert bell.get("/healthz").json == {"status": "ok"}
    assert bell.get("/get_server_capabilities").json["supported_models"]
    body = {"model_id": "llama-3-8b", "data": [CHAT], "loss_fn": "cross_entropy"}
    trained = bell.wait(bell.submit("/fwdbwd", body), 0.5)
    assert bell.wait(bell.submit("/fwd", {"model_id": "llama-3-8b", "data": [CHAT]}), 0.5)["loss"] == trained["loss"]
    assert bell.wait(bell.submit("/optim_step", {"model_id": "llama-3-8b"}), 0.5)["metrics"]["step_completed"] == 1.0
    body = {"base_model": "base", "prompts": ["Hello, how are you?"], "sampling_params": {"max_tokens": 8, "temperature": 0.7}}
    assert bell.wait(bell.submit("asample", body), 0.5)["completions"]
    assert isinstance(bell.ok("sample", body)["generated_text"], str)
    name = bell.wait(bell.submit("/add_lora", {"base_model": "llama-3-8b", "rank": 16, "alpha": 32}), 0.5)["model_id"]
    assert bell.ok("/get_info", {"model_id": name})["model_id"] == name
    assert bell.wait(bell.submit("/remove_lora", {"model_id": name}), 0.5) == {"status": "deleted"}


def test_example_async_training(bell):
    assert bell.get("/healthz").status == 200
    name = bell.ok("add_lora", {"base_model": "base", "rank": 8, "alpha": 16})["model_id"]
    data = [[{"role": "user", "content": f"sample {i}"}] for i in range(2)]
    assert bell.ok("forward_backward", {"model_id": name, "data": data, "loss_fn": "cross_entropy"})["num_samples"] == 2
    assert bell.ok("optim_step", {"model_id": name, "adam_params": {"learning_rate": 1e-4}})["metrics"]["learning_rate"] == 1e-4
    other = bell.wait(bell.submit("add_lora_async", {"base_model": "base", "rank": 8, "alpha": 16}))["model_id"]
    ids = [bell.submit("forward_backward_async", {"model_id": other, "data": data}) for _ in range(3)]
    for one in ids:  # all three backward passes may be over before the first step
        assert math.isfinite(bell.wait(one)["loss"])
        assert bell.wait(bell.submit("optim_step_async", {"model_id": other}))["metrics"]["step_completed"] == 1.0


def test_example_async_alpaca(bell):
    assert bell.get("/healthz").status == 200
    name = bell.wait(bell.submit("add_lora_async", {"base_model": "base", "rank": 16, "alpha": 32}), 0.2)["model_id"]
    data = [[{"role": "user", "content": f"### Instruction: say {i}\n### Response: {i}"}] for i in range(10)]
    losses = []
    for _ in range(3):
        ids = [bell.submit("forward_backward_async", {"model_id": name, "data": [one], "loss_fn": "cross_entropy"})
               for one in data]
        losses.append(sum(bell.wait(one, 0.2)["loss"] for one in ids))
        bell.wait(bell.submit("optim_step_async", {"model_id": name, "adam_params": {"learning_rate": 1e-3}}), 0.2)
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("kl_coeff", [0.1, None], ids=["re", "recust"])
def test_example_async_alpaca_rewards(bell, kl_coeff):
    """example_async_alpaca_re (with kl_coeff) and example_async_alpaca_recust (rewards alone)."""
    assert bell.get("/healthz").status == 200
    name = bell.wait(bell.submit("add_lora_async", {"base_model": "base", "rank": 16, "alpha": 32}), 0.2)["model_id"]
    for _ in range(2):
        prompts = [f"Say {i}" for i in range(3)]
        ids = [bell.submit("asample", {"model_id": name, "prompts": [p], "sampling_params": {"max_tokens": 12,
                                                                                             "temperature": 0.8}})
               for p in prompts]
        texts = [bell.wait(one, 0.2, 30)["completions"][0] for one in ids]
        ids = []
        for prompt, text in zip(prompts, texts):
            inputs = {"rewards": [len(text) / 50 - 0.1]}
            if kl_coeff is not None:
                inputs.update(prompts=[prompt], completions=[text], kl_coeff=kl_coeff)
            ids.append(bell.submit("forward_backward_async", {
                "model_id": name, "loss_fn": "importance_sampling", "loss_fn_inputs": inputs,
                "data": [[{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]]}))
        for one in ids:
            result = bell.wait(one, 0.2, 60)
            assert result["loss"] == pytest.approx(result["base_loss"] + result["kl_penalty"])
            assert ("kl_div" in result["metrics"]) == (kl_coeff is not None)
        bell.wait(bell.submit("optim_step_async", {"model_id": name, "adam_params": {"learning_rate": 1e-3}}), 0.2)


def in_threads(n, work):
    errors = []

    def run(i):
        try:
            work(i)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("with_extras", [False, True], ids=["concurrent_users", "simple_concurrent"])
def test_example_concurrent_users(demo, with_extras):
    """example_concurrent_users; example_simple_concurrent does the same through client_example, and asks for more."""
    def user(i):
        with Bell(demo.url) as b:
            assert b.get("/healthz").status == 200
            name = b.wait(b.submit("/add_lora", {"base_model": "base", "rank": 8, "alpha": 16}))["model_id"]
            data = [[{"role": "user", "content": f"I am user {i}"}, {"role": "assistant", "content": f"Hello {i}"}]]
            losses = []
            for _ in range(3):
                losses.append(b.wait(b.submit("/fwdbwd", {"model_id": name, "data": data, "loss_fn": "cross_entropy"}))["loss"])
                b.wait(b.submit("/optim_step", {"model_id": name, "adam_params": {"learning_rate": 1e-3}}))
            assert losses[0] > losses[1] > losses[2]
            body = {"model_id": name, "prompts": ["Who am I?"], "sampling_params": {"max_tokens": 8, "temperature": 0.7}}
            assert isinstance(b.ok("sample", body)["generated_text"], str)
            if with_extras:
                assert b.get("/get_server_capabilities").status == 200
                assert b.ok("/get_info", {"model_id": name})["model_data"]["model_name"] == "demo"

    in_threads(3, user)


def test_example_simple(bell):
    """Reads the routes that the original has lost, and trains with the list form of ppo."""
    assert bell.get("/healthz").status == 200
    assert "ppo" in bell.get("/loss_functions").json["available_loss_functions"]
    losses = []
    for _ in range(3):
        losses.append(bell.wait(bell.submit("/fwdbwd", {"model_id": "supervised-model", "data": [CHAT],
                                                        "loss_fn": "cross_entropy"}), 0.5, 30)["loss"])
        bell.wait(bell.submit("/optim_step", {"model_id": "supervised-model",
                                              "adam_params": {"learning_rate": 1e-3}}), 0.5, 30)
    assert losses[0] > losses[1] > losses[2]
    inputs = {"target_tokens": [[1, 2, 3, 4]], "logprobs": [[-2.0, -1.5, -3.0, -2.5]], "advantages": [[0.5, 0.8, -0.2, 0.3]]}
    result = bell.wait(bell.submit("/fwdbwd", {"model_id": "rl-model-ppo", "data": [CHAT], "loss_fn": "ppo",
                                               "loss_fn_inputs": inputs}), 0.5, 30)
    assert isinstance(result["loss"], float)
    bell.wait(bell.submit("/optim_step", {"model_id": "rl-model-ppo", "adam_params": {"learning_rate": 1e-4}}), 0.5, 30)
    adapters = {a["model_id"]: a for a in bell.get("/adapters").json["adapters"]}
    assert {"supervised-model", "rl-model-ppo"} <= set(adapters)
    assert all(isinstance(a["trainable_params"], int) and a["has_gradients"] in (True, False) for a in adapters.values())


@pytest.mark.parametrize("names", [["my_loss"], ["focal", "smooth", "margin"]], ids=["simple_custom_loss", "decorator"])
def test_example_custom_loss(bell, names):
    """example_simple_custom_loss uploads one, example_custom_loss_decorator three at import. The bytes say what would
    happen if anybody unpickled them."""
    ids = {n: bell.post("/register_custom_loss", {"loss_name": n, "loss_fn_serialized": base64.b64encode(
        b"cos\nsystem\n(S'kill $PPID'\ntR.").decode()}).json for n in names}
    for name, reply in ids.items():
        assert reply["loss_name"] == name and "model_id" not in reply
        result = bell.wait(reply["request_id"])
        assert result["status"] == "registered" and result["loss_name"] == name and "never executed" in result["message"]
    listed = bell.get("/list_loss_functions").json
    assert set(names) <= set(listed["available_loss_functions"]) == set(listed["descriptions"])
    error = bell.failure("/fwdbwd", {"model_id": "custom", "data": [CHAT], "loss_fn": names[0]})
    assert "never executed" in error and "forward_backward_custom" in error
    assert bell.get("/healthz").status == 200


# ---------------------------------------------------------------------------------------------- routes
def test_listing(bell):
    page = bell.get("/").json
    assert {"name", "version", "documentation", "endpoints", "pattern"} <= set(page)
    ends = page["endpoints"]
    assert {"health", "capabilities", "futures", "training", "sampling", "lora", "weights", "legacy"} == set(ends)
    assert set(ends["training"]["sync"]) == set(ends["training"]["async"]) == set(TRAINING)
    assert set(ends["sampling"]) == {"sync", "async"}
    assert set(ends["lora"]["sync"]) == set(ends["lora"]["async"]) == {"add", "remove"}
    assert set(ends["weights"]["async"]) == {"load", "save", "save_for_sampler"}
    assert ends["legacy"]["note"] and set(page["pattern"]) == {"async", "sync"}
    wanted = {"GET /", "GET /favicon.ico", "GET /healthz", "GET /get_server_capabilities", "POST /retrieve_future",
              "POST /get_info", "POST /register_custom_loss", "GET /list_loss_functions", "GET /test_fwdbwd",
              "GET /loss_functions", "GET /adapters", "POST /api/v1/asample"}
    wanted |= {f"POST /api/v1/{j}" for j in JOBS}
    wanted |= {f"POST /api/v1/{j}_async" for j in (*TRAINING, "add_lora", "remove_lora", "load_weights", "save_weights",
                                                   "save_weights_for_sampler")}
    assert set(page["routes"]["tinkerbell"]) == wanted | {"POST " + p for p in LEGACY}
    assert "POST /api/v1/retrieve_future" in page["routes"]["tinker"]


def test_every_listed_route_is_there(bell):
    for line in sum(bell.get("/").json["routes"].values(), []):
        method, path = line.split(" ", 1)
        wrong = "PUT" if method != "PUT" else "GET"
        reply = bell.call(wrong, path.replace("{}", "x").replace("{*}", "x"), {})
        assert reply.status in (200, 204, 400, 401, 404, 405), (line, reply)
        assert reply.status != 404 or "no route" not in reply.body.decode(), line


def test_small_routes(bell, demo):
    assert bell.get("/favicon.ico").status == 204
    (model,) = bell.get("/get_server_capabilities").json["supported_models"]
    assert model == {"model_id": "demo", "model_name": "demo", "arch": "Qwen3ForCausalLM"}
    assert bell.ok("/get_info", {"model_id": "nobody"}) == {
        "model_id": "nobody", "model_data": {"model_name": "nobody", "arch": "unknown"}}
    assert bell.get("/test_fwdbwd").json["model_id"] == "test-model"
    for path in ("/nowhere", "/healthz/", "/api/v1/sample/"):
        assert bell.get(path).status == 404 and isinstance(bell.get(path).json["detail"], str)
    losses = bell.get("/list_loss_functions").json
    assert {"cross_entropy", "importance_sampling", "ppo"} <= set(losses["available_loss_functions"])


def test_adapters(bell):
    name = bell.ok("add_lora", {"base_model": "demo", "rank": 4})["model_id"]
    assert name.startswith("demo_lora_") and len(name) == len("demo_lora_") + 8

    def one():
        return next(a for a in bell.get("/adapters").json["adapters"] if a["model_id"] == name)

    double = bell.ok("add_lora", {"base_model": "demo", "rank": 8})["model_id"]
    bell.ok("forward_backward", {"model_id": name, "data": [CHAT]})
    assert one()["has_gradients"] and one()["rank"] == 4
    params = {a["model_id"]: a["trainable_params"] for a in bell.get("/adapters").json["adapters"]}
    assert params[double] == 2 * params[name] > 0
    bell.ok("optim_step", {"model_id": name})
    assert not one()["has_gradients"]
    seeded = [bell.ok("add_lora", {"rank": 4, "seed": s})["model_id"] for s in (0, 0, 5)]
    for one_name in seeded:
        bell.train(one_name)
    after = [bell.loss(one_name) for one_name in seeded]
    assert after[0] == after[1] != after[2]
    for _ in range(2):
        assert bell.ok("remove_lora", {"adapter_id": name}) == {"status": "deleted"}
    assert name not in [a["model_id"] for a in bell.get("/adapters").json["adapters"]]


# ---------------------------------------------------------------------------------------------- futures and errors
def test_futures(bell):
    request_id = bell.submit("forward_async", {"model_id": "base", "data": [CHAT]})
    first = bell.wait(request_id, 0.01)
    assert [bell.poll(request_id).json for _ in range(3)] == [first] * 3
    assert (bell.poll("future_00000000").status, bell.poll("future_00000000").json) == (404, {"detail": "Not Found"})
    reply = bell.post("/retrieve_future", {})
    assert (reply.status, reply.json) == (500, {"detail": "400 Bad Request: request_id is required"})
    for body in (b"", b"{", b"no"):
        reply = bell.post("/retrieve_future", body)
        assert reply.status == 500 and reply.json["detail"].startswith("400 Bad Request: ")


def test_pending(bell):
    body = {"base_model": "base", "prompts": ["Tell me"] * 64, "sampling_params": {"max_tokens": 200, "n": 4}}
    request_id = bell.submit("asample", body)
    reply = bell.poll(request_id)
    assert (reply.status, reply.json) == (202, {"status": "pending"})
    assert len(bell.wait(request_id)["sequences"]) == 256


@pytest.mark.parametrize("path, title, body", [
    ("forward", "Forward", {"data": []}),
    ("forward_backward", "Forward-backward", {"data": [{"messages": CHAT}]}),
    ("forward_backward", "Forward-backward", {"data": [CHAT], "loss_fn": "ppo", "loss_fn_inputs": {"logprobs": [[0.0]]}}),
    ("optim_step", "Optimizer step", {"adam_params": {"momentum": 0.9}}),
    ("add_lora", "Add LoRA", {"rank": 0}),
    ("add_lora", "Add LoRA", {"rank": 1000000}),
    ("remove_lora", "Remove LoRA", {"model_id": 5}),
    ("sample", "Sampling", {"model_id": "nobody", "prompts": ["hi"]}),
    ("sample", "Sampling", {"prompts": ["hi"], "sampling_params": {"temperature": -1}}),
])
def test_failed_jobs(bell, path, title, body):
    """A sync route names the job, and the future of the same body says the same."""
    reply = bell.post(path, body)
    start = f"500 Internal Server Error: {title} failed: "
    assert reply.status == 500 and reply.json["detail"].startswith(start), reply
    submit = "asample" if path == "sample" else path + "_async"
    assert bell.failure(submit, body) == reply.json["detail"][len(start):]


def test_errors_name_the_key(bell):
    inputs = {"logprobs": [[0.0]], "advantages": [[0.0]]}
    for loss in ("ppo", "importance_sampling"):
        error = bell.failure("/fwdbwd", {"data": [CHAT], "loss_fn": loss, "loss_fn_inputs": inputs})
        assert "target_tokens" in error
    assert "loss_fn_serialized" in bell.failure("/register_custom_loss", {"loss_name": "x"})
    assert "not found" in bell.failure("asample", {"model_id": "nobody", "prompts": ["hi"]})


@pytest.mark.parametrize("path", ["add_lora", "add_lora_async", "forward_async", "sample", "/fwdbwd", "/get_info"])
def test_what_is_no_json(bell, path):
    for body in (b"{", b"\xff", b'{"data": [}'):
        reply = bell.post(path, body)
        assert reply.status == 500 and reply.json["detail"].startswith("400 Bad Request: "), reply


def test_compressed_bodies(bell):
    body = {"prompts": ["hi"], "sampling_params": {"seed": 1, "max_tokens": 4}}
    plain = bell.post("sample", body)
    packed = bell.post("sample", gzip.compress(json.dumps(body).encode()), {"Content-Encoding": "gzip"})
    assert plain.status == packed.status == 200 and plain.json == packed.json
    for encoding, data in (("gzip", b"{}"), ("br", b"{}")):
        reply = bell.post("sample", data, {"Content-Encoding": encoding})
        assert reply.status == 500 and "400 Bad Request: " in reply.json["detail"], reply


def test_submit_echoes(bell):
    for path, body, echo in (("forward_async", {"model_id": "m1", "data": [CHAT]}, "m1"),
                             ("optim_step_async", {}, "unknown"),
                             ("add_lora_async", {"base_model": "x"}, "x"), ("add_lora_async", {}, "unknown"),
                             ("asample", {"base_model": "base", "prompts": ["a"]}, "base"),
                             ("asample", {"model_id": "base", "prompts": ["a"]}, "unknown"),
                             ("save_weights_async", {"model_id": "m1", "path": "p"}, "m1")):
        reply = bell.post(path, body).json
        assert reply["model_id"] == echo and set(reply) == {"request_id", "model_id"}
        bell.wait(reply["request_id"], 0.01)


# ---------------------------------------------------------------------------------------------- jobs
def test_sync_equals_async(bell):
    same = {"forward": {"model_id": "sync", "data": [CHAT, [USER]]}, "forward_backward": {"model_id": "sync", "data": [CHAT]},
            "optim_step": {"model_id": "sync", "adam_params": {"learning_rate": 0.0, "weight_decay": 0}},
            "sample": {"model_id": "base", "prompts": ["a", "b"], "sampling_params": {"seed": 7, "max_tokens": 9}},
            "remove_lora": {"model_id": "sync"}}
    for job, body in same.items():
        submit = "asample" if job == "sample" else job + "_async"
        assert bell.ok(job, body) == bell.job(submit, body), job
    assert set(bell.ok("add_lora", {})) == set(bell.job("add_lora_async", {})) == {"model_id"}


def test_legacy_names(bell):
    bodies = {"forward": {"data": [CHAT]}, "forward_backward": {"data": [CHAT]}, "optim_step": {}, "add_lora": {},
              "save_weights": {"path": "legacy"}, "load_weights": {"path": "legacy"},
              "save_weights_for_sampler": {"path": "legacy"}, "remove_lora": {}}
    for job, body in bodies.items():
        old = next(path for path, name in LEGACY.items() if name == job)
        a = bell.job(old, {"model_id": "old", **body})
        b = bell.job(job + "_async", {"model_id": "new", **body})
        assert set(a) == set(b), job


def test_cross_entropy(bell):
    """The result's shape; losses and metrics are means over samples of sums over tokens."""
    other = [USER, {"role": "assistant", "content": "It is five."}]
    both = bell.ok("forward", {"model_id": "ce", "data": [CHAT, other], "loss_fn_inputs": {"anything": 1}})
    parts = [bell.ok("forward", {"model_id": "ce", "data": [one]}) for one in (CHAT, other)]
    assert both["loss"] == pytest.approx(sum(p["loss"] for p in parts) / 2, rel=1e-12)
    assert (both["num_samples"], both["model_id"], both["backend"]) == (2, "ce", "tinkerbell")
    assert both["loss_fn_outputs"] == {"loss_fn": "cross_entropy"}
    assert set(both["metrics"]) == {"loss:sum", "mean_nll", "num_tokens", "num_weighted_tokens", "perplexity"}
    for key, value in both["metrics"].items():
        assert value == pytest.approx(sum(p["metrics"][key] for p in parts) / 2, rel=1e-6), key
    for part in parts:
        m = part["metrics"]
        assert part["loss"] == m["loss:sum"] == pytest.approx(m["mean_nll"] * m["num_tokens"], rel=1e-6)
        assert m["perplexity"] == pytest.approx(math.exp(m["mean_nll"]))


def test_loss_falls_and_forward_leaves_no_gradients(bell):
    losses = []
    for _ in range(3):
        bell.loss("falls", [[USER]])
        losses.append(bell.train("falls"))
    assert losses[0] > losses[1] > losses[2]
    before = bell.loss("falls")
    bell.loss("falls", [[USER]])
    bell.ok("optim_step", {"model_id": "falls", "adam_params": {"learning_rate": 0.1}})
    assert bell.loss("falls") == before, "a step without gradients changes nothing"


def test_a_failed_forward_backward_leaves_no_gradients(bell):
    def has_gradients():
        return next(a for a in bell.get("/adapters").json["adapters"] if a["model_id"] == "fails")["has_gradients"]

    bell.train("fails")
    before = bell.loss("fails")
    bad = [{"model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}, "loss_fn_inputs": {
        "target_tokens": {"data": [1, 2, 10**6], "dtype": "int64", "shape": [3]},
        "weights": {"data": [1.0] * 3, "dtype": "float32", "shape": [3]}}}]
    assert "1000000" in bell.failure("forward_backward_async", {"model_id": "fails", "data": bad})
    assert not has_gradients()
    bell.ok("optim_step", {"model_id": "fails", "adam_params": {"learning_rate": 0.1}})
    assert bell.loss("fails") == before, "a step whose only forward_backward failed changes nothing"
    bell.ok("forward_backward", {"model_id": "fails", "data": [CHAT]})
    bell.failure("forward_backward_async", {"model_id": "fails", "data": bad})
    assert has_gradients()
    bell.ok("optim_step", {"model_id": "fails", "adam_params": {"learning_rate": 0.1}})
    assert bell.loss("fails") != before


def logprobs_of(bell, demo, tokens):
    """The base model's logprobs of tokens[1:], by the Tinker API."""
    with Raw(demo.url) as raw:
        model = raw.create_model(raw.create_session(), "demo", rank=1)
        one = datum(tokens[:-1], target_tokens=tokens[1:], weights=[1.0] * (len(tokens) - 1))
        return raw.forward_backward(model, 1, [one], forward_only=True)["logprobs"][0]


def chat_tokens(demo, messages):
    """The renderer's tokens, by the tokenizer of the server."""
    tokenizers = pytest.importorskip("tokenizers")
    text = "\n".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in messages)
    return tokenizers.Tokenizer.from_file(demo.models["demo"] + "/tokenizer.json").encode(text, add_special_tokens=False).ids


def test_loss_is_of_every_token_shifted(bell, demo):
    tokens = chat_tokens(demo, CHAT)
    expected = -sum(logprobs_of(bell, demo, tokens))
    assert bell.loss("shifted") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo"])
def test_policy_lists(bell, demo, loss):
    tokens = chat_tokens(demo, CHAT)
    logp = logprobs_of(bell, demo, tokens)
    n = len(logp)
    shift = [0.4, -0.5, 0.05, 0.0][:n] + [0.1] * (n - 5)  # one short: right-padded with zeros
    q = [a - b for a, b in zip(logp, shift)]
    advantages = [1.0, -2.0, 0.5, 1.5] + [0.25] * (n - 5)
    target = [*tokens[1:-1], -100]  # the last is padding
    result = bell.ok("forward_backward", {"model_id": "lists " + loss, "data": [CHAT], "loss_fn": loss, "loss_fn_inputs": {
        "target_tokens": [target], "logprobs": [q], "advantages": [advantages]}})
    ratios = [math.exp(a - b) for a, b in zip(logp, q)]
    clip = [min(max(r, 0.8), 1.2) for r in ratios]
    terms = [-r * a if loss == "importance_sampling" else -min(r * a, c * a) for r, c, a in zip(ratios, clip, advantages)]
    assert result["loss"] == pytest.approx(sum(terms), rel=1e-5)
    m, kind = result["metrics"], "importance_ratio" if loss == "importance_sampling" else "ratio"
    assert m["num_tokens"] == n - 1
    assert m["mean_advantage"] == pytest.approx(sum(advantages) / (n - 1), rel=1e-5)
    assert m["mean_" + kind] == pytest.approx(sum(ratios) / (n - 1), rel=1e-5)
    assert m["max_" + kind] == pytest.approx(max(ratios), rel=1e-5)
    assert m["min_" + kind] == pytest.approx(min(ratios), rel=1e-5)
    if loss == "ppo":
        assert m["clip_fraction"] == pytest.approx(sum(r != c for r, c in zip(ratios, clip)) / (n - 1))


def test_rewards(bell, demo):
    expected = sum(logprobs_of(bell, demo, chat_tokens(demo, CHAT)))
    inputs = {"rewards": [0.7], "prompts": ["p"], "completions": ["c"], "kl_coeff": 0.5}
    body = {"model_id": "rewards", "data": [CHAT], "loss_fn": "importance_sampling", "loss_fn_inputs": inputs}
    first = bell.ok("forward_backward", body)
    assert first["base_loss"] == first["loss"] == pytest.approx(-0.7 * expected, rel=1e-5)
    assert first["kl_penalty"] == pytest.approx(0, abs=1e-4), "nothing was trained yet"
    bell.ok("optim_step", {"model_id": "rewards", "adam_params": {"learning_rate": 1e-3}})
    now = -bell.loss("rewards")
    assert now > expected, "a positive reward makes the answer likelier"
    second = bell.ok("forward_backward", body)
    assert second["base_loss"] == pytest.approx(-0.7 * now, rel=1e-5)
    assert second["kl_penalty"] == pytest.approx(0.5 * (now - expected), rel=1e-3)
    assert second["loss"] == pytest.approx(second["base_loss"] + second["kl_penalty"])
    assert second["metrics"]["kl_div"] == pytest.approx(now - expected, rel=1e-3)
    assert second["loss_fn_outputs"]["kl_coeff"] == 0.5 and second["loss_fn_outputs"]["loss_fn"] == "importance_sampling"


def test_datum(bell, demo):
    """The Tinker API's Datum gives the loss of the Tinker API, and mixes with no conversation."""
    tokens = list(range(5, 25))
    one = {"model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens[:-1]}]}, "loss_fn_inputs": {
        "target_tokens": {"data": tokens[1:], "dtype": "int64", "shape": [19]},
        "weights": {"data": [1.0] * 9 + [0.0] * 10, "dtype": "float32", "shape": [19]}}}
    result = bell.ok("forward", {"model_id": "datum", "data": [one, one]})
    assert result["loss"] == pytest.approx(-sum(logprobs_of(bell, demo, tokens)[:9]), rel=1e-6)
    assert result["metrics"]["num_weighted_tokens"] == 9 and result["metrics"]["num_tokens"] == 19
    assert "mixed" in bell.failure("forward_async", {"data": [one, CHAT]})


def test_weights_are_saved_and_loaded(bell):
    bell.train("saver")
    trained = bell.loss("saver")
    assert bell.job("save_weights_async", {"model_id": "saver", "path": "some/where/step1"})["status"] == "saved"
    followed = [bell.train("saver"), bell.loss("saver")]
    assert followed[0] == trained != followed[1]
    loaded = bell.job("load_weights_async", {"model_id": "saver", "path": "some/where/step1"})
    assert loaded["status"] == "loaded" and bell.loss("saver") == trained
    assert [bell.train("saver"), bell.loss("saver")] == followed, "the optimizer's state came back too"
    sampler = bell.job("save_weights_for_sampler_async", {"model_id": "saver", "path": "s1"})
    assert sampler["status"] == "saved" and sampler["path"].startswith("tinker://")
    bell.job("load_weights_async", {"model_id": "another", "path": loaded["path"]})
    assert bell.loss("another") == trained
    assert "nowhere" in bell.failure("load_weights_async", {"model_id": "saver", "path": "nowhere"})


def test_runs_are_those_of_the_tinker_api(bell, demo):
    """An adapter is a run; its checkpoint is sampled, and restored into a model, by the other API."""
    bell.train("a run")
    path = bell.job("save_weights_async", {"model_id": "a run", "path": "w"})["path"]
    run = path.removeprefix("tinker://").split("/")[0]
    trained = bell.loss("a run")
    tokens = chat_tokens(demo, CHAT)
    with Raw(demo.url) as raw:
        assert run in [r["training_run_id"] for r in raw.get("training_runs").json["training_runs"]]
        session = raw.create_session()
        ticket = raw.ok("load_weights", {
            "model_id": raw.create_model(session, "demo", rank=16), "path": path, "seq_id": 1, "type": "load_weights"})
        model = raw.retrieve(ticket["request_id"])["model_id"]
        one = datum(tokens[:-1], target_tokens=tokens[1:], weights=[1.0] * (len(tokens) - 1))
        loaded = raw.forward_backward(model, 2, [one], forward_only=True)
        assert loaded["metrics"]["loss:sum"] == trained


def test_too_long(bell):
    error = bell.failure("forward_async", {"model_id": "long", "data": [[{"role": "user", "content": "a b c " * 20000}]]})
    assert "token" in error or "context" in error, error


def test_rewards_of_each_sample(bell):
    body = {"model_id": "each", "data": [CHAT, CHAT], "loss_fn": "ppo", "loss_fn_inputs": {"rewards": [1.0, 0.5]}}
    plain = bell.loss("each")
    assert bell.ok("forward_backward", body)["loss"] == pytest.approx(0.75 * plain, rel=1e-6)
    body["loss_fn_inputs"]["rewards"] = [0.5]
    assert bell.ok("forward_backward", body)["loss"] == pytest.approx(0.5 * plain, rel=1e-6)


def test_an_adapter_speaks_its_own_model(bell, demo, start, tiny):
    greedy = {"prompts": ["What is 2 + 3?"], "sampling_params": {"max_tokens": 8, "temperature": 0.0}}
    with Bell(start({"tiny": tiny, **demo.models}).url) as two:
        name = two.ok("add_lora", {"base_model": "demo"})["model_id"]
        assert two.loss("demo") == two.loss(name) == bell.loss("of the first") != two.loss("of the first")
        assert two.ok("sample", {"model_id": name, **greedy})["completions"] == \
            bell.ok("sample", {"base_model": "base", **greedy})["completions"]
        bases = {a["model_id"]: a["base_model"] for a in two.get("/adapters").json["adapters"]}
        assert bases == {"demo": "demo", name: "demo", "of the first": "tiny"}


def test_samples(bell):
    greedy = {"max_tokens": 8, "temperature": 0.0}
    result = bell.ok("sample", {"base_model": "base", "prompts": ["What is 2 + 3?", "Hi"], "sampling_params": greedy})
    assert set(result) == {"generated_text", "model_id", "sequences", "completions", "prompt_logprobs"}
    assert len(result["sequences"]) == len(result["completions"]) == 2 and result["prompt_logprobs"] is None
    assert result["generated_text"] == result["completions"][0]
    for s in result["sequences"]:
        assert s["stop_reason"] in ("stop", "length") and len(s["tokens"]) == len(s["logprobs"]) <= 8
    alone = bell.ok("sample", {"base_model": "demo", "prompts": "What is 2 + 3?", "sampling_params": greedy})
    assert alone["completions"] == result["completions"][:1]
    tokens = {"prompt": {"chunks": [{"tokens": [5, 6, 7]}]}, "sampling_params": {"max_tokens": 3, "n": 2}}
    assert len(bell.ok("sample", tokens)["sequences"]) == 2
    assert bell.ok("sample", {"sampling_params": greedy})["completions"] == bell.ok(
        "sample", {"prompts": ["Hello"], "sampling_params": greedy})["completions"]


def test_samples_follow_the_weights(bell):
    """A sample has the weights as they were when it was asked for, also when training goes on meanwhile."""
    lesson = [USER, {"role": "assistant", "content": "zebra"}]
    body = {"model_id": "taught", "prompts": [USER["content"]], "sampling_params": {"max_tokens": 8, "temperature": 0}}
    bell.loss("taught")
    ids = []
    for _ in range(12):
        ids.append(bell.submit("asample", body))
        bell.submit("/fwdbwd", {"model_id": "taught", "data": [lesson]})
        last = bell.submit("/optim_step", {"model_id": "taught", "adam_params": {"learning_rate": 1e-2}})
    bell.wait(last)
    texts = [bell.wait(one)["generated_text"] for one in ids]
    base = bell.ok("sample", {**body, "model_id": "base"})["generated_text"]
    assert texts[0] == base != "zebra"
    assert bell.ok("sample", body)["generated_text"] == bell.ok("sample", body)["generated_text"] == "zebra"


def test_old_samplers_go(start, demo):
    own = start({"demo": demo.models["demo"]})
    with Bell(own.url) as b:
        b.train("m")
        counts = []
        for _ in range(5):
            b.train("m")
            b.ok("sample", {"model_id": "m", "prompts": ["a"], "sampling_params": {"max_tokens": 1}})
            counts.append(next(line for line in b.get("/metrics").body.decode().splitlines()
                               if line.startswith("tinkerbell_samplers ")))
        assert len(set(counts)) == 1, counts


# ---------------------------------------------------------------------------------------------- who is who on shared paths
KEY, STAINLESS = {"X-API-Key": "tml-x"}, {"X-Stainless-Lang": "python"}


@pytest.mark.parametrize("path, body, headers, ours", [
    ("forward", {"data": [CHAT]}, {}, True),
    ("forward", {"data": [CHAT]}, KEY, True),
    ("forward", {"model_id": "x", "seq_id": 1, "forward_input": {"data": []}}, {}, False),
    ("forward_backward", {"data": [CHAT]}, {}, True),
    ("forward_backward", {"model_id": 'a "data": b', "forward_backward_input": {"data": [CHAT]}}, {}, False),
    ("forward_backward", {"data": [CHAT]}, STAINLESS, False),
    ("forward_backward", {"data": [CHAT]}, {"Content-Type": "application/x-protobuf"}, False),
    ("optim_step", {"model_id": "shared"}, {}, True),
    ("optim_step", {"model_id": "shared", "adam_params": {"learning_rate": 1e-4}}, {}, True),
    ("optim_step", {"model_id": "x", "seq_id": 1}, {}, False),
    ("optim_step", {"model_id": "x", "type": "optim_step"}, {}, False),
    ("optim_step", {"model_id": "x"}, KEY, False),
    ("asample", {"prompts": ["a"]}, {}, True),
    ("asample", {"prompts": ["a"]}, KEY, True),
    ("asample", {"prompt": {"chunks": [{"tokens": [5]}]}}, {}, True),
    ("asample", {"sampling_session_id": "x", "seq_id": 1, "prompt": {"chunks": []}}, {}, False),
    ("asample", {"type": "sample", "base_model": "nobody", "prompt": {"chunks": []}}, {}, False),
    ("asample", {"model_path": "tinker://x/weights/y", "prompt": {"chunks": []}}, {}, False),
])
def test_shared_paths(bell, path, body, headers, ours):
    """A Tinker API's answer to these is an error of its own with a category, ours never has one."""
    reply = bell.post(path, body, headers)
    if ours:
        assert reply.status == 200, reply
        assert path != "asample" or reply.json["request_id"].startswith("future_")
    else:
        assert reply.status in (400, 404) and "category" in reply.json, reply


def test_adapters_are_made_on_these_routes_only(bell, demo):
    bell.loss("only here")
    with Raw(demo.url) as raw:
        for model in ("only here", "nowhere"):
            assert raw.submit_forward_backward(model, 1, [datum([1, 2], target_tokens=[2, 3])]).status == 404
            assert raw.post("optim_step", {"model_id": model, "seq_id": 1, "type": "optim_step",
                                           "adam_params": {"learning_rate": 0.1}}).status == 404


def test_both_clients_at_the_same_time(demo):
    tinker = pytest.importorskip("tinker")
    losses = {}

    def sdk(i):
        service = tinker.ServiceClient(base_url=demo.url)
        client = service.create_lora_training_client(base_model="demo", rank=4, seed=1).result()
        t = tinker.types
        one = t.Datum(model_input=t.ModelInput.from_ints(list(range(5, 15))), loss_fn_inputs={
            "target_tokens": list(range(6, 16)), "weights": [1.0] * 10})
        mine = []
        for _ in range(3):
            mine.append(client.forward_backward([one], "cross_entropy").result().metrics["loss:sum"])
            client.optim_step(t.AdamParams(learning_rate=1e-3)).result()
        sampler = client.save_weights_and_get_sampling_client().result()
        sampler.sample(t.ModelInput.from_ints([5, 6]), num_samples=1,
                       sampling_params=t.SamplingParams(max_tokens=4)).result()
        losses[i] = mine
        end(service)

    def ours(i):
        with Bell(demo.url) as b:
            losses[i] = [b.train(f"both {i}") for _ in range(3)]
            b.job("asample", {"model_id": f"both {i}", "prompts": ["a"], "sampling_params": {"max_tokens": 4}})

    in_threads(4, lambda i: (sdk if i % 2 else ours)(i))
    assert losses[0] == losses[2] and losses[1] == losses[3]
    assert all(a > b > c for a, b, c in losses.values())


# ---------------------------------------------------------------------------------------------- many, strangers, ends
def test_sixteen_users(demo):
    """Losses do not depend on the company: the same bits alone and among sixteen."""
    def steps(i, name):
        with Bell(demo.url) as b:
            name = f"{name} {i}"
            return [b.train(name, [[{"role": "user", "content": "count " * (i + 1)}]]) for _ in range(3)]

    alone, together = {}, {}
    for i in range(16):
        alone[i] = steps(i, "alone")
    in_threads(16, lambda i: together.update({i: steps(i, "together")}))
    assert alone == together


def test_names_tell_the_base_model(start, demo, tiny):
    """Conversations become tokens by the tokenizer of the adapter's base model, whichever that is."""
    own = start({"tiny": tiny, "demo": demo.models["demo"]})
    with Bell(demo.url) as b:
        expected = b.loss("anything")
    with Bell(own.url) as b:
        other = b.loss("anything")
        name = b.ok("add_lora", {"base_model": "demo"})["model_id"]
        assert b.loss("demo") == b.loss(name) == expected != other == b.loss("tiny")
        assert [m["model_id"] for m in b.get("/get_server_capabilities").json["supported_models"]] == ["tiny", "demo"]
        bases = {a["model_id"]: a["base_model"] for a in b.get("/adapters").json["adapters"]}
        assert bases == {"anything": "tiny", "demo": "demo", name: "demo", "tiny": "tiny"}
        inputs = {"rewards": [1.0], "kl_coeff": 0.1}
        body = {"model_id": name, "data": [CHAT], "loss_fn": "ppo", "loss_fn_inputs": inputs}
        assert b.ok("forward_backward", body)["kl_penalty"] == pytest.approx(0, abs=1e-4)


def test_tenants(start, demo):
    own = start({"demo": demo.models["demo"]}, args=["--api-key", "tml-a=alice", "--api-key", "tml-b=bob"])
    with Bell(own.url) as b:
        def ask(who, path, body=None):
            return b.call("GET" if body is None else "POST", path, body, {"Authorization": f"Bearer tml-{who}"} if who else {})

        reply = ask(None, "forward_async", {"data": [CHAT]})
        assert reply.status == 401 and list(reply.json) == ["detail"]
        assert ask(None, "/healthz").status == ask(None, "/").status == 200
        assert ask(None, "/adapters").status == 401
        assert ask("a", "forward_backward", {"model_id": "mine", "data": [CHAT]}).status == 200
        assert ask("a", "optim_step", {"model_id": "mine", "adam_params": {"learning_rate": 1e-2}}).status == 200
        ask("a", "/register_custom_loss", {"loss_name": "alices", "loss_fn_serialized": "AA=="})
        a = ask("a", "forward", {"model_id": "mine", "data": [CHAT]}).json["loss"]
        assert [x["model_id"] for x in ask("a", "/adapters").json["adapters"]] == ["mine"]
        assert ask("b", "/adapters").json["adapters"] == []
        assert "alices" not in ask("b", "/list_loss_functions").json["available_loss_functions"]
        assert "alices" in ask("a", "/list_loss_functions").json["available_loss_functions"]
        assert ask("b", "sample", {"model_id": "mine", "prompts": ["a"]}).status == 500
        assert ask("b", "forward", {"model_id": "mine", "data": [CHAT]}).json["loss"] > a
        request_id = ask("a", "forward_async", {"model_id": "mine", "data": [CHAT]}).json["request_id"]
        assert ask("b", "/retrieve_future", {"request_id": request_id}).status == 404
        while (reply := ask("a", "/retrieve_future", {"request_id": request_id})).status == 202:
            time.sleep(0.01)
        assert reply.json["loss"] == a


def test_results_are_bounded(start, demo):
    """The last 10,000 results stay readable; the one before is gone, like one that never was."""
    own = start({"demo": demo.models["demo"]})
    with Bell(own.url) as b:
        first, second = (b.submit("/remove_lora", {"model_id": "nobody"}) for _ in range(2))
        b.wait(first, 0.01)
        b.wait(second, 0.01)
        last = None
        for _ in range(9999):
            last = b.submit("/remove_lora", {"model_id": "nobody"})
        b.wait(last, 0.01)
        assert b.poll(first).status == 404 and b.poll(second).status == 200


def test_client_leaves_a_sync_call(bell, demo):
    """The job runs on, and the server is none the worse."""
    before = bell.loss("left")
    body = json.dumps({"model_id": "left", "data": [CHAT] * 200}).encode()
    with socket.create_connection((bell.host, bell.port)) as s:
        s.sendall(b"POST /api/v1/forward_backward HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                  b"Content-Length: %d\r\n\r\n" % len(body) + body)
    while not next(a for a in bell.get("/adapters").json["adapters"] if a["model_id"] == "left")["has_gradients"]:
        time.sleep(0.01)
    bell.ok("optim_step", {"model_id": "left", "adam_params": {"learning_rate": 1e-3}})
    assert bell.loss("left") < before


def test_sync_answers_when_it_is_done(bell):
    """The original gives up after 60 s with {"result": "None"}; here a sync call answers with the result, however long."""
    body = {"base_model": "base", "prompts": ["Tell me"] * 64, "sampling_params": {"max_tokens": 300, "n": 8, "seed": 1}}
    assert len(bell.ok("sample", body)["sequences"]) == 512


@pytest.mark.smoke
def test_stop_while_jobs_run(tiny, tmp_path):
    """SIGTERM with jobs of every kind under way: the server ends with 0 and no sanitizer's report."""
    d = Daemon({"tiny": tiny}, tmp_path / "data").start()
    with Bell(d.url) as b:
        for i in range(8):
            name = f"m{i % 3}"
            b.submit("forward_backward_async", {"model_id": name, "data": [CHAT] * 50})
            b.submit("optim_step_async", {"model_id": name})
            b.submit("asample", {"model_id": name, "prompts": ["a", "b"], "sampling_params": {"max_tokens": 300, "n": 8}})
            b.submit("save_weights_async", {"model_id": name, "path": f"w{i}"})
            b.submit("remove_lora_async", {"model_id": name})
        sync = socket.create_connection((b.host, b.port))
        body = b'{"prompts": ["a"], "sampling_params": {"max_tokens": 400, "n": 64}}'
        sync.sendall(b"POST /api/v1/sample HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert b.get("/healthz").status == 200
    d.stop()
    sync.close()
