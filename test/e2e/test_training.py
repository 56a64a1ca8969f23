"""Training through the SDK: forward, forward_backward, losses, accumulation, the optimizer, order and repeatability."""

import numpy as np
import pytest
from common import (ADAM, VOCAB, adam, expected_loss, forward_logprobs, logprobs, prompt, rl_datum, sft_datum, tokens,
                    topk_datum)
from daemon import end

tinker = pytest.importorskip("tinker")
types = tinker.types


def train(client, steps, datum_seed=0, lr=1e-2):
    """A few supervised steps; the losses as the server gave them."""
    losses = []
    for step in range(steps):
        fb = client.forward_backward([sft_datum(10, seed=datum_seed + i) for i in range(3)], "cross_entropy")
        opt = client.optim_step(adam(learning_rate=lr))
        losses.append(fb.result().metrics["loss:sum"])
        opt.result()
    return losses


@pytest.mark.smoke
def test_loss_falls(service):
    client = service.create_lora_training_client("tiny", rank=8, seed=3).result()
    losses = train(client, 12)
    assert losses[-1] < 0.5 * losses[0], losses
    assert all(np.isfinite(losses))


def test_model_info(service):
    client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    info = client.get_info()
    assert info.model_data.model_name == "tiny"
    assert info.is_lora and info.lora_rank == 4
    assert ":train:" in info.model_id


def test_capabilities(service):
    models = {m.model_name: m for m in service.get_server_capabilities().supported_models}
    assert {"tiny", "tiny-llama"} <= set(models)
    assert models["tiny"].max_context_length == 512


def test_tokenizer_is_found(service):
    pytest.importorskip("transformers")
    client = service.create_lora_training_client("tiny", rank=4).result()
    tok = client.get_tokenizer()
    assert tok.decode(tok.encode("Hello there")) == "Hello there"


def test_ranks_flags_and_seeds(service):
    """Every rank and every choice of trained parts gives a model that learns; equal seeds give equal models."""
    ids = tokens(12)
    variants = [dict(rank=1), dict(rank=2, train_attn=False), dict(rank=8, train_mlp=False),
                dict(rank=3, train_unembed=False), dict(rank=32, train_attn=False, train_mlp=False)]
    futures = [service.create_lora_training_client("tiny", seed=7, **v) for v in variants]
    clients = [f.result() for f in futures]
    start = [forward_logprobs(c, ids) for c in clients]
    for lp in start[1:]:  # B = 0: no adapter changes the base model
        assert np.array_equal(lp, start[0])
    for client, variant in zip(clients, variants):
        losses = train(client, 4)
        assert losses[-1] < losses[0], (variant, losses)
    a, b, c = (service.create_lora_training_client("tiny", rank=4, seed=s).result() for s in (5, 5, 6))
    results = []
    for client in (a, b, c):
        train(client, 2)
        results.append(forward_logprobs(client, ids))
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_two_identical_runs_give_equal_numbers(service):
    runs = []
    for _ in range(2):
        client = service.create_lora_training_client("tiny", rank=8, seed=11).result()
        losses = train(client, 5)
        runs.append((losses, forward_logprobs(client, tokens(20, 3)).tolist()))
    assert runs[0] == runs[1]


def test_forward_equals_forward_backward_and_leaves_no_gradient(service):
    data = [sft_datum(9, seed=1), sft_datum(5, seed=2)]
    a = service.create_lora_training_client("tiny", rank=4, seed=2).result()
    b = service.create_lora_training_client("tiny", rank=4, seed=2).result()
    for client in (a, b):  # away from B = 0
        train(client, 2)
    fwd = a.forward(data, "cross_entropy").result()
    fb = b.forward_backward(data, "cross_entropy").result()
    for x, y in zip(logprobs(fwd), logprobs(fb)):
        assert np.array_equal(x, y)
    assert fwd.metrics["loss:sum"] == fb.metrics["loss:sum"]
    # a's forward must not count: both do the same step now
    a.forward_backward(data, "cross_entropy").result()
    a.optim_step(adam()).result()
    b.optim_step(adam()).result()
    assert np.array_equal(forward_logprobs(a, tokens(12)), forward_logprobs(b, tokens(12)))


