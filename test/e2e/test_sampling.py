"""Sampling through the SDK, and its agreement with training."""

import math

import numpy as np
import pytest
from common import VOCAB, adam, forward_logprobs, prompt, sft_datum, tokens
from daemon import end

tinker = pytest.importorskip("tinker")
types = tinker.types
Params = types.SamplingParams


@pytest.fixture(scope="module")
def setup(server):
    """A trained model (its adapter is not zero) and a sampler of it."""
    service = tinker.ServiceClient(base_url=server.url)
    client = service.create_lora_training_client("tiny", rank=8, seed=3).result()
    for i in range(3):
        client.forward_backward([sft_datum(10, seed=i)], "cross_entropy")
        client.optim_step(adam(learning_rate=3e-3)).result()
    yield client, client.save_weights_and_get_sampling_client().result(), service
    end(service)


@pytest.fixture
def client(setup):
    return setup[0]


@pytest.fixture
def sampler(setup):
    return setup[1]


def one(sampler, ids, **params):
    return sampler.sample(prompt(ids), 1, Params(**params)).result().sequences[0]


@pytest.mark.smoke
def test_sampled_logprobs_are_the_trainers(client, sampler):
    """The promise of the design: a sampled token's logprob and the training side's are the same bits."""
    ids = tokens(7, 1)
    seq = one(sampler, ids, max_tokens=40, seed=5, stop=[])
    assert len(seq.tokens) == 40 and seq.stop_reason == "length"
    want = forward_logprobs(client, ids + seq.tokens)[len(ids) - 1:]
    got = np.array(seq.logprobs, np.float32)
    assert np.abs(got - want).max() <= 1e-3
    assert np.array_equal(got, want), f"not the same bits: {np.abs(got - want).max()}"


def test_compute_logprobs_are_forward_logprobs(client, sampler):
    ids = tokens(60, 2)
    lps = sampler.compute_logprobs(prompt(ids)).result()
    assert lps[0] is None and len(lps) == 60
    want = forward_logprobs(client, ids)
    assert np.abs(np.array(lps[1:], np.float32) - want).max() <= 1e-3
    assert np.array_equal(np.array(lps[1:], np.float32), want)


def test_seeds_repeat(sampler):
    ids = tokens(5, 3)
    a = one(sampler, ids, max_tokens=20, seed=42, stop=[])
    b = one(sampler, ids, max_tokens=20, seed=42, stop=[])
    c = one(sampler, ids, max_tokens=20, seed=43, stop=[])
    assert (a.tokens, a.logprobs) == (b.tokens, b.logprobs)
    assert a.tokens != c.tokens
    free = [tuple(one(sampler, ids, max_tokens=20, stop=[]).tokens) for _ in range(3)]
    assert len(set(free)) == 3
    assert len(one(sampler, ids, max_tokens=5, seed=2**63 - 1, stop=[]).tokens) == 5


def test_several_samples(sampler):
    ids = tokens(5, 4)
    out = sampler.sample(prompt(ids), 5, Params(max_tokens=12, seed=1, stop=[])).result()
    assert len(out.sequences) == 5
    assert len({tuple(s.tokens) for s in out.sequences}) == 5
    assert len({s.sequence_id for s in out.sequences}) == 5
    again = sampler.sample(prompt(ids), 5, Params(max_tokens=12, seed=1, stop=[])).result()
    assert [s.tokens for s in again.sequences] == [s.tokens for s in out.sequences]
    fewer = sampler.sample(prompt(ids), 2, Params(max_tokens=12, seed=1, stop=[])).result()
    assert [s.tokens for s in fewer.sequences] == [s.tokens for s in out.sequences[:2]]


def test_temperature_zero_is_the_best_token(client, sampler):
    ids = tokens(6, 5)
    seq = one(sampler, ids, max_tokens=10, temperature=0.0, stop=[])
    assert seq.tokens == one(sampler, ids, max_tokens=10, temperature=0.0, seed=9, stop=[]).tokens
    out = sampler.sample(prompt(ids + seq.tokens), 1, Params(max_tokens=1), include_prompt_logprobs=True,
                         topk_prompt_logprobs=2).result()
    for i, token in enumerate(seq.tokens):
        assert out.topk_prompt_logprobs[len(ids) + i][0][0] == token
    assert seq.tokens == one(sampler, ids, max_tokens=10, top_k=1, stop=[]).tokens


