"""Tenants: keys with names, isolation of everything that has an id, published checkpoints, access tokens, limits."""

import os
import re
import time

import pytest

from daemon import ROOT, end
from tinker_raw import Failed, Raw

ALICE, BOB = "tml-alice", "tml-bob"


@pytest.fixture(scope="module")
def shared(tiny, tmp_path_factory):
    from daemon import Daemon
    folder = tmp_path_factory.mktemp("tenants")
    keys = folder / "keys"
    keys.write_text("# who may\n\ntml-bob=bob\n  tml-alice-2=alice  \ntml-plain\n")
    d = Daemon({"tiny": tiny}, folder / "data", args=["--api-key", ALICE + "=alice", "--api-key-file", str(keys)])
    d.start()
    yield d
    d.stop()


@pytest.fixture
def alice(shared):
    with Raw(shared.url, key=ALICE) as client:
        yield client


@pytest.fixture
def bob(shared):
    with Raw(shared.url, key=BOB) as client:
        yield client


def loss_graph():
    return {"format": 1, "nodes": [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": [], "kwargs": {}},
        {"op": "call_method", "name": "s", "target": "sum", "args": [{"ref": "logprobs"}], "kwargs": {}},
        {"op": "output", "name": "output", "target": "output",
         "args": [{"tuple": [{"ref": "s"}, {"dict": {}}]}], "kwargs": {}}]}


class Things:
    """One of everything that has an id, made by one client."""

    def __init__(self, raw):
        self.session = raw.create_session()
        self.model = raw.create_model(self.session, "tiny")
        done = {}
        for seq, (path, extra) in enumerate([
                ("save_weights", {"path": "w"}), ("save_weights_for_sampler", {"path": "s"}),
                ("save_weights_external", {"path": "e"}),
                ("save_weights_for_sampler", {"sampling_session_seq_id": 0})], 1):
            ticket = raw.ok(path, {"model_id": self.model, "seq_id": seq, **extra})
            done[seq] = raw.retrieve(ticket["request_id"])
        self.request = ticket["request_id"]
        self.path, self.sampler_path, self.external = (done[i]["path"] for i in (1, 2, 3))
        self.sampler = done[4]["sampling_session_id"]
        raw.sample(self.sampler, 0, [1, 2, 3], max_tokens=1)
        loss = raw.ok("create_custom_loss", {"session_id": self.session, "custom_loss_seq_id": 0, "name": "l",
                                             "inputs": [{"name": "logprobs", "rank": 1}], "graph": loss_graph()})
        self.loss = raw.retrieve(loss["request_id"])["loss_id"]


@pytest.fixture(scope="module")
def things(shared):
    with Raw(shared.url, key=ALICE) as client:
        return Things(client)


# Each route: a request that names what is `t`'s, or the reason why there is nothing of a tenant's in it.
NO_ID = "says the same to everybody"
LIST = "lists what is the caller's own: test_lists"
OWN = "is about the caller's key: test_keys"
DATUM = {"data": [{"model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}, "loss_fn_inputs": {
    "target_tokens": {"data": [2, 3], "dtype": "int64"}}}], "loss_fn": "cross_entropy"}