@pytest.mark.parametrize("loss_fn,config", [
    ("cross_entropy", None),
    ("importance_sampling", None),
    ("ppo", None),
    ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.05}),
    ("cispo", None),
    ("cispo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
    ("dro", {"beta": 0.05}),
    ("dro", {"beta": 0.7}),
    ("gspo", None),
    ("gspo", {"clip_low_threshold": 0.99, "clip_high_threshold": 1.01}),
])
def test_loss_values(service, loss_fn, config):
    """loss:sum is the published formula, applied to the logprobs that came back."""
    client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    if loss_fn == "cross_entropy":
        data = [sft_datum(8, seed=i, weights=[1.0, -0.5, 0.0, 2.5, 1e-3, 0.25, -3.0, 1.0]) for i in range(3)]
    else:
        data = [rl_datum(10, seed=i, gspo=loss_fn == "gspo") for i in range(4)]
    out = client.forward_backward(data, loss_fn, loss_fn_config=config).result()
    got = logprobs(out)
    assert [len(g) for g in got] == [d.model_input.length for d in data]
    assert all((g < 0).all() for g in got)
    want = expected_loss(loss_fn, data, got, config)
    assert out.metrics["loss:sum"] == pytest.approx(want, rel=2e-5, abs=2e-4)
    again = client.forward(data, loss_fn, loss_fn_config=config).result()
    assert again.metrics["loss:sum"] == out.metrics["loss:sum"]
    before = forward_logprobs(client, tokens(12))
    client.optim_step(adam()).result()
    assert not np.array_equal(before, forward_logprobs(client, tokens(12)))


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_policy_losses_move_logprobs_the_right_way(service, loss_fn):
    """On-policy, a positive advantage raises the tokens' logprobs, a negative one lowers them."""
    for sign in (1.0, -1.0):
        client = service.create_lora_training_client("tiny", rank=8, seed=4).result()
        ids = tokens(11, 9)
        before = forward_logprobs(client, ids)
        inputs = {"target_tokens": ids[1:], "logprobs": before.tolist(), "advantages": [sign] * 10}
        if loss_fn == "gspo":
            inputs["sequence_ratio_mask"] = [1.0] * 10
        datum = types.Datum(model_input=prompt(ids[:-1]), loss_fn_inputs=inputs)
        client.forward_backward([datum], loss_fn).result()
        client.optim_step(adam(learning_rate=1e-3)).result()
        after = forward_logprobs(client, ids)
        assert sign * (after - before).sum() > 0


def test_topk_targets(service):
    """Two-dimensional targets: logprobs of K tokens a position, soft targets, several K in one request, and CSR."""
    client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    data = [topk_datum(6, 3, seed=1), topk_datum(4, 5, seed=2)]
    out = client.forward_backward(data, "cross_entropy").result()
    got = logprobs(out)
    assert [g.shape for g in got] == [(6, 3), (4, 5)]
    assert out.metrics["loss:sum"] == pytest.approx(expected_loss("cross_entropy", data, got), rel=1e-5)
    # column j is what a 1-D request for those targets says
    targets = data[0].loss_fn_inputs["target_tokens"].to_numpy()
    for j in range(3):
        one = types.Datum(model_input=data[0].model_input,
                          loss_fn_inputs={"target_tokens": targets[:, j].tolist(), "weights": [1.0] * 6})
        assert np.array_equal(logprobs(client.forward([one], "cross_entropy").result())[0], got[0][:, j])
    # the same targets and weights as CSR, with cells that are not listed
    dense_t = np.zeros((6, 8), np.int64)
    dense_w = np.zeros((6, 8), np.float32)
    dense_t[:, 2], dense_w[:, 2] = targets[:, 0], 0.75
    crow, col = list(range(7)), [2] * 6
    t = types.TensorData(data=dense_t[:, 2].tolist(), dtype="int64", shape=[6, 8], sparse_crow_indices=crow,
                         sparse_col_indices=col)
    w = types.TensorData(data=[0.75] * 6, dtype="float32", shape=[6, 8], sparse_crow_indices=crow, sparse_col_indices=col)
    sparse = types.Datum(model_input=data[0].model_input, loss_fn_inputs={"target_tokens": t, "weights": w})
    dense = types.Datum(model_input=data[0].model_input, loss_fn_inputs={"target_tokens": dense_t, "weights": dense_w})
    a, b = (client.forward([d], "cross_entropy").result() for d in (sparse, dense))
    assert a.metrics == b.metrics
    assert np.array_equal(logprobs(a)[0], logprobs(b)[0])


