"""The full tour of one SDK release against one server: what each public method does, checked by its values.

    TINKER_BASE_URL=http://127.0.0.1:PORT TINKER_API_KEY=tml-x python3 sdk_tour.py RESULTS.json

sdk_matrix runs it in an environment of each release, in a folder that holds the served model "tiny" under its name (old
releases look for a tokenizer there). Rows are methods (Class.method) and features. Each check is a function that runs for
every row it is registered for; one that the release lacks is reported as absent and is not run.

Outcome of a row: works, hosted (only a hosted service has it, and the answer was the one written here), absent, needs torch,
or fails with the text of the exception.
"""

import asyncio
import contextlib
import functools
import importlib.metadata
import importlib.util
import inspect
import io
import json
import logging
import os
import pickle
import random
import sys
import tarfile
import time
import traceback
import typing
import urllib.request
import warnings

import numpy as np

MODEL, VOCAB = "tiny", 320
CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient")
HAVE_TORCH = importlib.util.find_spec("torch") is not None


class Row:
    def __init__(self, name, check, needs, torch, hosted):
        self.name, self.check, self.needs, self.torch, self.hosted = name, check, needs, torch, hosted


ROWS = []


def methods(*names, torch=False, hosted=None):
    """Registers a check for methods. hosted: what a hosted service would give, and what this server answers."""
    def register(check):
        ROWS.extend(Row(name, check, [name], torch, hosted) for name in names)
        return check
    return register


def feature(name, *needs, torch=False, hosted=None):
    """Registers a check of something that is not one method. needs: Class.method, or Class.method(parameter)."""
    def register(check):
        ROWS.append(Row(name, check, needs, torch, hosted))
        return check
    return register


# ------------------------------------------------------------------------------------------ calling any release
def settle(value):
    """The value, of a future or of itself: newer releases answer with futures where older ones answered at once."""
    while hasattr(value, "result"):
        value = value.result()
    return value


async def settle_async(value):
    while inspect.isawaitable(value) or hasattr(value, "result_async"):
        value = await (value if inspect.isawaitable(value) else value.result_async())
    return value


def call(target, method, *args, **kwargs):
    """Calls a method that is named Class.method, and waits for its result in the way of its kind."""
    name = method.split(".")[-1]
    function = getattr(target, name)
    if not name.endswith("_async"):
        return settle(function(*args, **kwargs))

    async def wait():
        return await settle_async(function(*args, **kwargs))

    return asyncio.run(wait())


def client_class(name):
    """A client's class or None; old releases keep some where only their own modules find them."""
    module = name.removesuffix("Client").lower() + "_client"
    try:
        return getattr(importlib.import_module("tinker.lib.public_interfaces." + module), name)
    except ModuleNotFoundError:
        return None


def public_methods():
    """Class.method of all that is public in the client classes of a release."""
    return sorted(f"{name}.{member}" for name in CLIENTS for member in dir(client_class(name)) if not member.startswith("_"))


def has(tinker, need):
    """Whether the release has Class, Class.method or Class.method(parameter)."""
    path, _, parameter = need.rstrip(")").partition("(")
    first, *rest = path.split(".")
    owner = client_class(first) if first in CLIENTS else getattr(tinker, first, None)
    for part in rest:
        owner = getattr(owner, part, None)
    return owner is not None and (not parameter or parameter in inspect.signature(owner).parameters)


# ------------------------------------------------------------------------------------------ data and formulas
def tokens(n, seed=0):
    rng = random.Random(f"tour {seed}")
    return [rng.randrange(VOCAB - 3) for _ in range(n)]


def close(a, b, relative=1e-4):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    assert np.allclose(a, b, rtol=relative, atol=1e-5), f"{a} is not {b}"


def rejected(text, function, *args, **kwargs):
    """The call must raise, and say why."""
    try:
        call(*args, **kwargs) if function is call else function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - the class differs between releases
        assert text in str(error), f"{type(error).__name__}: {error}"
        return error
    raise AssertionError(f"nothing was raised; expected {text!r}")