CHECKPOINT = "training_runs/{}/checkpoints/{}/{}"
REQUESTS = {
    "POST retrieve_future": lambda t: ("retrieve_future", {"request_id": t.request}),
    "POST retrieve_futures": lambda t: ("retrieve_futures", {
        "target": {"type": "sampling_session", "sampling_session_id": t.sampler}, "timeout": 1}),
    "POST asample": lambda t: ("asample", {"sampling_session_id": t.sampler, "seq_id": 7, "sampling_params": {},
                                           "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}}),
    "POST cancel_future": lambda t: ("cancel_future", {"request_id": t.request}),
    "POST forward_backward": lambda t: ("forward_backward", {
        "model_id": t.model, "seq_id": 5, "forward_backward_input": DATUM}),
    "POST forward": lambda t: ("forward", {"model_id": t.model, "seq_id": 5, "forward_input": DATUM}),
    "POST optim_step": lambda t: ("optim_step", {"model_id": t.model, "seq_id": 5, "adam_params": {}}),
    "POST session_heartbeat": lambda t: ("session_heartbeat", {"session_id": t.session}),
    "POST telemetry": NO_ID,
    "POST client/config": NO_ID,
    "POST client/dynamic_config": NO_ID,
    "GET get_server_capabilities": NO_ID,
    "GET healthz": NO_ID,
    "POST create_session": LIST,
    "POST sessions/{}/finish": lambda t: (f"sessions/{t.session}/finish", {"reason": {"type": "success"}}),
    "PUT sessions/{}/project": lambda t: (f"sessions/{t.session}/project", {"project_id": "p"}),
    "POST sessions/search": LIST,
    "GET sessions/{}/trace_export": lambda t: (f"sessions/{t.session}/trace_export", None),
    "GET sessions": LIST,
    "GET sessions/{}": lambda t: (f"sessions/{t.session}", None),
    "POST create_model": lambda t: ("create_model", {"session_id": t.session, "model_seq_id": 9, "base_model": "tiny",
                                                     "lora_config": {"rank": 2}}),
    "POST create_custom_loss": lambda t: ("create_custom_loss", {
        "session_id": t.session, "custom_loss_seq_id": 9, "name": "l", "inputs": [{"name": "logprobs", "rank": 1}],
        "graph": loss_graph()}),
    "POST unload_model": lambda t: ("unload_model", {"model_id": t.model, "seq_id": 5}),
    "POST get_info": lambda t: ("get_info", {"model_id": t.model}),
    "POST save_weights": lambda t: ("save_weights", {"model_id": t.model, "seq_id": 5, "path": "x"}),
    "POST save_weights_for_sampler": lambda t: ("save_weights_for_sampler", {
        "model_id": t.model, "seq_id": 5, "sampling_session_seq_id": 5}),
    "POST save_weights_external": lambda t: ("save_weights_external", {"model_id": t.model, "seq_id": 5, "path": "x"}),
    "POST load_weights": lambda t: ("load_weights", {"model_id": t.model, "seq_id": 5, "path": t.path, "optimizer": False}),
    "POST weights_info": lambda t: ("weights_info", {"tinker_path": t.path}),
    "POST copy_weights": lambda t: ("copy_weights", {"source_path": t.path, "destination_project_id": "p"}),
    "POST create_sampling_session": lambda t: ("create_sampling_session", {
        "session_id": t.session, "sampling_session_seq_id": 9, "model_path": t.sampler_path}),
    "POST join_sampling_session": lambda t: ("join_sampling_session", {"sampling_session_id": t.sampler}),
    "GET samplers/{}": lambda t: (f"samplers/{t.sampler}", None),
    "GET training_runs": LIST,
    "GET training_runs/{}": lambda t: (f"training_runs/{t.model}", None),
    "GET training_runs/{}/checkpoints": lambda t: (f"training_runs/{t.model}/checkpoints", None),
    "GET models/{}/checkpoints": lambda t: (f"models/{t.model}/checkpoints", None),
    "GET checkpoints": LIST,
    "DELETE " + CHECKPOINT: lambda t: (f"training_runs/{t.model}/checkpoints/weights/w", None),
    f"POST {CHECKPOINT}/publish": lambda t: (f"training_runs/{t.model}/checkpoints/weights/w/publish", None),
    f"DELETE {CHECKPOINT}/publish": lambda t: (f"training_runs/{t.model}/checkpoints/weights/w/publish", None),
    f"PUT {CHECKPOINT}/ttl": lambda t: (f"training_runs/{t.model}/checkpoints/weights/w/ttl", {"ttl_seconds": 3600}),
    f"GET {CHECKPOINT}/archive": lambda t: (f"training_runs/{t.model}/checkpoints/weights/w/archive", None),
    "GET training_runs/{}/checkpoints/external_weights/{}/external_weights_urls": lambda t: (
        f"training_runs/{t.model}/checkpoints/external_weights/e/external_weights_urls", None),
    "GET audit": NO_ID,
    "GET billing/usage/events": NO_ID,
    "GET billing/usage/checkpoints/current": NO_ID,
    "POST auth/token": OWN,
    "GET auth/apikey/me": OWN,
    "DELETE auth/apikey/me": NO_ID,
    "GET downloads/{}/{}": "the token in the path is the permission",
}


def served_routes():
    """What the face's table has, read from its source."""
    with open(os.path.join(ROOT, "src", "api", "tinker", "tinker.c"), encoding="utf-8") as f:
        text = f.read()
    table = text[text.index("ROUTES[]"):]
    defines = dict(re.findall(r'#define (\w+) +(.+)', text))
    found = set()
    for method, expression in re.findall(r'\b(GET|POST|PUT|DEL)\(([^,]+),', table):
        for name in ("CKPT", "V1"):
            expression = re.sub(rf'\b{name}\b', lambda m: defines[m.group()], expression)
        found.add(("DELETE" if method == "DEL" else method, "".join(re.findall(r'"([^"]*)"', expression))))
    for method, pattern in re.findall(r'\.method = TB_HTTP_(\w+),\s*\.pattern = V1 "([^"]+)"', table):
        found.add((method, "/api/v1/" + pattern))
    assert all(p.startswith("/api/v1/") for _, p in found)
    return {f"{m} {p[len('/api/v1/'):]}" for m, p in found}


def test_every_route_is_told():
    assert served_routes() == set(REQUESTS)


class Unknown:
    """The same ids in a session that never was."""

    def __init__(self, things):
        self.session = "sess-" + "z" * 16
        for name, value in vars(things).items():
            setattr(self, name, value.replace(things.session, self.session))


@pytest.mark.parametrize("route", [r for r, make in REQUESTS.items() if callable(make)])
def test_foreign_is_unknown(things, bob, route):
    """What is another tenant's is answered as if it had never been, word for word."""
    method = route.split()[0]
    answers = []
    for t in (things, Unknown(things)):
        path, body = REQUESTS[route](t)
        reply = bob.call(method, path, body)
        answers.append((reply.status, reply.body.decode().replace(t.session, "SESSION")))
    assert answers[0] == answers[1]
    if route not in ("POST cancel_future", "POST sessions/{}/finish", "GET sessions/{}/trace_export"):
        assert answers[0][0] in (404, 410), answers[0]


def test_nothing_happened(things, alice):
    """After all those requests the owner's things are as they were."""
    assert alice.post("session_heartbeat", {"session_id": things.session}).status == 200
    assert alice.post("get_info", {"model_id": things.model}).json["model_id"] == things.model
    assert alice.retrieve_once(things.request).json["sampling_session_id"] == things.sampler
    row = {c["checkpoint_id"]: c for c in alice.get(f"training_runs/{things.model}/checkpoints").json["checkpoints"]}
    assert set(row) == {"weights/w", "sampler_weights/s", "external_weights/e"}
    assert row["weights/w"]["public"] is False and row["weights/w"]["expires_at"] is None
    assert len(alice.sample(things.sampler, 1, [1, 2], max_tokens=2)["sequences"]) == 1
    assert alice.get(f"sessions/{things.session}").json["sampler_ids"] == [things.sampler]
    with pytest.raises(Failed):
        session = alice.create_session()  # a loss is its session's, also for its owner
        model = alice.create_model(session, "tiny")
        ticket = alice.ok("forward_backward", {"model_id": model, "seq_id": 1, "forward_backward_input": {
            **DATUM, "loss_fn": "custom", "loss_fn_config_v2": {"loss_id": things.loss}}})
        alice.retrieve(ticket["request_id"])


def test_lists(things, alice, bob):
    mine = bob.create_session()
    assert bob.get("sessions?limit=100").json["sessions"] == [mine]
    assert [s["session_id"] for s in bob.ok("sessions/search", {})["sessions"]] == [mine]
    assert bob.ok("sessions/search", {})["sessions"][0]["owner"] == "bob"
    for path, key in (("training_runs", "training_runs"), ("checkpoints", "checkpoints")):
        page = bob.get(path).json
        assert page[key] == [] and page["cursor"]["total_count"] == 0
    assert {r["training_run_id"] for r in alice.get("training_runs").json["training_runs"]} >= {things.model}
    assert alice.get("checkpoints").json["cursor"]["total_count"] == 3
    assert things.session not in str(bob.ok("sessions/search", {"session_id": things.session}))
    urns = {"owner": {"type": "user", "owner_urns": ["alice"]}}
    assert bob.ok("sessions/search", urns)["sessions"] == [] and alice.ok("sessions/search", urns)["sessions"]


def test_keys(shared, alice, things):
    for key, name in ((ALICE, "alice"), ("tml-alice-2", "alice"), ("tml-plain", "default"), (BOB, "bob")):
        with Raw(shared.url, key=key) as raw:
            assert raw.get("auth/apikey/me").json["name"] == name
            token = raw.ok("auth/token", {})["jwt"]
        with Raw(shared.url, key=token) as raw:
            assert raw.get("auth/apikey/me").json["name"] == name
            assert raw.get(f"sessions/{things.session}").status == (200 if name == "alice" else 404)
    for key in ("tml-nobody", "tml-bob=bob", "", "eyJhIjoxfQ.eyJhIjoxfQ.dG1sLXg"):
        with Raw(shared.url, key=key) as raw:
            refused = raw.get("sessions")
            assert refused.status == 401 and ("invalid_token" in refused.headers.get("www-authenticate", "")) == key.startswith("eyJ")
            assert raw.get("/healthz").status == 200 and raw.get("/metrics").status == 200


def test_same_idempotency_key(things, alice, bob):
    key = {"X-Idempotency-Key": "the same"}
    body = {"tags": [], "user_metadata": {}, "sdk_version": "0"}
    one = alice.post("create_session", body, key).json["session_id"]
    assert alice.post("create_session", body, key).json["session_id"] == one
    assert bob.post("create_session", body, key).json["session_id"] != one


def load(raw, path, seq=0, **extra):
    """A model from the checkpoint, in a session of its own."""
    ticket = raw.ok("load_weights", {"session_id": raw.create_session(), "model_seq_id": seq, "path": path,
                                     "optimizer": False, **extra})
    return raw.retrieve(ticket["request_id"])


def test_published(things, alice, bob):
    where = f"training_runs/{things.model}/checkpoints/weights/w"
    assert alice.call("POST", where + "/publish").status == 200
    assert bob.ok("weights_info", {"tinker_path": things.path})["lora_rank"] == 8
    assert load(bob, things.path)["path"] == things.path
    sampler = bob.create_sampling_session(bob.create_session(), 0, model_path=things.path)
    assert bob.sample(sampler, 0, [1, 2, 3], max_tokens=2)["sequences"][0]["tokens"]
    url = bob.get(where + "/archive").json["url"]
    assert bob.call("GET", url[url.index("/api/"):], key=False).body[257:262] == b"ustar"
    copied = bob.ok("copy_weights", {"source_path": things.path, "destination_project_id": "p"})["tinker_path"]
    assert [c["tinker_path"] for c in bob.get("checkpoints").json["checkpoints"]] == [copied]
    # to be read, and no more
    assert bob.call("DELETE", where).status == 404
    assert bob.call("DELETE", where + "/publish").status == 404
    assert bob.call("PUT", where + "/ttl", {"ttl_seconds": 3600}).status == 404
    assert bob.get(f"training_runs/{things.model}").status == 404
    assert alice.call("DELETE", where + "/publish").status == 200
    assert bob.post("weights_info", {"tinker_path": things.path}).status == 404
    with pytest.raises(Failed, match="there is no checkpoint"):
        load(bob, things.path)
    assert alice.post("weights_info", {"tinker_path": copied}).status == 404  # the copy is bob's


def test_access_token(shared, things, bob):
    assert load(bob, things.path, weights_access_token=ALICE)["path"] == things.path
    with pytest.raises(Failed, match="no key of this server"):
        load(bob, things.path, weights_access_token="tml-nobody")
    body = {"source_path": things.path, "destination_project_id": "p"}
    token = {"X-Tinker-Weights-Access-Token": ALICE, "X-Idempotency-Key": "with a token"}
    copied = bob.post("copy_weights", body, token)
    assert copied.status == 200 and bob.post("copy_weights", body, token).json == copied.json
    assert bob.post("weights_info", {"tinker_path": copied.json["tinker_path"]}).status == 200
    assert bob.post("copy_weights", body, {"X-Tinker-Weights-Access-Token": "tml-nobody"}).status == 403
    assert bob.post("copy_weights", body, {"X-Idempotency-Key": "without"}).status == 404


def test_sdk(shared, things):
    tinker = pytest.importorskip("tinker")
    service = tinker.ServiceClient(base_url=shared.url, api_key=BOB)
    rest = service.create_rest_client()
    assert things.session not in rest.list_sessions(limit=100).result().sessions
    with pytest.raises(tinker.NotFoundError):
        rest.get_training_run(things.model).result()
    with pytest.raises(tinker.NotFoundError):
        service.create_sampling_client(model_path=things.sampler_path).result()
    if hasattr(rest, "whoami"):
        assert rest.whoami().result().user_urn == "tml:user:bob"
        mine = service.create_training_client_from_state(things.path, weights_access_token=ALICE).result()
        assert mine.get_info().is_lora
    end(service)
    with pytest.raises(tinker.AuthenticationError):
        tinker.ServiceClient(base_url=shared.url, api_key="tml-nobody").create_rest_client().list_sessions().result()


def test_rate(start):
    server = start(args=["--api-key", ALICE + "=alice", "--api-key", BOB + "=bob", "--tenant-rate", "1:4",
                         "--long-poll", "1"])
    with Raw(server.url, key=ALICE) as raw, Raw(server.url, key=BOB) as other:
        session = raw.create_session()
        sampler = raw.create_sampling_session(session, 0, base_model="tiny")
        # a number far ahead of its turn: it waits, and its poll says why submits do not come through
        model = raw.create_model(session, "tiny")
        waiting = raw.ok("optim_step", {"model_id": model, "seq_id": 99, "adam_params": {}})["request_id"]
        replies, refused = [], []
        while len(refused) < 4 and len(replies) < 500:
            replies.append(raw.submit_sample(sampler, len(replies), [1, 2], max_tokens=1))
            refused = [r for r in replies if r.status == 429]
        assert {r.status for r in replies} == {200, 429}
        assert refused[0].headers["retry-after"] == "1" and refused[0].json["queue_state"] == "paused_rate_limit"
        poll = raw.retrieve_once(waiting, proto=False)
        assert poll.status == 408 and poll.json["queue_state"] == "paused_rate_limit" and "second" in poll.json["queue_state_reason"]
        sampler = other.create_sampling_session(other.create_session(), 0, base_model="tiny")
        assert other.submit_sample(sampler, 0, [1, 2], max_tokens=1).status == 200  # others are not held up
        # a repeat of what was taken costs nothing
        taken = next(i for i, r in enumerate(replies) if r.status == 200)
        sampler = f"{session}:sample:0"
        assert all(raw.submit_sample(sampler, taken, [1, 2], max_tokens=1).status == 200 for _ in range(8))


def test_pending_and_bytes(start):
    server = start(args=["--api-key", ALICE, "--tenant-pending", "3", "--tenant-queue", "64K", "--long-poll", "1"])
    with Raw(server.url, key=ALICE) as raw:
        session = raw.create_session()
        model = raw.create_model(session, "tiny")

        def step(seq, pad=0):
            return raw.post("optim_step", {"model_id": model, "seq_id": seq, "adam_params": {}, "pad": "x" * pad})

        assert [step(seq).status for seq in (3, 4, 5, 6)] == [200, 200, 200, 429]
        assert step(6).json["queue_state"] == "paused_capacity"
        poll = raw.retrieve_once(f"{model}:3", proto=False)
        assert poll.status == 408 and poll.json["queue_state"] == "paused_capacity"
        assert step(1).status == 200  # what all wait for is not kept out
        raw.retrieve(f"{model}:1")
        assert step(2).status == 200
        for seq in range(2, 6):
            raw.retrieve(f"{model}:{seq}")
        assert step(7, 60 << 10).status == 200 and step(8, 60 << 10).status == 429 and step(6).status == 200
        raw.retrieve(f"{model}:7")
        assert step(8, 60 << 10).status == 200


@pytest.mark.parametrize("args, says", [
    (["--api-key", "sk-x"], "begin with tml-"), (["--api-key", "tml-x=a b"], "tenant"),
    (["--api-key", "tml-x", "--api-key", "tml-x=other"], "twice"),
    (["--api-key-file", "/nonexistent/keys"], "No such file"), (["--api-key-file", "/dev/null"], "no key"),
    (["--listen", "0.0.0.0:0"], "--api-key"), (["--tenant-rate", "0"], "--tenant-rate"),
    (["--tenant-rate", "5:"], "--tenant-rate"), (["--tenant-pending", "none"], "--tenant-pending")])
def test_bad_options(tiny, tmp_path, args, says):
    from daemon import Daemon
    d = Daemon({"tiny": tiny}, tmp_path / "data", args=args)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        d.start()
    assert says in d.log() and "tml-x" not in d.log() and time.monotonic() - began < 60
