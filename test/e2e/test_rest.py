"""REST calls of the SDK beyond training: copies, the search of sessions, projects, and what only a hosted service has."""

import time
import warnings

import pytest

pytest.importorskip("tinker")
import tinker  # noqa: E402
from tinker import types  # noqa: E402

from common import adam, forward_logprobs, prompt, sft_datum, tokens  # noqa: E402

warnings.filterwarnings("ignore", category=FutureWarning)


@pytest.fixture
def rest(service):
    return service.create_rest_client()


def trained(service, name):
    client = service.create_lora_training_client(base_model="tiny", rank=4)
    client.forward_backward([sft_datum()], "cross_entropy").result()
    client.optim_step(adam()).result()
    return client, client.save_state(name).result().path


def test_copy_weights(service, rest, raw):
    client, path = trained(service, "a")
    copied = rest.copy_weights(path, "project").result()
    assert copied != path and copied.endswith("/weights/a") and copied.startswith("tinker://copy-")
    ids = tokens(9, 4)
    want = forward_logprobs(client, ids)
    run = path.split("/")[2]
    assert raw.call("DELETE", f"training_runs/{run}/checkpoints/weights/a").status == 200
    again = service.create_training_client_from_state_with_optimizer(copied)
    assert list(forward_logprobs(again, ids)) == pytest.approx(list(want), abs=1e-6)
    assert rest.get_weights_info_by_tinker_path(copied).result().lora_rank == 4

    key = {"X-Idempotency-Key": "copy-1"}
    body = {"source_path": copied, "destination_project_id": "p", "ttl_seconds": 3600}
    first = raw.post("copy_weights", body, key).json["tinker_path"]
    runs = raw.get("training_runs?project_id=p").json
    assert first.split("/")[2] in [r["training_run_id"] for r in runs["training_runs"]] and runs["cursor"]["total_count"] >= 1
    assert raw.get("training_runs?project_id=nobody-s").json["cursor"]["total_count"] == 0
    assert raw.post("copy_weights", body, key).json["tinker_path"] == first
    assert raw.post("copy_weights", body, {"X-Idempotency-Key": "copy-2"}).json["tinker_path"] != first
    session = raw.create_session()
    slot = {"source_path": copied, "session_id": session, "model_seq_id": 3}
    assert raw.post("copy_weights", slot).json["tinker_path"] == f"tinker://{session}:train:3/weights/a"
    assert raw.get(f"sessions/{session}").json["training_run_ids"] == [f"{session}:train:3"]
    raw.create_model(session, "tiny", seq=4)
    assert raw.post("copy_weights", {**slot, "model_seq_id": 4}).status == 400
    assert raw.post("copy_weights", {**slot, "session_id": "sess-0123456789abcdef"}).status == 410
    assert raw.post("copy_weights", {"source_path": path, "destination_project_id": "p"}).status == 404
    assert raw.post("copy_weights", {**body, "ttl_seconds": 5}).status == 400


def test_search_sessions(server, rest, raw):
    mark = f"mark-{time.time_ns()}"
    made = [raw.ok("create_session", {"tags": [], "user_metadata": {"mark": mark, "n": str(i)}, "sdk_version": "0.38.0",
                                      "display_name": f"Search {mark} no {i}"})["session_id"] for i in range(5)]
    raw.ok(f"sessions/{made[0]}/finish", {"reason": {"type": "errored"}, "detail": "why"})
    assert raw.call("PUT", f"sessions/{made[1]}/project", {"project_id": "p1"}).status == 200
    if hasattr(rest, "search_sessions"):
        seen, cursor = [], None
        while True:
            page = rest.search_sessions(types.SessionSearchRequest(
                user_metadata={"mark": mark}, limit=2, cursor=cursor)).result()
            seen += page.sessions
            cursor = page.next_cursor
            if cursor is None:
                break
        assert [s.session_id for s in seen] == made[::-1]
        assert seen[-1].status.type == "client_finished" and seen[-1].status.reason.type == "errored"
        assert seen[-2].project_id == "p1" and seen[0].status.type == "active" and seen[0].checkpoints_count == 0

    def search(**body):
        return [s["session_id"] for s in raw.ok("sessions/search", body)["sessions"]]

    assert search(display_name=f"no {mark} SEARCH") == made[::-1]
    assert search(session_id=made[2]) == [made[2]]
    assert search(user_metadata={"mark": mark, "n": "3"}) == [made[3]]
    assert search(user_metadata={"mark": mark}, project_ids=["p1"]) == [made[1]]
    assert search(user_metadata={"mark": mark}, statuses=[{"type": "client_finished"}]) == [made[0]]
    assert search(user_metadata={"mark": mark}, owner={"type": "user", "owner_urns": ["someone"]}) == []
    assert raw.post("sessions/search", {"limit": 0}).status == 400
    assert raw.post("sessions/search", {"cursor": {"last_created_at": "soon", "last_session_id": "x"}}).status == 400