class Tour:
    """Clients of one session, made when first wanted."""

    def __init__(self, tinker):
        self.tinker, self.types = tinker, tinker.types
        self.url = os.environ["TINKER_BASE_URL"].rstrip("/")
        self.serial = 0

    def http(self, path, method="GET", body=None):
        request = urllib.request.Request(f"{self.url}/{path}", method=method, data=body and json.dumps(body).encode(),
                                         headers={"X-API-Key": os.environ["TINKER_API_KEY"], "Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.read()

    def name(self, stem):
        self.serial += 1
        return f"{stem}-{self.serial}"

    def metadata(self):
        return {"user_metadata": {"tour": "yes"}} if has(self.tinker, "ServiceClient(user_metadata)") else {}

    @functools.cached_property
    def service(self):
        return self.tinker.ServiceClient(**self.metadata())

    @functools.cached_property
    def rest(self):
        return self.tinker.RestClient() if has(self.tinker, "RestClient(base_url)") else self.service.create_rest_client()

    @functools.cached_property
    def admin(self):
        return self.tinker.AdminClient()

    def new_trainer(self, seed=7, rank=4):
        return settle(self.service.create_lora_training_client(base_model=MODEL, rank=rank, seed=seed))

    @functools.cached_property
    def trainer(self):
        """A trained client; checks may read its weights and must not change them."""
        client = self.new_trainer()
        self.train(client, 2)
        return client

    @functools.cached_property
    def path(self):
        return settle(self.trainer.save_state("kept")).path

    @functools.cached_property
    def sampler(self):
        return settle(self.trainer.save_weights_and_get_sampling_client(self.name("ephemeral")))

    @functools.cached_property
    def run_id(self):
        return self.path.split("/")[2]

    @functools.cached_property
    def session_id(self):
        return self.run_id.split(":")[0]

    def prompt(self, ids):
        return self.types.ModelInput.from_ints(ids)

    def datum(self, n=10, seed=0, **inputs):
        ids = tokens(n + 1, seed)
        inputs = {"target_tokens": ids[1:], "weights": [1.0] * n} if not inputs else {"target_tokens": ids[1:], **inputs}
        return self.types.Datum(model_input=self.prompt(ids[:-1]), loss_fn_inputs=inputs)

    def train(self, client, steps, seed=0, rate=1e-2):
        losses = []
        for _ in range(steps):
            losses.append(settle(client.forward_backward([self.datum(seed=seed)], "cross_entropy")).metrics["loss:sum"])
            settle(client.optim_step(self.types.AdamParams(learning_rate=rate)))
        return losses

    def logprobs(self, client, ids):
        """Logprob of each token after the first, from the training side."""
        datum = self.types.Datum(model_input=self.prompt(ids[:-1]),
                                 loss_fn_inputs={"target_tokens": ids[1:], "weights": [0.0] * (len(ids) - 1)})
        output = settle(client.forward([datum], "cross_entropy")).loss_fn_outputs[0]
        return np.array(output["logprobs"].to_numpy(), np.float32)

    def sampler_logprobs(self, sampler, ids):
        values = settle(sampler.compute_logprobs(self.prompt(ids)))
        assert values[0] is None and len(values) == len(ids)
        return np.array(values[1:], np.float32)

    def sample(self, ids=None, n=1, sampler=None, options=None, **params):
        """options are arguments of sample(), params those of SamplingParams."""
        return settle((sampler or self.sampler).sample(self.prompt(ids or tokens(6, 1)), n, self.types.SamplingParams(**params),
                                                       **(options or {})))


# ------------------------------------------------------------------------------------------ ServiceClient
@methods("ServiceClient.get_server_capabilities", "ServiceClient.get_server_capabilities_async")
def capabilities(t, method):
    assert MODEL in [m.model_name for m in call(t.service, method).supported_models]


@methods("ServiceClient.create_lora_training_client", "ServiceClient.create_lora_training_client_async")
def create_lora_training_client(t, method):
    first = call(t.service, method, base_model=MODEL, rank=2, seed=5, train_mlp=True, train_attn=True, train_unembed=False)
    second = call(t.service, method, base_model=MODEL, rank=2, seed=5, train_mlp=True, train_attn=True, train_unembed=False)
    assert settle(first.get_info()).lora_rank == 2
    assert first.model_id != second.model_id
    assert t.train(first, 2) == t.train(second, 2), "equal seeds must give equal losses"
    rejected("no-such-model", call, t.service, method, base_model="no-such-model", rank=2)


@feature("create: user_metadata", "ServiceClient.create_lora_training_client(user_metadata)")
def create_with_metadata(t, _):
    client = settle(t.service.create_lora_training_client(base_model=MODEL, rank=2, user_metadata={"k": "v"}))
    assert settle(t.rest.get_training_run(client.model_id)).user_metadata == {"k": "v"}


@feature("create: dimuon optimizer", "DimuonOptimizerConfig", "ServiceClient.create_lora_training_client(optimizer)",
         hosted="AdamW is the only family here; BadRequestError that names dimuon")
def create_dimuon(t, _):
    rejected("dimuon", lambda: settle(t.service.create_lora_training_client(base_model=MODEL, rank=2,
                                                                            optimizer=t.tinker.DimuonOptimizerConfig())))


@methods("ServiceClient.create_training_client")
def create_training_client(t, method):
    client = call(t.service, method, t.trainer.model_id)
    assert settle(client.get_info()).lora_rank == 4
    close(t.logprobs(client, tokens(8)), t.logprobs(t.trainer, tokens(8)))


@methods("ServiceClient.create_training_client_from_state", "ServiceClient.create_training_client_from_state_async")
def create_from_state(t, method):
    client = call(t.service, method, t.path)
    assert settle(client.get_info()).lora_rank == 4
    assert np.array_equal(t.logprobs(client, tokens(8)), t.logprobs(t.trainer, tokens(8)))
    rejected("missing", call, t.service, method, f"tinker://{t.run_id}/weights/missing")


@methods("ServiceClient.create_training_client_from_state_with_optimizer",
         "ServiceClient.create_training_client_from_state_with_optimizer_async")
def create_from_state_with_optimizer(t, method):
    client = t.new_trainer()
    t.train(client, 2)
    path = settle(client.save_state(t.name("resume"))).path
    wanted = t.train(client, 3)
    assert t.train(call(t.service, method, path), 3) == wanted, "a resumed run must repeat its losses"
    fresh = t.train(settle(t.service.create_training_client_from_state(path)), 3)
    assert fresh[0] == wanted[0] and fresh[1:] != wanted[1:], "without the optimizer only the weights are the same"


@methods("ServiceClient.create_sampling_client", "ServiceClient.create_sampling_client_async")
def create_sampling_client(t, method):
    ids = tokens(9, 2)
    base = call(t.service, method, base_model=MODEL)
    tuned = call(t.service, method, model_path=t.path)
    assert np.array_equal(t.sampler_logprobs(tuned, ids), t.logprobs(t.trainer, ids))
    assert not np.array_equal(t.sampler_logprobs(base, ids), t.sampler_logprobs(tuned, ids))
    if has(t.tinker, "RestClient.get_sampler"):  # before, the model was named by each request
        rejected("no-such-model", call, t.service, method, base_model="no-such-model")


@methods("ServiceClient.create_rest_client")
def create_rest_client(t, method):
    assert settle(call(t.service, method).list_training_runs(limit=1)).cursor.limit == 1


@methods("ServiceClient.create_custom_loss", torch=True)
def create_custom_loss(t, method):
    def weighted(logprobs, weights):
        loss = -(logprobs * weights).sum()
        return loss, {"custom/nll:sum": loss}

    handle = call(t.service, method, weighted, input_ranks={"logprobs": 1, "weights": 1})
    assert handle.loss_id, "the server runs it"
    plain, custom = t.new_trainer(seed=3), t.new_trainer(seed=3)
    for _ in range(2):
        want = settle(plain.forward_backward([t.datum()], "cross_entropy")).metrics["loss:sum"]
        got = settle(custom.forward_backward_custom([t.datum()], handle)).metrics
        close(got["custom/nll:sum"], want)
        for client in (plain, custom):
            settle(client.optim_step(t.types.AdamParams(learning_rate=1e-2)))
    close(t.logprobs(custom, tokens(8)), t.logprobs(plain, tokens(8)), 1e-3)


@methods("ServiceClient.copy_weights", "RestClient.copy_weights", "RestClient.copy_weights_async")
def copy_weights(t, method):
    if method.startswith("ServiceClient"):
        copied = call(t.tinker.ServiceClient(project_id="archive"), method, t.path, ttl_seconds=3600)
    else:
        copied = call(t.rest, method, t.path, "archive", ttl_seconds=3600)
    assert copied != t.path and copied.endswith("/weights/kept")
    again = settle(t.service.create_training_client_from_state(copied))
    assert np.array_equal(t.logprobs(again, tokens(8)), t.logprobs(t.trainer, tokens(8)))


@methods("ServiceClient.get_console_url")
def service_console_url(t, method):
    settle(t.trainer.get_info())
    assert t.session_id in call(t.service, method)


@methods("ServiceClient.holder")
def service_holder(t, method):
    assert t.trainer.model_id.startswith(getattr(t.service, method.split(".")[1]).get_session_id())


@methods("ServiceClient.close")
def service_close(t, method):
    for how in ("success", "errored", "interrupted"):
        service = t.tinker.ServiceClient()
        client = settle(service.create_lora_training_client(base_model=MODEL, rank=1))
        session = client.model_id.split(":")[0]
        call(service, method, how, "why")
        found = json.loads(t.http("api/v1/sessions/search", "POST", {"session_id": session}))["sessions"][0]["status"]
        assert (found["type"], found["reason"]["type"], found["detail"]) == ("client_finished", how, "why"), found


@feature("with ServiceClient()", "ServiceClient.close", "ServiceClient.__enter__")
def service_as_context(t, _):
    try:
        with t.tinker.ServiceClient() as service:
            session = settle(service.create_lora_training_client(base_model=MODEL, rank=1)).model_id.split(":")[0]
            raise KeyError("thrown by the user")
    except KeyError:
        pass
    found = json.loads(t.http("api/v1/sessions/search", "POST", {"session_id": session}))["sessions"][0]["status"]
    assert (found["type"], found["reason"]["type"]) == ("client_finished", "errored"), found


@methods("ServiceClient.get_telemetry", "TrainingClient.get_telemetry", "SamplingClient.get_telemetry",
         "RestClient.get_telemetry", "AdminClient.get_telemetry")
def telemetry(t, method):
    settle(t.trainer.get_info())
    owner = {"ServiceClient": "service", "TrainingClient": "trainer", "SamplingClient": "sampler", "RestClient": "rest",
             "AdminClient": "admin"}[method.split(".")[0]]
    sender = call(getattr(t, owner), method)
    assert sender.log("tour", {"method": method}) is True
    with logged("tinker.lib.telemetry") as text:
        sender._trigger_flush()
        assert sender._wait_until_drained_sync(), "the server did not take the events"
    assert "rror" not in text.getvalue(), text.getvalue()


@contextlib.contextmanager
def logged(name):
    text = io.StringIO()
    handler, logger = logging.StreamHandler(text), logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield text
    finally:
        logger.removeHandler(handler)


@feature("session heartbeat", "ServiceClient(user_metadata)")
def heartbeat(t, _):
    """The SDK beats every ten seconds on its own; its log of HTTP tells what the server answered."""
    assert t.trainer.holder
    log = logging.getLogger("tinker._base_client")
    before, deadline = log.level, time.monotonic() + 30
    log.setLevel(logging.DEBUG)
    try:
        with logged(log.name) as text:
            while not (beats := [line for line in text.getvalue().splitlines() if "Response" in line and "session_heartbeat" in line]):
                assert time.monotonic() < deadline, "no heartbeat within thirty seconds"
                time.sleep(0.1)
    finally:
        log.setLevel(before)
    assert all('"200 ' in line for line in beats), beats


# ------------------------------------------------------------------------------------------ TrainingClient
@methods("TrainingClient.forward", "TrainingClient.forward_async")
def forward(t, method):
    data = [t.datum(10, 1), t.datum(6, 2)]
    output = call(t.trainer, method, data, "cross_entropy")
    values = [o["logprobs"].to_numpy() for o in output.loss_fn_outputs]
    assert [len(v) for v in values] == [10, 6] and all((v < 0).all() for v in values)
    close(output.metrics["loss:sum"], -sum(v.sum() for v in values))
    ids = tokens(11, 1)
    assert np.array_equal(np.array(values[0], np.float32), t.sampler_logprobs(t.sampler, ids)), "training and sampling agree"


@methods("TrainingClient.forward_backward", "TrainingClient.forward_backward_async")
def forward_backward(t, method):
    one, two = t.new_trainer(seed=2), t.new_trainer(seed=2)
    data = [t.datum(10, 1), t.datum(6, 2)]
    output = call(one, method, data, "cross_entropy")
    close(output.metrics["loss:sum"], -sum(o["logprobs"].to_numpy().sum() for o in output.loss_fn_outputs))
    for datum in data:  # gradients add up over calls
        call(two, method, [datum], "cross_entropy")
    for client in (one, two):
        settle(client.optim_step(t.types.AdamParams(learning_rate=1e-2)))
    close(t.logprobs(one, tokens(8)), t.logprobs(two, tokens(8)), 1e-3)
    rejected("400", lambda: call(one, method, [t.datum(4, weights=[1.0] * 4, target_tokens=[1, 2, 3, 400])], "cross_entropy"))
    assert len(call(one, method, data, "cross_entropy").loss_fn_outputs) == 2, "after a failed call the next one works"


@feature("forward_backward in several chunks", "TrainingClient.forward_backward")
def chunks(t, _):
    n = 1100  # every release but with this server's own limit sends this in more than one request
    data = [t.datum(2, seed=i) for i in range(n)]
    client, single = t.new_trainer(seed=2), t.new_trainer(seed=2)
    output = settle(client.forward_backward(data, "cross_entropy"))
    assert len(output.loss_fn_outputs) == n
    for i in (0, 127, 128, 1023, 1024, n - 1):
        want = settle(single.forward([data[i]], "cross_entropy")).loss_fn_outputs[0]["logprobs"].to_numpy()
        assert np.array_equal(output.loss_fn_outputs[i]["logprobs"].to_numpy(), want), f"datum {i}"
    close(output.metrics["loss:sum"], -sum(o["logprobs"].to_numpy().sum() for o in output.loss_fn_outputs))
    settle(client.optim_step(t.types.AdamParams(learning_rate=1e-2)))
    assert settle(client.forward(data, "cross_entropy")).metrics["loss:sum"] < output.metrics["loss:sum"]


def reinforcement_loss(name, logp, q, a):
    ratio = np.exp(logp - q)
    if name == "importance_sampling":
        return -(ratio * a).sum()
    if name == "ppo":
        return -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a).sum()
    if name == "cispo":
        return -(np.clip(ratio, 0.0, 4.0) * logp * a).sum()
    if name == "dro":
        return -(logp * a - 0.5 * 0.05 * (logp - q) ** 2).sum()
    if name == "gspo":
        whole = np.exp((logp - q).mean())
        return -np.minimum(whole * a, np.clip(whole, 0.8, 1.2) * a).sum()
    raise ValueError(name)


def check_loss(t, name):
    assert name in typing.get_args(t.types.LossFnType)
    q, a = [-5.5] * 8, [1.0, -1.0, 0.5, -0.3, 2.0, 0.0, 1.0, -2.0]
    inputs = {"logprobs": q, "advantages": a}
    if name == "gspo":
        inputs["sequence_ratio_mask"] = [1.0] * 8
    output = settle(t.trainer.forward([t.datum(8, 3, **inputs)], name))
    logp = output.loss_fn_outputs[0]["logprobs"].to_numpy().astype(np.float64)
    close(output.metrics["loss:sum"], reinforcement_loss(name, logp, np.array(q), np.array(a)))


def loss_row(name):
    @feature(f"loss: {name}", f"types.LossFnType={name}")
    def check(t, _):
        check_loss(t, name)
    return check


for _name in ("importance_sampling", "ppo", "cispo", "dro", "gspo"):
    loss_row(_name)


@feature("loss: stable_reinforce", "types.LossFnType=stable_reinforce",
         hosted="it needs stability records of the hosted service; RequestFailedError that names the loss")
def stable_reinforce(t, _):
    rejected("stable_reinforce", lambda: settle(t.trainer.forward([t.datum(8, logprobs=[0.0] * 8, advantages=[1.0] * 8)],
                                                                  "stable_reinforce")))


@feature("several targets for each position", "TrainingClient.forward_backward")
def topk_targets(t, _):
    rng = np.random.default_rng(1)
    targets = rng.integers(0, VOCAB, (6, 3)).astype(np.int64)
    weights = rng.random((6, 3)).astype(np.float32)
    datum = t.types.Datum(model_input=t.prompt(tokens(6, 4)), loss_fn_inputs={"target_tokens": targets, "weights": weights})
    output = settle(t.trainer.forward([datum], "cross_entropy"))
    logp = np.asarray(output.loss_fn_outputs[0]["logprobs"].to_numpy()).reshape(6, 3)
    close(output.metrics["loss:sum"], -(logp * weights).sum())
    column = t.types.Datum(model_input=t.prompt(tokens(6, 4)),
                           loss_fn_inputs={"target_tokens": targets[:, 1].tolist(), "weights": [1.0] * 6})
    close(settle(t.trainer.forward([column], "cross_entropy")).loss_fn_outputs[0]["logprobs"].to_numpy(), logp[:, 1])


@methods("TrainingClient.forward_backward_custom", "TrainingClient.forward_backward_custom_async", torch=True)
def forward_backward_custom(t, method):
    """The release evaluates a callable itself; the gradient must be the one of the same loss on the server."""
    def nll(data, logprobs):
        loss = sum(-(lp * d.loss_fn_inputs["weights"].to_torch()).sum() for d, lp in zip(data, logprobs))
        return loss, {"nll": float(loss.detach())}

    plain, custom = t.new_trainer(seed=3), t.new_trainer(seed=3)
    data = [t.datum(9, 1), t.datum(5, 2)]
    want = settle(plain.forward_backward(data, "cross_entropy")).metrics["loss:sum"]
    close(call(custom, method, data, nll).metrics["nll"], want)
    for client in (plain, custom):
        settle(client.optim_step(t.types.AdamParams(learning_rate=1e-2)))
    close(t.logprobs(custom, tokens(8)), t.logprobs(plain, tokens(8)), 1e-3)


@methods("TrainingClient.optim_step", "TrainingClient.optim_step_async")
def optim_step(t, method):
    client, losses = t.new_trainer(), []
    for _ in range(3):
        losses.append(settle(client.forward_backward([t.datum()], "cross_entropy")).metrics["loss:sum"])
        call(client, method, t.types.AdamParams(learning_rate=1e-2))
    assert losses[2] < losses[1] < losses[0], losses
    before = t.logprobs(client, tokens(8))
    settle(client.forward_backward([t.datum()], "cross_entropy"))
    call(client, method, t.types.AdamParams(learning_rate=0.0))
    assert np.array_equal(t.logprobs(client, tokens(8)), before), "a rate of zero changes nothing"


@feature("pipelined steps", "TrainingClient.optim_step")
def pipelined(t, _):
    client, submitted = t.new_trainer(), []
    for _ in range(4):
        submitted.append(client.forward_backward([t.datum()], "cross_entropy"))
        submitted.append(client.optim_step(t.types.AdamParams(learning_rate=1e-2)))
    losses = [settle(f).metrics["loss:sum"] for f in submitted[::2]]
    settle(submitted[-1])
    assert losses == t.train(t.new_trainer(), 4), "submitting ahead changes no number"


@methods("TrainingClient.save_state", "TrainingClient.save_state_async")
def save_state(t, method):
    name = t.name("state")
    assert call(t.trainer, method, name).path == f"tinker://{t.run_id}/weights/{name}"
    rejected("exists", call, t.trainer, method, name)


@feature("save_state: ttl_seconds", "TrainingClient.save_state(ttl_seconds)")
def save_ttl(t, _):
    name = t.name("ttl")
    settle(t.trainer.save_state(name, ttl_seconds=3600))
    found = {c.checkpoint_id: c for c in settle(t.rest.list_checkpoints(t.run_id)).checkpoints}[f"weights/{name}"]
    assert 3500 < found.expires_at.timestamp() - time.time() <= 3600


@feature("save_state: overwrite", "TrainingClient.save_state(overwrite)")
def save_overwrite(t, _):
    client = t.new_trainer()
    path = settle(client.save_state("same")).path
    t.train(client, 1)
    assert settle(client.save_state("same", overwrite=True)).path == path
    again = settle(t.service.create_training_client_from_state(path))
    assert np.array_equal(t.logprobs(again, tokens(8)), t.logprobs(client, tokens(8)))


@feature("save_state: user_metadata", "TrainingClient.save_state(user_metadata)")
def save_metadata(t, _):
    name = t.name("meta")
    settle(t.trainer.save_state(name, user_metadata={"step": "3"}))
    found = {c.checkpoint_id: c for c in settle(t.rest.list_checkpoints(t.run_id)).checkpoints}[f"weights/{name}"]
    assert found.user_metadata == {"step": "3"}


@methods("TrainingClient.load_state", "TrainingClient.load_state_async")
def load_state(t, method):
    client = t.new_trainer(seed=99)
    assert not np.array_equal(t.logprobs(client, tokens(8)), t.logprobs(t.trainer, tokens(8)))
    call(client, method, t.path)
    assert np.array_equal(t.logprobs(client, tokens(8)), t.logprobs(t.trainer, tokens(8)))
    rejected("missing", call, client, method, f"tinker://{t.run_id}/weights/missing")


@methods("TrainingClient.load_state_with_optimizer", "TrainingClient.load_state_with_optimizer_async")
def load_state_with_optimizer(t, method):
    client = t.new_trainer()
    t.train(client, 2)
    path = settle(client.save_state(t.name("moments"))).path
    wanted = t.train(client, 3)
    call(client, method, path)
    assert t.train(client, 3) == wanted


@methods("TrainingClient.save_weights_for_sampler", "TrainingClient.save_weights_for_sampler_async")
def save_weights_for_sampler(t, method):
    name = t.name("sampler")
    path = call(t.trainer, method, name).path
    assert path == f"tinker://{t.run_id}/sampler_weights/{name}"
    sampler = settle(t.service.create_sampling_client(model_path=path))
    assert np.array_equal(t.sampler_logprobs(sampler, tokens(8)), t.logprobs(t.trainer, tokens(8)))


@methods("TrainingClient.save_weights_and_get_sampling_client", "TrainingClient.save_weights_and_get_sampling_client_async",
         "TrainingClient.save_weights_and_get_sampling_client_submit")
def ephemeral_sampler(t, method):
    client = t.new_trainer()
    t.train(client, 1)
    arguments = [] if method.endswith("_submit") else [t.name("ephemeral")]
    sampler = call(client, method, *arguments)
    want = t.logprobs(client, tokens(8))
    t.train(client, 1)
    assert np.array_equal(t.sampler_logprobs(sampler, tokens(8)), want), "it keeps the weights of its time"


@feature("inflight sampling client", "TrainingClient.save_weights_and_get_sampling_client(kind)")
def inflight(t, _):
    client = t.new_trainer()
    first = settle(client.save_weights_and_get_sampling_client(kind="inflight"))
    t.train(client, 1)
    second = settle(client.save_weights_and_get_sampling_client(kind="inflight"))
    want = t.logprobs(client, tokens(8))
    assert np.array_equal(t.sampler_logprobs(second, tokens(8)), want)
    assert np.array_equal(t.sampler_logprobs(first, tokens(8)), want), "an earlier one follows"


@methods("TrainingClient.save_weights_external", "TrainingClient.save_weights_external_async")
def save_weights_external(t, method):
    name = t.name("external")
    assert call(t.trainer, method, name).path == f"tinker://{t.run_id}/external_weights/{name}"


@feature("save_weights_external: age_encryption_recipients", "TrainingClient.save_weights_external(age_encryption_recipients)",
         hosted="files are not encrypted here; RequestFailedError that names age_encryption_recipients")
def save_encrypted(t, _):
    rejected("age_encryption_recipients", lambda: settle(t.trainer.save_weights_external(
        t.name("secret"), age_encryption_recipients=["age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"])))


@methods("TrainingClient.unload_model", "TrainingClient.unload_model_async")
def unload_model(t, method):
    client = t.new_trainer()
    call(client, method)
    rejected("no live model", lambda: settle(client.forward([t.datum()], "cross_entropy")))


@methods("TrainingClient.get_info", "TrainingClient.get_info_async")
def get_info(t, method):
    info = call(t.trainer, method)
    assert info.model_id == t.trainer.model_id == t.run_id
    assert info.model_data.model_name == MODEL and info.lora_rank == 4 and info.is_lora is True


@methods("TrainingClient.get_tokenizer", "SamplingClient.get_tokenizer")
def get_tokenizer(t, method):
    client = t.trainer if method.startswith("Training") else t.sampler
    tokenizer = call(client, method)
    ids = tokenizer.encode("the Tinker API and others")
    assert ids and max(ids) < VOCAB and tokenizer.decode(ids) == "the Tinker API and others"


@methods("TrainingClient.create_sampling_client", "TrainingClient.create_sampling_client_async")
def training_sampling_client(t, method):
    assert np.array_equal(t.sampler_logprobs(call(t.trainer, method, t.path), tokens(8)), t.logprobs(t.trainer, tokens(8)))


@methods("TrainingClient.get_console_url")
def training_console_url(t, method):
    assert t.run_id in call(t.trainer, method)


@methods("TrainingClient.on_queue_state_change", "SamplingClient.on_queue_state_change")
def queue_state(t, method):
    """What the client does with the queue state of a poll: it warns, with the server's reason where the release takes one."""
    from tinker.lib.api_future_impl import QueueState
    client = t.trainer if method.startswith("Training") else t.sampler
    change = getattr(client, method.split(".")[1])
    reason = ["memory is short"] if "queue_state_reason" in inspect.signature(change).parameters else []
    with logged("tinker") as text:
        change(QueueState.PAUSED_CAPACITY, *reason)
    assert "paused" in text.getvalue() and all(r in text.getvalue() for r in reason), text.getvalue()


# ------------------------------------------------------------------------------------------ SamplingClient
@methods("SamplingClient.create")
def sampling_create(t, method):
    create = getattr(t.tinker.SamplingClient, method.split(".")[1])
    sampler = settle(create(t.trainer.holder, model_path=t.path))
    assert np.array_equal(t.sampler_logprobs(sampler, tokens(8)), t.logprobs(t.trainer, tokens(8)))


@methods("SamplingClient.sample", "SamplingClient.sample_async")
def sample(t, method):
    ids = tokens(6, 1)
    params = t.types.SamplingParams(max_tokens=8, seed=3, temperature=1.0)
    out = call(t.sampler, method, prompt=t.prompt(ids), num_samples=3, sampling_params=params)
    assert len(out.sequences) == 3 and len({tuple(s.tokens) for s in out.sequences}) == 3
    for s in out.sequences:
        assert 1 <= len(s.tokens) <= 8 and s.stop_reason in ("length", "stop")
        want = t.logprobs(t.trainer, ids + list(s.tokens))[len(ids) - 1:]
        assert np.array_equal(np.array(s.logprobs, np.float32), want), "a sampled logprob is the trainer's"
    again = call(t.sampler, method, prompt=t.prompt(ids), num_samples=3, sampling_params=params)
    assert [list(s.tokens) for s in again.sequences] == [list(s.tokens) for s in out.sequences], "seeds repeat"


@feature("sample: temperature, top_k, top_p", "SamplingClient.sample")
def sample_distribution(t, _):
    best = t.sample(max_tokens=6, temperature=0.0).sequences[0].tokens
    for same in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert list(t.sample(max_tokens=6, seed=1, **same).sequences[0].tokens) == list(best), same
    drawn = t.sample(n=60, max_tokens=1, seed=2, top_k=2, temperature=5.0).sequences
    assert len({s.tokens[0] for s in drawn}) == 2


@feature("sample: stop", "SamplingClient.sample")
def sample_stop(t, _):
    whole = list(t.sample(max_tokens=20, seed=3, stop=[]).sequences[0].tokens)
    assert len(whole) == 20
    k = next(i for i in range(4, 20) if whole[i] not in whole[:i])
    cut = t.sample(max_tokens=20, seed=3, stop=[whole[k]]).sequences[0]
    assert list(cut.tokens) == whole[:k + 1] and cut.stop_reason == "stop"
    assert t.sample(max_tokens=20, seed=3, stop=["never to be seen"]).sequences[0].stop_reason in ("stop", "length")


@feature("sample: include_prompt_logprobs", "SamplingClient.sample(include_prompt_logprobs)")
def sample_prompt_logprobs(t, _):
    ids = tokens(9, 5)
    out = t.sample(ids, max_tokens=1, options={"include_prompt_logprobs": True})
    assert out.prompt_logprobs[0] is None
    assert np.array_equal(np.array(out.prompt_logprobs[1:], np.float32), t.logprobs(t.trainer, ids))


@feature("sample: topk_prompt_logprobs", "SamplingClient.sample(topk_prompt_logprobs)")
def sample_topk_prompt(t, _):
    ids = tokens(9, 5)
    out = t.sample(ids, max_tokens=1, options={"include_prompt_logprobs": True, "topk_prompt_logprobs": 4})
    assert out.topk_prompt_logprobs[0] is None and len(out.topk_prompt_logprobs) == 9
    for token, lp, top in list(zip(ids, out.prompt_logprobs, out.topk_prompt_logprobs))[1:]:
        values = [v for _, v in top]
        assert len(top) == 4 and values == sorted(values, reverse=True)
        assert dict(map(tuple, top)).get(token, lp) == lp and lp <= values[0]


@feature("sample: topk_sample_logprobs", "SamplingClient.sample(topk_sample_logprobs)")
def sample_topk(t, _):
    s = t.sample(max_tokens=5, seed=1, stop=[], options={"topk_sample_logprobs": 3}).sequences[0]
    assert len(s.topk_logprobs) == 5
    for token, lp, top in zip(s.tokens, s.logprobs, s.topk_logprobs):
        assert len(top) == 3 and dict(top).get(token, lp) == lp


@feature("sample: target_prompt_logprobs", "SamplingClient.sample(target_prompt_logprobs)")
def sample_targets(t, _):
    ids = tokens(6, 5)
    targets = np.array([[ids[i + 1], -1 if i == 2 else 7] for i in range(5)], np.int64)
    out = t.sample(ids, max_tokens=1, options={"target_prompt_logprobs": t.types.TensorData.from_numpy(targets)})
    got = out.target_prompt_logprobs.to_numpy()
    assert np.array_equal(got[:, 0], t.logprobs(t.trainer, ids)) and got[2, 1] == 0 and (got[[0, 1, 3, 4], 1] < 0).all()


@feature("sample: prompt_alt_tokens_k", "SamplingClient.sample(prompt_alt_tokens_k)")
def sample_alternatives(t, _):
    ids = tokens(6, 5)
    alt = t.sample(ids, max_tokens=1, seed=1, options={"prompt_alt_tokens_k": 3}).prompt_alt_tokens
    drawn = alt.tokens.to_numpy()
    assert drawn.shape == (5, 3) and (drawn < VOCAB).all()
    close(alt.logprobs.to_numpy()[1, 0], t.logprobs(t.trainer, [*ids[:2], int(drawn[1, 0])])[1])


@feature("sample: prompt_logprobs_last_n", "SamplingClient.sample(prompt_logprobs_last_n)")
def sample_last(t, _):
    ids = tokens(9, 5)
    out = t.sample(ids, max_tokens=1, options={"include_prompt_logprobs": True, "prompt_logprobs_last_n": 3})
    assert out.prompt_logprobs[:6] == [None] * 6
    assert np.array_equal(np.array(out.prompt_logprobs[6:], np.float32), t.logprobs(t.trainer, ids)[5:])


@feature("100 samples at once", "SamplingClient.sample")
def many_samples(t, _):
    params = [t.types.SamplingParams(max_tokens=3, seed=i) for i in range(100)]
    futures = [t.sampler.sample(t.prompt(tokens(4, i)), 1, p) for i, p in enumerate(params)]
    together = [list(settle(f).sequences[0].tokens) for f in futures]
    for i in (0, 17, 99):
        assert together[i] == list(settle(t.sampler.sample(t.prompt(tokens(4, i)), 1, params[i])).sequences[0].tokens)


@methods("SamplingClient.compute_logprobs", "SamplingClient.compute_logprobs_async")
def compute_logprobs(t, method):
    ids = tokens(12, 6)
    values = call(t.sampler, method, t.prompt(ids))
    assert values[0] is None and np.array_equal(np.array(values[1:], np.float32), t.logprobs(t.trainer, ids))


@methods("SamplingClient.get_base_model", "SamplingClient.get_base_model_async")
def get_base_model(t, method):
    assert call(t.sampler, method) == MODEL


@feature("pickled SamplingClient", "SamplingClient.__reduce__ of its own")
def pickled(t, _):
    copy = pickle.loads(pickle.dumps(t.sampler))
    out = t.sample(sampler=copy, max_tokens=6, seed=2, stop=[]).sequences[0]
    assert list(out.tokens) == list(t.sample(max_tokens=6, seed=2, stop=[]).sequences[0].tokens)


@methods("SamplingClient.get_sampler_handle", "SamplingClient.from_sampler_handle")
def sampler_handle(t, _):
    other = t.tinker.SamplingClient.from_sampler_handle(t.sampler.get_sampler_handle())
    assert np.array_equal(t.sampler_logprobs(other, tokens(8)), t.logprobs(t.trainer, tokens(8)))


# ------------------------------------------------------------------------------------------ RestClient
@methods("RestClient.get_server_capabilities")
def rest_capabilities(t, method):
    capabilities = {m.model_name: m for m in call(t.rest, method).supported_models}
    assert capabilities[MODEL].max_context_length == 512 and capabilities[MODEL].trainable is True


@methods("RestClient.get_training_run", "RestClient.get_training_run_async")
def get_training_run(t, method):
    check_run(t, call(t.rest, method, t.run_id))
    rejected("404", call, t.rest, method, "nobody:train:0")


def check_run(t, run):
    assert run.training_run_id == t.run_id and run.base_model == MODEL and run.is_lora is True and run.lora_rank == 4
    assert abs(run.last_request_time.timestamp() - time.time()) < 3600 and not run.corrupted


@methods("RestClient.get_training_run_by_tinker_path", "RestClient.get_training_run_by_tinker_path_async")
def get_training_run_by_path(t, method):
    check_run(t, call(t.rest, method, t.path))


@methods("RestClient.get_weights_info_by_tinker_path")
def weights_info(t, method):
    info = call(t.rest, method, t.path)
    assert info.base_model == MODEL and info.is_lora is True and info.lora_rank == 4


@methods("RestClient.list_training_runs", "RestClient.list_training_runs_async")
def list_training_runs(t, method):
    for _ in range(3 - settle(t.rest.list_training_runs(limit=3)).cursor.total_count):
        t.new_trainer()
    first, second = (call(t.rest, method, limit=2, offset=o) for o in (0, 1))
    assert len(first.training_runs) == 2 and first.cursor.limit == 2 and first.cursor.total_count >= 3
    assert second.training_runs[0].base_model == MODEL


@methods("RestClient.list_checkpoints", "RestClient.list_checkpoints_async")
def list_checkpoints(t, method):
    name = t.name("listed")
    settle(t.trainer.save_weights_for_sampler(name))
    found = {c.checkpoint_id: c for c in (t.path and call(t.rest, method, t.run_id)).checkpoints}
    kept, sampler = found["weights/kept"], found[f"sampler_weights/{name}"]
    assert kept.checkpoint_type == "training" and kept.tinker_path == t.path and sampler.checkpoint_type == "sampler"
    if hasattr(kept, "size_bytes"):
        assert kept.size_bytes > sampler.size_bytes > 1000, "a training checkpoint holds the optimizer too"


@methods("RestClient.list_user_checkpoints", "RestClient.list_user_checkpoints_async")
def list_user_checkpoints(t, method):
    newest = settle(t.trainer.save_state(t.name("newest"))).path
    page = call(t.rest, method, limit=50, offset=0)
    times = [c.time for c in page.checkpoints]
    assert times == sorted(times, reverse=True) and newest in [c.tinker_path for c in page.checkpoints]
    assert page.cursor.limit == 50 and page.cursor.total_count >= len(page.checkpoints)


@methods("RestClient.delete_checkpoint", "RestClient.delete_checkpoint_async")
def delete_checkpoint(t, method):
    path = settle(t.trainer.save_state(t.name("doomed"))).path
    call(t.rest, method, t.run_id, "/".join(path.split("/")[3:]))
    assert path not in [c.tinker_path for c in settle(t.rest.list_checkpoints(t.run_id)).checkpoints]
    rejected("404", call, t.rest, method, t.run_id, "weights/doomed-0")


@methods("RestClient.delete_checkpoint_from_tinker_path", "RestClient.delete_checkpoint_from_tinker_path_async")
def delete_by_path(t, method):
    path = settle(t.trainer.save_state(t.name("doomed"))).path
    call(t.rest, method, path)
    rejected("404", call, t.rest, method, path)


def check_archive(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        names = {os.path.basename(n) for n in tar.getnames()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names, names


@methods("RestClient.download_checkpoint_archive", "RestClient.download_checkpoint_archive_async")
def download_archive(t, method):
    check_archive(call(t.rest, method, t.path.split("/")[2], "weights/kept"))


@methods("RestClient.download_checkpoint_archive_from_tinker_path", "RestClient.download_checkpoint_archive_from_tinker_path_async")
def download_archive_by_path(t, method):
    check_archive(call(t.rest, method, t.path))


def check_archive_url(reply):
    with urllib.request.urlopen(reply.url, timeout=60) as file:
        check_archive(file.read())
    assert reply.expires.timestamp() > time.time()


@methods("RestClient.get_checkpoint_archive_url", "RestClient.get_checkpoint_archive_url_async")
def archive_url(t, method):
    check_archive_url(call(t.rest, method, t.path.split("/")[2], "weights/kept"))


@feature("archive in ranges", "RestClient.get_checkpoint_archive_url")
def archive_ranges(t, _):
    url = settle(t.rest.get_checkpoint_archive_url(t.path.split("/")[2], "weights/kept")).url
    part = urllib.request.Request(url, headers={"Range": "bytes=257-261"})
    with urllib.request.urlopen(part, timeout=60) as file:
        assert file.status == 206 and file.read() == b"ustar"


@methods("RestClient.get_checkpoint_archive_url_from_tinker_path", "RestClient.get_checkpoint_archive_url_from_tinker_path_async")
def archive_url_by_path(t, method):
    check_archive_url(call(t.rest, method, t.path))


@methods("RestClient.get_external_weights_urls", "RestClient.get_external_weights_urls_async")
def external_urls(t, method):
    path = settle(t.trainer.save_weights_external(t.name("urls"))).path
    reply = call(t.rest, method, path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(reply.urls)
    with urllib.request.urlopen(reply.urls["adapter_config.json"], timeout=60) as file:
        assert json.loads(file.read())["r"] == 4
    assert reply.expires.timestamp() > time.time() + 300


def published(t, path):
    return {c.tinker_path: c.public for c in settle(t.rest.list_checkpoints(t.run_id)).checkpoints}[path]


@methods("RestClient.publish_checkpoint_from_tinker_path", "RestClient.publish_checkpoint_from_tinker_path_async")
def publish(t, method):
    path = settle(t.trainer.save_state(t.name("public"))).path
    assert published(t, path) is False
    call(t.rest, method, path)
    assert published(t, path) is True


@methods("RestClient.unpublish_checkpoint_from_tinker_path", "RestClient.unpublish_checkpoint_from_tinker_path_async")
def unpublish(t, method):
    path = settle(t.trainer.save_state(t.name("public"))).path
    settle(t.rest.publish_checkpoint_from_tinker_path(path))
    call(t.rest, method, path)
    assert published(t, path) is False


@methods("RestClient.set_checkpoint_ttl_from_tinker_path", "RestClient.set_checkpoint_ttl_from_tinker_path_async")
def set_ttl(t, method):
    path = settle(t.trainer.save_state(t.name("lease"))).path

    def expires():
        return {c.tinker_path: c.expires_at for c in settle(t.rest.list_checkpoints(t.run_id)).checkpoints}[path]

    call(t.rest, method, path, 7200)
    assert 7100 < expires().timestamp() - time.time() <= 7200
    call(t.rest, method, path, None)
    assert expires() is None


@methods("RestClient.get_session", "RestClient.get_session_async")
def get_session(t, method):
    t.sampler.get_telemetry()
    session = call(t.rest, method, t.session_id)
    assert t.run_id in session.training_run_ids and session.sampler_ids
    if hasattr(session, "user_metadata"):
        assert session.user_metadata == {"tour": "yes"}
    rejected("404", call, t.rest, method, "nobody")


@methods("RestClient.list_sessions", "RestClient.list_sessions_async")
def list_sessions(t, method):
    assert t.session_id in call(t.rest, method, limit=200, offset=0).sessions
    assert len(call(t.rest, method, limit=1, offset=0).sessions) == 1


@methods("RestClient.get_sampler", "RestClient.get_sampler_async")
def get_sampler(t, method):
    sampler = settle(t.service.create_sampling_client(model_path=t.path))
    found = call(t.rest, method, sampler._sampling_session_id)
    assert found.sampler_id == sampler._sampling_session_id and found.base_model == MODEL and found.model_path == t.path


@methods("RestClient.assign_session_project", "RestClient.assign_session_project_async")
def assign_project(t, method):
    call(t.rest, method, t.session_id, "project-7")
    found = json.loads(t.http("api/v1/sessions/search", "POST", {"session_id": t.session_id}))["sessions"]
    assert found[0]["project_id"] == "project-7"


@methods("RestClient.search_sessions")
def search_sessions(t, method):
    request = t.types.SessionSearchRequest(user_metadata={"tour": "yes"}, session_id=t.session_id)
    found = call(t.rest, method, request).sessions
    assert [s.session_id for s in found] == [t.session_id] and found[0].status.type == "active"


@methods("RestClient.whoami")
def whoami(t, method):
    who = call(t.rest, method)
    assert who.user_urn == "tml:user:default", who
    if hasattr(who, "org_urn"):
        assert who.org_urn == "tml:organization:default", who


@methods("RestClient.export_session_trace", "RestClient.export_session_trace_async",
         hosted="there are no traces of sessions; RuntimeError: Trace export failed, with the reason")
def export_trace(t, method):
    rejected("Trace export failed", call, t.rest, method, t.session_id)


@methods("RestClient.get_audit_log", "RestClient.get_audit_log_async", "AdminClient.get_audit_log",
         "AdminClient.get_audit_log_async", hosted="there is no organization; an empty list of entries")
def audit_log(t, method):
    client = t.admin if method.startswith("Admin") else t.rest
    if method.endswith("_async"):  # 0.22 to 0.30 can only await it on the SDK's own loop, whatever the server
        assert settle(client.holder.run_coroutine_threadsafe(getattr(client, method.split(".")[1])())).entries == []
    else:
        assert call(client, method).entries == []


@methods("RestClient.get_billing_usage", "RestClient.get_billing_usage_async", "AdminClient.get_billing_usage",
         "AdminClient.get_billing_usage_async", hosted="nothing is billed; an empty list of events")
def billing(t, method):
    window = ("2026-07-13T00:00:00Z", "2026-07-14T00:00:00Z")
    assert call(t.admin if method.startswith("Admin") else t.rest, method, *window).data == []


@methods("RestClient.get_current_checkpoint_storage_usage", "RestClient.get_current_checkpoint_storage_usage_async",
         "AdminClient.get_current_checkpoint_storage_usage", "AdminClient.get_current_checkpoint_storage_usage_async",
         hosted="nothing is billed; an empty list of projects")
def storage_usage(t, method):
    assert call(t.admin if method.startswith("Admin") else t.rest, method).data == []


# ------------------------------------------------------------------------------------------ running
def lacks(tinker, need):
    """Whether the release lacks what a row needs."""
    if need.startswith("types.LossFnType="):
        return need.split("=")[1] not in typing.get_args(tinker.types.LossFnType)
    if need == "SamplingClient.__reduce__ of its own":
        return "__reduce__" not in vars(client_class("SamplingClient"))
    return not has(tinker, need)


def run(tinker, only=None):
    """{row: [outcome, text, seconds]} of all rows, or of those whose name contains `only`."""
    tour, results = Tour(tinker), {}
    for row in ROWS:
        if only and only not in row.name:
            continue
        began = time.monotonic()
        if any(lacks(tinker, need) for need in row.needs):
            outcome, text = "absent", ""
        elif row.torch and not HAVE_TORCH:
            outcome, text = "needs torch", ""
        else:
            try:
                row.check(tour, row.name)
                outcome, text = ("hosted", row.hosted) if row.hosted else ("works", "")
            except Exception as error:  # noqa: BLE001 - whatever a release raises is the finding
                outcome, text = "fails", f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-6)}"
        results[row.name] = [outcome, text, round(time.monotonic() - began, 3)]
    return results


def main():
    warnings.filterwarnings("ignore")
    import tinker
    results = run(tinker, sys.argv[2] if len(sys.argv) > 2 else None)
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump({"release": importlib.metadata.version("tinker"), "torch": HAVE_TORCH, "rows": results}, file, indent=1)
        file.write("\n")
    os._exit(0)  # the old releases' background threads keep the interpreter alive


if __name__ == "__main__":
    main()
