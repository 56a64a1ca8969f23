"""Checkpoints through the SDK: save, load, resume to the same bits, export, and the REST calls that list them."""

import io
import json
import struct
import urllib.request

import numpy as np
import pytest
from common import adam, forward_logprobs, prompt, sft_datum, tokens

tinker = pytest.importorskip("tinker")
types = tinker.types


def steps(client, seeds):
    """Trains a step per seed and returns each loss; equal numbers mean equal weights and equal optimizer state."""
    losses = []
    for seed in seeds:
        fb = client.forward_backward([sft_datum(10, seed=seed)], "cross_entropy")
        client.optim_step(adam()).result()
        losses.append(fb.result().metrics["loss:sum"])
    return losses


def safetensors(data):
    """name -> array, of a file's bytes."""
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + n])
    header.pop("__metadata__", None)
    out = {}
    for name, t in header.items():
        assert t["dtype"] == "F32", t
        a, b = t["data_offsets"]
        out[name] = np.frombuffer(data[8 + n + a:8 + n + b], np.float32).reshape(t["shape"])
    return out


@pytest.mark.smoke
def test_resume_is_bit_exact(service):
    """save, go on; load with the optimizer, go on again: the same losses to the last bit. In the same client, and in a new
    one. Loading the weights alone starts a fresh optimizer."""
    client = service.create_lora_training_client("tiny", rank=8, seed=1).result()
    steps(client, range(3))
    path = client.save_state("middle").result().path
    assert path.startswith("tinker://") and path.endswith("/weights/middle")
    wanted = steps(client, range(3, 7))
    client.load_state_with_optimizer(path).result()
    assert steps(client, range(3, 7)) == wanted
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    assert resumed.get_info().lora_rank == 8
    assert steps(resumed, range(3, 7)) == wanted
    fresh = service.create_training_client_from_state(path).result()
    losses = steps(fresh, range(3, 7))
    assert losses[0] == wanted[0] and losses[1:] != wanted[1:]
    client.load_state(path).result()
    assert steps(client, range(3, 7)) == losses


def test_loading_drops_the_gradient(service):
    client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    steps(client, [0])
    path = client.save_state("clean").result().path
    wanted = steps(client, [1])
    after = forward_logprobs(client, tokens(9))
    client.forward_backward([sft_datum(5, seed=99)], "cross_entropy").result()
    client.load_state_with_optimizer(path).result()
    assert steps(client, [1]) == wanted
    assert np.array_equal(forward_logprobs(client, tokens(9)), after)


def test_a_save_takes_its_place_in_the_order(service):
    """Submitted between steps without waiting, it holds the state between those steps."""
    client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    futures, losses = [], []
    for i in range(4):
        losses.append(client.forward_backward([sft_datum(10, seed=0)], "cross_entropy"))
        client.optim_step(adam())
        futures.append(client.save_state(f"step-{i}"))
    losses = [f.result().metrics["loss:sum"] for f in losses]
    for i, future in enumerate(futures[:3]):
        other = service.create_training_client_from_state(future.result().path).result()
        assert other.forward([sft_datum(10, seed=0)], "cross_entropy").result().metrics["loss:sum"] == losses[i + 1]


def test_names_and_overwrite(service):
    client = service.create_lora_training_client("tiny", rank=2, seed=1).result()
    client.save_state("a.b-c_1", user_metadata={"step": "1"}).result()
    with pytest.raises(tinker.RequestFailedError) as error:
        client.save_state("a.b-c_1").result()
    assert "a.b-c_1" in str(error.value) and error.value.category.value.lower() == "user"
    before = forward_logprobs(client, tokens(9))
    steps(client, range(2))
    assert not np.array_equal(before, forward_logprobs(client, tokens(9)))
    path = client.save_state("a.b-c_1", overwrite=True, user_metadata={"step": "2"}).result().path
    assert np.array_equal(forward_logprobs(service.create_training_client_from_state(path).result(), tokens(9)),
                          forward_logprobs(client, tokens(9)))
    for name in ("..", ".hidden", "a/b", "", "x" * 200, "a b", "ü"):
        with pytest.raises(Exception) as error:
            client.save_state(name).result()
        assert not isinstance(error.value, (tinker.InternalServerError, tinker.APIConnectionError)), name
    assert client.save_state("after").result().path.endswith("/weights/after")