def test_hosted_only(rest, raw):
    session = raw.create_session()
    assert raw.get("audit?event_type=x").json == {"entries": []}
    assert raw.get("billing/usage/events?starting_on=2026-01-01").json == {"data": []}
    assert raw.get("billing/usage/checkpoints/current").json == {"data": []}
    assert raw.get(f"sessions/{session}/trace_export").json["status"] == "failed"
    token = raw.ok("auth/token", {})["jwt"]
    assert raw.call("GET", f"sessions/{session}", headers={"X-API-Key": token}, key=False).status == 200
    if raw.ok("client/config", {}).get("pjwt_auth_enabled") is False and hasattr(rest, "whoami"):  # asked without a version
        who = rest.whoami().result()
        assert who.user_urn == "tml:user:default" and who.org_urn == "tml:organization:default" and who.email is None
    me = raw.get("auth/apikey/me").json
    assert isinstance(me["key_id"], int) and me["details"]["user_details"]["email"]
    assert raw.call("DELETE", "auth/apikey/me").status == 400


def test_finish_of_a_session_of_before(raw):
    assert raw.post("sessions/sess-0123456789abcdef/finish", {"reason": {"type": "success"}, "detail": None}).status == 200
    assert raw.post("sessions/nonsense/finish", {"reason": {"type": "success"}}).status == 404


@pytest.mark.smoke
def test_many_samples_with_one_poll(service, raw):
    """The SDK polls for all of them at once, and what it has taken is freed."""
    config = raw.ok("client/config", {"sdk_version": "0.38.0"})
    assert config["sample_use_retrieve_futures"] is True and config["sample_join_sampling_session"] is True
    before = metrics(raw)
    sampler = service.create_sampling_client(base_model="tiny")
    params = [types.SamplingParams(max_tokens=4, seed=i) for i in range(300)]
    futures = [sampler.sample(prompt=prompt(tokens(5, i)), num_samples=1, sampling_params=p) for i, p in enumerate(params)]
    results = [f.result() for f in futures]
    assert len(results) == 300 and all(1 <= len(r.sequences[0].tokens) <= 4 for r in results)
    alone = sampler.sample(prompt=prompt(tokens(5, 17)), num_samples=1, sampling_params=params[17]).result()
    assert alone.sequences[0].tokens == results[17].sequences[0].tokens
    deadline = time.monotonic() + 30
    while metrics(raw)["tinkerbell_futures_done"] > before["tinkerbell_futures_done"] + 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    after = metrics(raw)
    assert after["tinkerbell_futures_done"] <= before["tinkerbell_futures_done"] + 5
    assert after['tinkerbell_ops_executed_total{type="sample"}'] - before['tinkerbell_ops_executed_total{type="sample"}'] == 301
    sampled = sum(len(r.sequences[0].tokens) for r in [*results, alone])
    assert after["tinkerbell_sampled_tokens_total"] - before["tinkerbell_sampled_tokens_total"] == sampled
    assert after["tinkerbell_sample_positions_total"] > before["tinkerbell_sample_positions_total"] + sampled
    assert after["tinkerbell_http_requests_total"] > before["tinkerbell_http_requests_total"] + 600


def metrics(raw):
    """Every sample must come after the HELP and TYPE of its name."""
    known, values = set(), {}
    for line in raw.get("/metrics").body.decode().splitlines():
        words = line.split()
        if words[:2] == ["#", "TYPE"]:
            assert words[3] in ("counter", "gauge", "summary")
            known |= {words[2] + end for end in (("_sum", "_count") if words[3] == "summary" else ("",))}
        elif words[0] != "#":
            name, value = line.rsplit(" ", 1)
            assert name.split("{")[0] in known
            values[name] = float(value)
    return values