def test_top_k_and_top_p_cut_the_distribution(sampler):
    ids = tokens(6, 6)
    best = [t for t, _ in sampler.sample(prompt(ids), 1, Params(max_tokens=1), topk_sample_logprobs=VOCAB).result()
            .sequences[0].topk_logprobs[0]]
    logp = dict(sampler.sample(prompt(ids), 1, Params(max_tokens=1), topk_sample_logprobs=VOCAB).result()
                .sequences[0].topk_logprobs[0])
    assert math.fsum(math.exp(v) for v in logp.values()) == pytest.approx(1, abs=1e-4)
    drawn = sampler.sample(prompt(ids), 200, Params(max_tokens=1, seed=1, top_k=3, temperature=5.0)).result().sequences
    assert {s.tokens[0] for s in drawn} == set(best[:3])
    mass, nucleus = 0.0, set()
    for t in best:
        nucleus.add(t)
        mass += math.exp(logp[t])
        if mass >= 0.3:
            break
    drawn = sampler.sample(prompt(ids), 200, Params(max_tokens=1, seed=1, top_p=0.3)).result().sequences
    assert {s.tokens[0] for s in drawn} <= nucleus
    assert drawn[0].tokens[0] in nucleus
    # what is returned stays the model's own logprob, without temperature and filters
    for s in drawn[:20]:
        assert s.logprobs[0] == np.float32(logp[s.tokens[0]])


def test_draws_follow_the_distribution(sampler):
    """Chi-square like check over 4,000 draws: the eight likeliest tokens come as often as they should."""
    ids = tokens(6, 7)
    top = sampler.sample(prompt(ids), 1, Params(max_tokens=1), topk_sample_logprobs=8).result().sequences[0].topk_logprobs[0]
    counts, n = {}, 0
    for seed in range(4):
        for s in sampler.sample(prompt(ids), 1000, Params(max_tokens=1, seed=seed, stop=[])).result().sequences:
            counts[s.tokens[0]] = counts.get(s.tokens[0], 0) + 1
            n += 1
    for token, lp in top:
        p = math.exp(lp)
        assert abs(counts.get(token, 0) - n * p) < 6 * math.sqrt(n * p * (1 - p)), (token, p, counts.get(token, 0))


def test_stop_tokens(sampler):
    ids = tokens(6, 8)
    whole = one(sampler, ids, max_tokens=30, seed=3, stop=[])
    k = next(i for i in range(5, 30) if whole.tokens[i] not in whole.tokens[:i])
    cut = one(sampler, ids, max_tokens=30, seed=3, stop=[whole.tokens[k]])
    assert cut.tokens == whole.tokens[:k + 1] and cut.stop_reason == "stop"
    assert cut.logprobs == whole.logprobs[:k + 1]
    # limit and stop on the same token: a stop
    both = one(sampler, ids, max_tokens=k + 1, seed=3, stop=[whole.tokens[k]])
    assert both.stop_reason == "stop"


def test_stop_strings(sampler, tiny):
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.Tokenizer.from_file(tiny + "/tokenizer.json")
    ids = tokens(6, 9)
    whole = one(sampler, ids, max_tokens=60, seed=1, stop=[], top_k=40)
    texts = [tok.decode([t], skip_special_tokens=False) for t in whole.tokens]
    # two neighbours that are plain text: a stop string that spans both
    k = next(i for i in range(2, 59) if all(x.isascii() and x.isprintable() and x for x in texts[i:i + 2])
             and "".join(texts[:i + 1]).find(texts[i] + texts[i + 1]) < 0)
    stop = texts[k] + texts[k + 1]
    cut = one(sampler, ids, max_tokens=60, seed=1, stop=stop, top_k=40)
    assert cut.stop_reason == "stop"
    assert stop in "".join(texts[:len(cut.tokens)])
    assert cut.tokens == whole.tokens[:len(cut.tokens)] and len(cut.tokens) <= k + 2
    same = one(sampler, ids, max_tokens=60, seed=1, stop=["never to be seen, not even once", stop], top_k=40)
    assert same.tokens == cut.tokens