def test_loading_what_does_not_fit(service):
    a = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    b = service.create_lora_training_client("tiny", rank=8, seed=1).result()
    llama = service.create_lora_training_client("tiny-llama", rank=4, seed=1).result()
    path = a.save_state("rank-4").result().path
    sampler_path = a.save_weights_for_sampler("no-optimizer").result().path
    before = forward_logprobs(b, tokens(9))
    for client, which, with_optimizer in ((b, path, False), (llama, path, False), (a, sampler_path, True),
                                          (a, path.replace("rank-4", "missing"), False)):
        with pytest.raises(tinker.RequestFailedError) as error:
            (client.load_state_with_optimizer if with_optimizer else client.load_state)(which).result()
        assert error.value.category.value.lower() == "user"
    assert np.array_equal(before, forward_logprobs(b, tokens(9)))
    a.load_state(sampler_path).result()
    with pytest.raises(Exception):
        service.create_training_client_from_state("tinker://no-such-run/weights/x").result().get_info()


def test_lists(service, server):
    rest = tinker.RestClient(base_url=server.url)
    client = service.create_lora_training_client("tiny", rank=4, seed=1, user_metadata={"purpose": "lists"}).result()
    run_id = client.get_info().model_id
    weights = client.save_state("w1", user_metadata={"k": "v"}).result().path
    sampler = client.save_weights_for_sampler("s1").result().path
    external = client.save_weights_external("e1").result().path
    listed = {c.tinker_path: c for c in rest.list_checkpoints(run_id).result().checkpoints}
    assert set(listed) == {weights, sampler, external}
    assert {c.checkpoint_type for c in listed.values()} == {"training", "sampler", "external"}
    assert listed[weights].checkpoint_id == "weights/w1"
    assert listed[weights].user_metadata == {"k": "v"}
    assert listed[weights].time.tzinfo is not None
    assert all(c.size_bytes > 0 and not c.public for c in listed.values())

    everything = rest.list_user_checkpoints(limit=500).result()
    assert {weights, sampler, external} <= {c.tinker_path for c in everything.checkpoints}
    times = [c.time for c in everything.checkpoints]
    assert times == sorted(times, reverse=True)
    page = rest.list_user_checkpoints(limit=2, offset=1).result()
    assert [c.tinker_path for c in page.checkpoints] == [c.tinker_path for c in everything.checkpoints[1:3]]
    assert page.cursor.total_count == everything.cursor.total_count >= 3

    run = rest.get_training_run(run_id).result()
    assert (run.training_run_id, run.base_model, run.is_lora, run.lora_rank) == (run_id, "tiny", True, 4)
    assert not run.corrupted
    assert run.last_checkpoint.tinker_path == weights and run.last_sampler_checkpoint.tinker_path == sampler
    assert rest.get_training_run_by_tinker_path(weights).result().training_run_id == run_id
    runs = rest.list_training_runs(limit=500).result()
    assert run_id in {r.training_run_id for r in runs.training_runs}

    info = rest.get_weights_info_by_tinker_path(weights).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == ("tiny", True, 4)

    session_id = run_id.split(":")[0]
    assert session_id in rest.list_sessions(limit=500).result().sessions
    session = rest.get_session(session_id).result()
    assert run_id in session.training_run_ids
    by_path = service.create_sampling_client(model_path=sampler).result()
    assert by_path.sample(prompt(tokens(3)), 1, types.SamplingParams(max_tokens=1)).result().sequences
    again = rest.get_session(session_id).result()
    assert len(again.sampler_ids) >= 1
    sampler_info = rest.get_sampler(again.sampler_ids[-1]).result()
    assert sampler_info.base_model == "tiny" and sampler_info.model_path == sampler


def test_publish_ttl_and_delete(service, server):
    rest = tinker.RestClient(base_url=server.url)
    client = service.create_lora_training_client("tiny", rank=2, seed=1).result()
    run_id = client.get_info().model_id
    path = client.save_state("x", ttl_seconds=7200).result().path

    def row():
        return {c.tinker_path: c for c in rest.list_checkpoints(run_id).result().checkpoints}.get(path)

    assert row().expires_at is not None and 7000 < (row().expires_at - row().time).total_seconds() < 7300
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert row().expires_at is None
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    assert row().expires_at is not None
    rest.publish_checkpoint_from_tinker_path(path).result()
    assert row().public
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    assert not row().public
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert row() is None
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(Exception):
        client.load_state(path).result()
    assert client.save_state("x").result().path == path  # the name is free again
    with pytest.raises(Exception):
        client.save_state("too-short", ttl_seconds=5).result()


