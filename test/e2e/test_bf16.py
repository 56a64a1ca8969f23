"""The promises that hold in bf16 too; skipped where the processor has no bf16 product."""

import numpy as np
import pytest
from common import adam, forward_logprobs, logprobs, prompt, sft_datum, tokens
from daemon import OPTIONS, end

tinker = pytest.importorskip("tinker")
Params = tinker.SamplingParams


def has_bf16():
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
        return any("avx512_bf16" in line for line in f if line.startswith("flags"))


pytestmark = pytest.mark.skipif(not has_bf16() and "cuda" not in OPTIONS, reason="no AVX-512 BF16 here")


@pytest.fixture
def pair(start, tiny):
    """Services of two servers of the same model, one in bf16, one in float32."""
    services = [tinker.ServiceClient(base_url=start(dtype=d).url) for d in ("bf16", "f32")]
    yield services
    for s in services:
        end(s)


def test_bf16(pair):
    trained = []
    for service in pair:
        client = service.create_lora_training_client("tiny", rank=8, seed=1).result()
        losses = []
        for i in range(8):
            losses.append(client.forward_backward([sft_datum(10, seed=i % 3)], "cross_entropy").result().metrics["loss:sum"])
            client.optim_step(adam(learning_rate=5e-3)).result()
        trained.append((client, losses))
    (client, losses), (_, wanted) = trained
    assert losses[-1] < losses[0]
    assert np.allclose(losses, wanted, rtol=0.1)
    assert losses != wanted  # it is another arithmetic
    sampler = client.save_weights_and_get_sampling_client().result()
    ids = tokens(6, 1)
    seq = sampler.sample(prompt(ids), 1, Params(max_tokens=30, seed=2, stop=[])).result().sequences[0]
    want = forward_logprobs(client, ids + seq.tokens)[5:]
    assert np.abs(np.array(seq.logprobs) - want).max() <= 1e-3
    assert np.array_equal(np.array(seq.logprobs, np.float32), want)
    data = [sft_datum(n, seed=n) for n in (1, 2, 7, 16, 33, 100)]
    together = logprobs(client.forward(data, "cross_entropy").result())
    for d, lp in zip(data, together):
        assert np.array_equal(logprobs(client.forward([d], "cross_entropy").result())[0], lp)