def test_gradients_accumulate(service):
    """Two calls and one call with both data give the same step; so does halving all weights twice."""
    d1, d2 = sft_datum(9, seed=1), sft_datum(7, seed=2)
    results = []
    for calls in ([[d1], [d2]], [[d1, d2]], [[sft_datum(9, seed=1, weights=[0.5] * 9)]] * 2 + [[d2]]):
        client = service.create_lora_training_client("tiny", rank=4, seed=9).result()
        train(client, 2)
        for data in calls:
            client.forward_backward(data, "cross_entropy").result()
        client.optim_step(adam(eps=1e-3)).result()
        results.append(forward_logprobs(client, tokens(20, 1)))
    assert np.allclose(results[0], results[1], atol=2e-5, rtol=0)
    assert np.allclose(results[0], results[2], atol=2e-5, rtol=0)


def test_the_step_consumes_the_gradient(service):
    """After a step the gradient is gone: a second step moves the weights only along the old momentum."""
    a, b = (service.create_lora_training_client("tiny", rank=4, seed=9).result() for _ in range(2))
    for client in (a, b):
        client.forward_backward([sft_datum(9)], "cross_entropy").result()
        client.optim_step(adam()).result()
    one = forward_logprobs(a, tokens(12))
    a.optim_step(adam(beta1=0.0)).result()  # beta1 = 0: the update is the gradient, which must be zero
    assert np.array_equal(forward_logprobs(a, tokens(12)), one)
    b.optim_step(adam(learning_rate=1e-2)).result()  # with momentum the weights go on moving
    assert not np.array_equal(forward_logprobs(b, tokens(12)), one)


def test_a_step_without_any_gradient(service):
    client = service.create_lora_training_client("tiny", rank=4, seed=9).result()
    before = forward_logprobs(client, tokens(12))
    result = client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    assert result.metrics is None or all(np.isfinite(list(result.metrics.values())))
    assert np.array_equal(before, forward_logprobs(client, tokens(12)))


def test_sdk_default_adam(service):
    """eps = 1e-12 and no epsilon games: the first step moves every weight that has a gradient by the learning rate."""
    client = service.create_lora_training_client("tiny", rank=4, seed=9).result()
    losses = []
    for _ in range(6):
        losses.append(client.forward_backward([sft_datum(9)], "cross_entropy").result().metrics["loss:sum"])
        client.optim_step(types.AdamParams(learning_rate=5e-3)).result()
    assert losses[-1] < losses[0]


def test_gradient_clipping_and_weight_decay(service):
    runs = {}
    for name, change in (("plain", {}), ("clipped", {"grad_clip_norm": 1e-3}), ("huge clip", {"grad_clip_norm": 1e9}),
                         ("decay", {"weight_decay": 0.5})):
        client = service.create_lora_training_client("tiny", rank=4, seed=9).result()
        for _ in range(3):
            client.forward_backward([sft_datum(9)], "cross_entropy").result()
            metrics = client.optim_step(adam(eps=1e-2, **change)).result().metrics or {}
        runs[name] = (forward_logprobs(client, tokens(12)), metrics)
    base = forward_logprobs(service.create_lora_training_client("tiny", rank=4, seed=9).result(), tokens(12))
    moved = {name: float(np.abs(lp - base).max()) for name, (lp, _) in runs.items()}
    assert np.array_equal(runs["plain"][0], runs["huge clip"][0])
    assert 0 < moved["clipped"] < 0.5 * moved["plain"], moved
    assert not np.array_equal(runs["plain"][0], runs["decay"][0])