def test_external_weights_are_a_peft_folder(service, server):
    rest = tinker.RestClient(base_url=server.url)
    client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    steps(client, range(3))
    path = client.save_weights_external("export").result().path
    answer = rest.get_external_weights_urls(path).result()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(answer.urls)
    files = {}
    for name, url in answer.urls.items():
        with urllib.request.urlopen(url) as reply:  # without any key
            body = reply.read()
            assert int(reply.headers["Content-Length"]) == len(body)
            files[name] = body
    config = json.load(io.BytesIO(files["adapter_config.json"]))
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 32)
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
                                             "lm_head"}
    arrays = safetensors(files["adapter_model.safetensors"])
    assert len(arrays) == 2 * (7 * 2 + 1)
    p = "base_model.model."
    assert arrays[p + "model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 64)
    assert arrays[p + "model.layers.1.mlp.down_proj.lora_B.weight"].shape == (64, 4)
    assert arrays[p + "lm_head.lora_B.weight"].shape == (320, 4)
    assert all(np.isfinite(a).all() and (a != 0).any() for a in arrays.values())
    url = next(iter(answer.urls.values()))
    with pytest.raises(urllib.error.HTTPError) as error:  # the address is the secret
        urllib.request.urlopen(url[:-4] + "0000" if not url.endswith("0000") else url[:-4] + "1111")
    assert error.value.code in (401, 403, 404)


def test_fresh_adapters(service, server):
    """B = 0 and A uniform within 1/sqrt(in), the same for the same seed."""
    rest = tinker.RestClient(base_url=server.url)
    exported = []
    for _ in range(2):
        client = service.create_lora_training_client("tiny", rank=8, seed=77).result()
        path = client.save_weights_external("start").result().path
        url = rest.get_external_weights_urls(path).result().urls["adapter_model.safetensors"]
        with urllib.request.urlopen(url) as reply:
            exported.append(safetensors(reply.read()))
    for name, a in exported[0].items():
        assert np.array_equal(a, exported[1][name])
        if ".lora_B." in name:
            assert (a == 0).all()
        else:
            bound = 1 / np.sqrt(a.shape[1])
            assert np.abs(a).max() <= bound and np.abs(a).max() > 0.9 * bound and abs(a.mean()) < 0.1 * bound


def test_ending_a_session(server):
    service = tinker.ServiceClient(base_url=server.url)
    client = service.create_lora_training_client("tiny", rank=2, seed=1).result()
    path = client.save_state("kept").result().path
    service.close("success", "done").result()
    other = tinker.ServiceClient(base_url=server.url)
    assert other.create_training_client_from_state(path).result().get_info().lora_rank == 2
    other.close("success").result()


def test_copies(service, server):
    """A copy keeps the weights when the original is deleted, and is a run of its own."""
    rest = tinker.RestClient(base_url=server.url)
    client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    steps(client, range(2))
    want = forward_logprobs(client, tokens(9))
    for path in (client.save_state("original").result().path, client.save_weights_for_sampler("sampler").result().path):
        copy = rest.copy_weights(path, "a-project", ttl_seconds=7200).result()
        assert copy != path and copy.split("/")[3] == path.split("/")[3]
        rest.delete_checkpoint_from_tinker_path(path).result()
        lps = service.create_sampling_client(model_path=copy).result().compute_logprobs(prompt(tokens(9))).result()
        assert np.array_equal(np.array(lps[1:], np.float32), want)
        assert rest.get_weights_info_by_tinker_path(copy).result().lora_rank == 4
        row = {c.tinker_path: c for c in rest.list_user_checkpoints(limit=500).result().checkpoints}[copy]
        assert row.expires_at is not None
    with pytest.raises(Exception):
        rest.copy_weights("tinker://no-such-run/weights/x", "a-project").result()


def test_search_sessions(server):
    rest = tinker.RestClient(base_url=server.url)
    made = []
    for i in range(3):
        s = tinker.ServiceClient(base_url=server.url, user_metadata={"hunt": str(i % 2)}, display_name=f"Blue Whale {i}")
        run = s.create_lora_training_client("tiny", rank=1).result()
        made.append((run.get_info().model_id.split(":")[0], s))
    assert [x.session_id for x in rest.search_sessions(types.SessionSearchRequest(session_id=made[0][0])).result().sessions] == \
        [made[0][0]]
    by_name = rest.search_sessions(types.SessionSearchRequest(display_name="whale blue")).result().sessions
    assert [x.session_id for x in by_name] == [m[0] for m in made[::-1]]
    by_data = rest.search_sessions(types.SessionSearchRequest(display_name="whale", user_metadata={"hunt": "0"})).result()
    assert {x.session_id for x in by_data.sessions} == {made[0][0], made[2][0]}
    page = rest.search_sessions(types.SessionSearchRequest(display_name="whale", limit=2)).result()
    assert len(page.sessions) == 2 and page.next_cursor is not None
    rest_page = rest.search_sessions(types.SessionSearchRequest(display_name="whale", limit=2, cursor=page.next_cursor)).result()
    assert [x.session_id for x in rest_page.sessions] == [made[0][0]]
    for _, s in made:
        s.close("success").result()