def test_eos_stops_unless_told_otherwise(service, tiny):
    """Teach a model to end at once; it ends with stop=None, and goes on with stop=[]."""
    import json
    with open(tiny + "/generation_config.json", encoding="utf-8") as f:
        eos = json.load(f)["eos_token_id"]
    client = service.create_lora_training_client("tiny", rank=8, seed=3).result()
    ids = tokens(6, 10)
    datum = types.Datum(model_input=prompt(ids), loss_fn_inputs={"target_tokens": ids[1:] + [eos],
                                                                 "weights": [0.0] * 5 + [1.0]})
    for _ in range(30):
        client.forward_backward([datum], "cross_entropy")
        client.optim_step(adam()).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    ended = one(sampler, ids, max_tokens=8, temperature=0.0)
    assert ended.tokens == [eos] and ended.stop_reason == "stop"
    ran = one(sampler, ids, max_tokens=8, temperature=0.0, stop=[])
    assert len(ran.tokens) == 8 and ran.tokens[0] == eos and ran.stop_reason == "length"
    assert one(sampler, ids, max_tokens=8, temperature=0.0, stop=["no such text"]).tokens == [eos]


def test_topk_logprobs(sampler):
    ids = tokens(8, 11)
    out = sampler.sample(prompt(ids), 1, Params(max_tokens=4, seed=1, stop=[]), include_prompt_logprobs=True,
                         topk_prompt_logprobs=5, topk_sample_logprobs=3).result()
    assert out.prompt_logprobs[0] is None and out.topk_prompt_logprobs[0] is None
    for i in range(1, 8):
        top = out.topk_prompt_logprobs[i]
        assert len(top) == 5
        assert [v for _, v in top] == sorted((v for _, v in top), reverse=True)
        if ids[i] in dict(top):
            assert dict(top)[ids[i]] == out.prompt_logprobs[i]
        else:
            assert out.prompt_logprobs[i] <= top[-1][1]
    seq = out.sequences[0]
    assert len(seq.topk_logprobs) == 4 and all(len(t) == 3 for t in seq.topk_logprobs)
    for token, lp, top in zip(seq.tokens, seq.logprobs, seq.topk_logprobs):
        assert dict(top).get(token, lp) == lp


def test_prompt_logprobs_of_the_last_tokens(sampler):
    ids = tokens(30, 12)
    whole = sampler.compute_logprobs(prompt(ids)).result()
    for n in (1, 7, 29):
        part = sampler.compute_logprobs(prompt(ids), prompt_logprobs_last_n=n).result()
        assert part[:30 - n] == [None] * (30 - n)
        assert part[30 - n:] == whole[30 - n:]


def test_target_and_alternative_prompt_logprobs(client, sampler):
    ids = tokens(6, 13)
    targets = np.array([[1, -1], [2, 300], [-1, -1], [ids[4], 7], [8, 9]], np.int64)
    out = sampler.sample(prompt(ids), 1, Params(max_tokens=1), include_prompt_logprobs=True,
                         target_prompt_logprobs=types.TensorData.from_numpy(targets), prompt_alt_tokens_k=3).result()
    got = out.target_prompt_logprobs.to_numpy()
    assert got.shape == (5, 2)
    assert (got[targets == -1] == 0).all() and (got[targets != -1] < 0).all()
    assert got[3, 0] == np.float32(out.prompt_logprobs[4])
    alt = out.prompt_alt_tokens
    assert alt.tokens.to_numpy().shape == (5, 3) and alt.logprobs.to_numpy().shape == (5, 3)
    first = int(alt.tokens.to_numpy()[2, 0])
    datum = types.Datum(model_input=prompt(ids[:3]), loss_fn_inputs={"target_tokens": [0, 0, first], "weights": [0.0] * 3})
    lp = client.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()[2]
    assert alt.logprobs.to_numpy()[2, 0] == lp


