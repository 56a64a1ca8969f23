"""Data and formulas that several test files use."""

import math
import random

import numpy as np
from tinker import types

VOCAB = 320


def tokens(n, seed=0):
    rng = random.Random(f"tokens {seed}")
    return [rng.randrange(VOCAB) for _ in range(n)]


def sft_datum(n=12, seed=0, weights=None):
    t = tokens(n + 1, seed)
    return types.Datum(model_input=types.ModelInput.from_ints(t[:-1]),
                       loss_fn_inputs={"target_tokens": t[1:], "weights": weights or [1.0] * n})


def topk_datum(n=6, k=3, seed=0):
    rng = np.random.default_rng(seed)
    t = tokens(n, seed)
    w = rng.random((n, k)).astype(np.float32)
    return types.Datum(model_input=types.ModelInput.from_ints(t), loss_fn_inputs={
        "target_tokens": rng.integers(0, VOCAB, (n, k)).astype(np.int64), "weights": w / w.sum(1, keepdims=True)})


def rl_datum(n=12, seed=0, sampler_logprobs=None, gspo=False):
    """A datum of the reinforcement losses. Without given logprobs of the sampler, some are made that put ratios on both
    sides of every clip."""
    rng = random.Random(f"rl {seed}")
    t = tokens(n + 1, seed)
    q = sampler_logprobs or [-6.0 + 2 * rng.random() for _ in range(n)]
    inputs = {"target_tokens": t[1:], "logprobs": q, "advantages": [rng.choice([-1.0, -0.3, 0.0, 0.5, 1.5]) for _ in range(n)]}
    if gspo:
        inputs["sequence_ratio_mask"] = [0.0] * (n // 3) + [1.0] * (n - n // 3)
    return types.Datum(model_input=types.ModelInput.from_ints(t[:-1]), loss_fn_inputs=inputs)


def array(datum, name):
    return datum.loss_fn_inputs[name].to_numpy().astype(np.float64)


def logprobs(output):
    """The outputs of a forward or forward_backward as one array per datum."""
    return [np.array(o["logprobs"].to_numpy()) for o in output.loss_fn_outputs]


def expected_loss(loss_fn, data, outputs, config=None):
    """Sum over data and positions, in float64, from the logprobs that the server returned."""
    config = config or {}
    total = 0.0
    for datum, logp in zip(data, outputs):
        logp = logp.astype(np.float64)
        if loss_fn == "cross_entropy":
            total += -(array(datum, "weights") * logp).sum()
            continue
        q, a = array(datum, "logprobs"), array(datum, "advantages")
        ratio = np.exp(logp - q)
        lo = config.get("clip_low_threshold", 0.0 if loss_fn == "cispo" else 0.8)
        hi = config.get("clip_high_threshold", 4.0 if loss_fn == "cispo" else 1.2)
        if loss_fn == "gspo":
            mask = array(datum, "sequence_ratio_mask") != 0
            ratio = np.full_like(ratio, math.exp((logp - q)[mask].mean()))
        if loss_fn == "importance_sampling":
            total += -(ratio * a).sum()
        elif loss_fn in ("ppo", "gspo"):
            total += -np.minimum(ratio * a, np.clip(ratio, lo, hi) * a).sum()
        elif loss_fn == "cispo":
            total += -(np.clip(ratio, lo, hi) * logp * a).sum()
        elif loss_fn == "dro":
            beta = config.get("beta", 0.05)
            total += -(logp * a - 0.5 * beta * (logp - q) ** 2).sum()
        else:
            raise ValueError(loss_fn)
    return total


ADAM = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


def adam(**changes):
    return types.AdamParams(**{**ADAM, **changes})


def prompt(ids):
    return types.ModelInput.from_ints(ids)


def forward_logprobs(client, ids):
    """Logprob of every token of ids after the first, from the training side."""
    datum = types.Datum(model_input=prompt(ids[:-1]),
                        loss_fn_inputs={"target_tokens": ids[1:], "weights": [0.0] * (len(ids) - 1)})
    return logprobs(client.forward([datum], "cross_entropy").result())[0]