def test_many_data_in_chunks(start):
    """A call that the SDK splits: later chunks arrive before the first; the sum and the order must come out right. The server
    asks for chunks of a quarter of --max-body."""
    from tinker_raw import Raw
    server = start(args=["--max-body", "256K"])
    with Raw(server.url) as raw:
        limit = raw.ok("client/config", {"sdk_version": "0.38.0"})["fwdbwd_max_chunk_bytes_count"]
    per_chunk = limit // (12 * (4 + 8 + 4))
    n = 3 * per_chunk + 7
    assert 100 < n < 5000
    data = [sft_datum(12, seed=i) for i in range(n)]
    service = tinker.ServiceClient(base_url=server.url)
    client = service.create_lora_training_client("tiny", rank=2, seed=1).result()
    fb = client.forward_backward(data, "cross_entropy")
    step = client.optim_step(adam())
    out = fb.result()
    step.result()
    got = logprobs(out)
    assert len(got) == n
    assert out.metrics["loss:sum"] == pytest.approx(expected_loss("cross_entropy", data, got), rel=1e-5)
    other = service.create_lora_training_client("tiny", rank=2, seed=1).result()
    for i in (0, 1, per_chunk - 1, per_chunk, per_chunk + 1, n - 1):  # a datum's numbers do not depend on its company
        alone = logprobs(other.forward([data[i]], "cross_entropy").result())[0]
        assert np.array_equal(alone, got[i]), i
    # the step used the gradient of all chunks
    for part in (data[:n // 2], data[n // 2:]):
        other.forward_backward(part, "cross_entropy").result()
    other.optim_step(adam()).result()
    assert np.allclose(forward_logprobs(client, tokens(20)), forward_logprobs(other, tokens(20)), atol=1e-3)
    end(service)


def test_one_long_datum(service):
    """As long as the context allows; one more token is a clear error, and the model goes on."""
    client = service.create_lora_training_client("tiny", rank=2, seed=1).result()
    out = client.forward_backward([sft_datum(512, seed=5)], "cross_entropy").result()
    assert logprobs(out)[0].shape == (512,)
    with pytest.raises(tinker.RequestFailedError) as error:
        client.forward_backward([sft_datum(513, seed=5)], "cross_entropy").result()
    assert "512" in str(error.value)
    client.optim_step(adam()).result()


def test_pipelined_steps(service):
    """Everything submitted ahead of time runs in order and gives what waiting each time gives."""
    a, b = (service.create_lora_training_client("tiny", rank=4, seed=9).result() for _ in range(2))
    waited = train(a, 6)
    futures = []
    for _ in range(6):
        futures.append(b.forward_backward([sft_datum(10, seed=i) for i in range(3)], "cross_entropy"))
        futures.append(b.optim_step(adam()))
    results = [f.result() for f in futures]
    assert [r.metrics["loss:sum"] for r in results[::2]] == waited


def test_errors_are_clear_and_leave_no_trace(service):
    """A failed request changes nothing, and later ones run."""
    a, b = (service.create_lora_training_client("tiny", rank=4, seed=9).result() for _ in range(2))
    good = sft_datum(9)
    ids = tokens(5)

    def datum(targets, **inputs):
        return types.Datum(model_input=prompt(ids), loss_fn_inputs={"target_tokens": targets, **inputs})

    bad = [
        ([good, datum([VOCAB] * 5, weights=[1.0] * 5)], "cross_entropy", None, "320"),
        ([good, datum([-1] * 5, weights=[1.0] * 5)], "cross_entropy", None, "-1"),
        ([good, datum([1] * 4, weights=[1.0] * 4)], "cross_entropy", None, "target_tokens"),
        ([good, datum([1] * 5, weights=[1.0] * 4)], "cross_entropy", None, "weights"),
        ([good, datum([1] * 5, weights=[1.0, float("nan"), 1.0, 1.0, 1.0])], "cross_entropy", None, "weights"),
        ([good, datum([1] * 5, weights=[1.0, float("inf"), 1.0, 1.0, 1.0])], "cross_entropy", None, "weights"),
        ([datum([1] * 5, weights=[1.0] * 5)], "ppo", None, "logprobs"),
        ([datum([1] * 5, logprobs=[-1.0] * 5)], "ppo", None, "advantages"),
        ([datum([1] * 5, logprobs=[-1.0] * 5, advantages=[1.0] * 5)], "gspo", None, "sequence_ratio_mask"),
        ([datum([1] * 5, logprobs=[-1.0] * 5, advantages=[1.0] * 5)], "ppo", {"no_such_key": 1.0}, "no_such_key"),
        ([datum([1] * 5, weights=[1.0] * 5)], "no_such_loss", None, "no_such_loss"),
        ([datum([[1, 2]] * 5, logprobs=types.TensorData(data=[-1.0] * 10, dtype="float32", shape=[5, 2]),
                advantages=types.TensorData(data=[1.0] * 10, dtype="float32", shape=[5, 2]))], "ppo", None, "target_tokens"),
        ([types.Datum(model_input=prompt([]), loss_fn_inputs={"target_tokens": types.TensorData(
            data=[], dtype="int64", shape=[0])})], "cross_entropy", None, ""),
    ]
    a.forward_backward([good], "cross_entropy").result()
    b.forward_backward([good], "cross_entropy").result()
    for data, loss_fn, config, word in bad:
        with pytest.raises(tinker.RequestFailedError) as error:
            a.forward_backward(data, loss_fn, loss_fn_config=config).result()
        assert word in str(error.value), (word, str(error.value))
        assert error.value.category.value.lower() == "user", str(error.value)
    for client in (a, b):
        client.optim_step(adam()).result()
    assert np.array_equal(forward_logprobs(a, tokens(12)), forward_logprobs(b, tokens(12)))


@pytest.mark.parametrize("change", [{"learning_rate": -1.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"weight_decay": -1.0}])
def test_bad_adam_parameters(service, change):
    client = service.create_lora_training_client("tiny", rank=4, seed=9).result()
    client.forward_backward([sft_datum(9)], "cross_entropy").result()
    before = forward_logprobs(client, tokens(12))
    with pytest.raises(tinker.RequestFailedError) as error:
        client.optim_step(types.AdamParams(**{**ADAM, **change})).result()
    assert next(iter(change)) in str(error.value)
    assert np.array_equal(before, forward_logprobs(client, tokens(12)))


def test_bad_creations(service):
    for args, word in ((dict(base_model="no-such-model"), "no-such-model"), (dict(base_model="tiny", rank=0), "rank"),
                       (dict(base_model="tiny", rank=100000), "rank"),
                       (dict(base_model="tiny", train_mlp=False, train_attn=False, train_unembed=False), "train_")):
        with pytest.raises(Exception) as error:
            service.create_lora_training_client(**args).result().get_info()
        assert word in str(error.value)
    service.create_lora_training_client("tiny", rank=2).result()


def test_other_family(service):
    client = service.create_lora_training_client("tiny-llama", rank=8, seed=1).result()
    losses = train(client, 8)
    assert losses[-1] < 0.7 * losses[0]


def test_custom_loss(service):
    """forward_backward_custom with the same loss as cross_entropy gives the same gradient, hence the same step."""
    torch = pytest.importorskip("torch")
    a, b = (service.create_lora_training_client("tiny", rank=4, seed=9).result() for _ in range(2))
    data = [sft_datum(9, seed=1), sft_datum(6, seed=2)]

    def loss(batch, lps):
        total = -sum((torch.tensor(d.loss_fn_inputs["weights"].data) * lp).sum() for d, lp in zip(batch, lps))
        return total, {"mine": float(total)}

    for _ in range(2):
        out = a.forward_backward_custom(data, loss)
        step = a.optim_step(adam())
        metrics = out.result().metrics
        step.result()
        direct = b.forward_backward(data, "cross_entropy").result()
        b.optim_step(adam()).result()
        assert metrics["loss:sum"] == pytest.approx(direct.metrics["loss:sum"], rel=1e-5)
    assert np.array_equal(forward_logprobs(a, tokens(12)), forward_logprobs(b, tokens(12)))


def test_the_async_calls(service):
    import asyncio

    async def tour():
        client = await service.create_lora_training_client_async("tiny", rank=4, seed=2)
        assert (await client.get_info_async()).lora_rank == 4
        fb = await client.forward_backward_async([sft_datum(9)], "cross_entropy")
        step = await client.optim_step_async(adam())
        first = (await fb.result_async()).metrics["loss:sum"]
        await step.result_async()
        fwd = await client.forward_async([sft_datum(9)], "cross_entropy")
        assert (await fwd.result_async()).metrics["loss:sum"] < first
        sampler = await client.save_weights_and_get_sampling_client_async()
        out = await sampler.sample_async(prompt(tokens(4)), 1, types.SamplingParams(max_tokens=3, seed=1))
        assert len(out.sequences[0].tokens) <= 3
        assert len(await sampler.compute_logprobs_async(prompt(tokens(4)))) == 4

    asyncio.run(tour())