def test_base_model_and_paths(service, client):
    """A sampler of the base model, of a sampler checkpoint and of a training checkpoint."""
    ids = tokens(9, 14)
    base = service.create_sampling_client(base_model="tiny").result()
    assert base.get_base_model() == "tiny"
    fresh = service.create_lora_training_client("tiny", rank=2, seed=1).result()
    assert np.array_equal(np.array(base.compute_logprobs(prompt(ids)).result()[1:], np.float32), forward_logprobs(fresh, ids))
    want = forward_logprobs(client, ids)
    for path in (client.save_weights_for_sampler("for-sampling").result().path, client.save_state("for-training").result().path):
        by_path = service.create_sampling_client(model_path=path).result()
        assert by_path.get_base_model() == "tiny"
        assert np.array_equal(np.array(by_path.compute_logprobs(prompt(ids)).result()[1:], np.float32), want)
    with pytest.raises(Exception, match="no-such"):
        service.create_sampling_client(base_model="no-such-model").result()
    with pytest.raises(Exception, match="missing"):
        service.create_sampling_client(model_path="tinker://run/sampler_weights/missing").result()


def test_a_sampler_keeps_its_weights(service):
    client = service.create_lora_training_client("tiny", rank=8, seed=1).result()
    ids = tokens(9, 15)
    samplers, at_the_time = [], []
    for i in range(4):
        samplers.append(client.save_weights_and_get_sampling_client().result())
        at_the_time.append(forward_logprobs(client, ids))
        client.forward_backward([sft_datum(10, seed=i)], "cross_entropy")
        client.optim_step(adam()).result()
    for sampler, want in zip(samplers, at_the_time):
        assert np.array_equal(np.array(sampler.compute_logprobs(prompt(ids)).result()[1:], np.float32), want)
    assert len({a.tobytes() for a in at_the_time}) == 4


def test_handle_in_another_client(sampler):
    handle = sampler.get_sampler_handle()
    other = tinker.SamplingClient.from_sampler_handle(handle)
    ids = tokens(5, 16)
    assert one(other, ids, max_tokens=6, seed=2, stop=[]).tokens == one(sampler, ids, max_tokens=6, seed=2, stop=[]).tokens


@pytest.mark.parametrize("params,word", [
    (dict(max_tokens=0), "max_tokens"), (dict(max_tokens=4, temperature=-1.0), "temperature"),
    (dict(max_tokens=4, top_p=0.0), "top_p"), (dict(max_tokens=4, top_p=1.5), "top_p"), (dict(max_tokens=4, top_k=0), "top_k"),
    (dict(max_tokens=4, top_k=-2), "top_k"), (dict(max_tokens=512), "context"), (dict(max_tokens=4, stop=[""]), "stop"),
])
def test_bad_parameters(sampler, params, word):
    with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError)) as error:
        one(sampler, tokens(5), **params)
    assert word in str(error.value)
    assert one(sampler, tokens(5), max_tokens=2, stop=[]).tokens


def test_bad_prompts(sampler):
    for ids, word in (([], "prompt"), ([1, VOCAB], "320"), (tokens(512), "context"), ([1, -5], "-5")):
        with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError)) as error:
            one(sampler, ids, max_tokens=4)
        assert word in str(error.value)
    assert len(one(sampler, tokens(508), max_tokens=4, stop=[]).tokens) == 4


def test_no_limit_means_the_rest_of_the_context(sampler):
    assert len(one(sampler, tokens(500), seed=1, stop=[]).tokens) == 12


def test_parallel_samples_equal_serial_ones(sampler):
    """64 at once: each gives the bits it gives alone."""
    prompts = [tokens(3 + i % 29, 100 + i) for i in range(64)]
    futures = [sampler.sample(prompt(p), 1, Params(max_tokens=6 + i % 7, seed=i, stop=[])) for i, p in enumerate(prompts)]
    together = [f.result().sequences[0] for f in futures]
    for i in range(0, 64, 9):
        alone = one(sampler, prompts[i], max_tokens=6 + i % 7, seed=i, stop=[])
        assert (alone.tokens, alone.logprobs) == (together[i].tokens, together[i].logprobs), i


def test_prompt_cache(client):
    """A prompt seen before under the same weights is not computed again, and gives the same numbers."""
    sampler = client.save_weights_and_get_sampling_client().result()
    ids = tokens(100, 77)
    first = sampler.sample(prompt(ids), 1, Params(max_tokens=8, seed=1, stop=[])).result()
    again = sampler.sample(prompt(ids), 1, Params(max_tokens=8, seed=1, stop=[])).result()
    assert not first.prompt_cache_hit_tokens
    assert again.prompt_cache_hit_tokens == 96
    assert again.sequences[0].tokens == first.sequences[0].tokens
    assert again.sequences[0].logprobs == first.sequences[0].logprobs
