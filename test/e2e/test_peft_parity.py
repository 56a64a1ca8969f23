"""Training here and training in PyTorch + PEFT give the same model.

Both start from the adapter that the server exports before its first step, see the same data, use the same loss and AdamW,
and are compared by the logprobs of the data after three steps, in float32.

AdamW with the API's default eps of 1e-12 moves a weight whose gradient is rounding noise by a whole learning rate, in a
direction that noise decides. So each loss is run twice: with eps = 1e-4, where equal gradients give equal steps and the
tolerance is tight, and with the default, where it only bounds what such weights can do.

Skipped without torch, transformers and peft. To run it by hand:

    python3 -m venv build/venv-torch
    build/venv-torch/bin/pip install torch transformers peft tinker==0.38.0 pytest
    TB_DAEMON=build/src/server/tinkerbell build/venv-torch/bin/python -m pytest test/e2e/test_peft_parity.py
"""

import os
import urllib.request

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
tinker = pytest.importorskip("tinker")

from common import array, logprobs, rl_datum, sft_datum, topk_datum  # noqa: E402

TIGHT, LOOSE = 1e-4, 5e-3
STEPS = 3


def download(server, path, folder):
    folder.mkdir()
    for name, url in tinker.RestClient(base_url=server.url).get_external_weights_urls(path).result().urls.items():
        with urllib.request.urlopen(url) as reply:
            (folder / os.path.basename(name)).write_bytes(reply.read())
    return str(folder)


def load(model_dir, adapter_dir):
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, adapter_dir, is_trainable=True)
    model.eval()  # no dropout anywhere; gradients flow all the same
    return model


def model_logprobs(model, datum):
    ids = torch.tensor([[t for chunk in datum.model_input.chunks for t in chunk.tokens]])
    lp = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
    targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].to_numpy())
    return lp.gather(1, targets if targets.ndim == 2 else targets[:, None]).reshape(targets.shape)


def torch_loss(loss_fn, datum, lp, config):
    """The published formulas, written for autograd."""
    def t(name):
        return torch.tensor(array(datum, name), dtype=torch.float32)

    if loss_fn == "cross_entropy":
        return -(t("weights") * lp).sum()
    q, a = t("logprobs"), t("advantages")
    ratio = torch.exp(lp - q)
    lo = config.get("clip_low_threshold", 0.0 if loss_fn == "cispo" else 0.8)
    hi = config.get("clip_high_threshold", 4.0 if loss_fn == "cispo" else 1.2)
    if loss_fn == "importance_sampling":
        return -(ratio * a).sum()
    if loss_fn == "ppo":
        return -torch.minimum(ratio * a, ratio.clamp(lo, hi) * a).sum()
    if loss_fn == "cispo":
        return -(ratio.clamp(lo, hi).detach() * lp * a).sum()
    if loss_fn == "dro":
        return -(lp * a - 0.5 * config.get("beta", 0.05) * (lp - q) ** 2).sum()
    if loss_fn == "gspo":
        mask = t("sequence_ratio_mask") != 0
        s = torch.exp((lp - q)[mask].mean().detach() + lp - lp.detach())
        return -torch.minimum(s * a, s.clamp(lo, hi) * a).sum()
    raise ValueError(loss_fn)


def near_policy(client, data):
    """The sampler's logprobs near the model's own, so that ratios fall on both sides of the clips."""
    out = []
    for i, datum in enumerate(data):
        lp = logprobs(client.forward([datum], "importance_sampling").result())[0]
        q = lp + np.random.default_rng(i).normal(0, 0.3, lp.shape).astype(np.float32)
        inputs = {**datum.loss_fn_inputs, "logprobs": tinker.TensorData.from_numpy(q.astype(np.float32))}
        out.append(tinker.Datum(model_input=datum.model_input, loss_fn_inputs=inputs))
    return out


CASES = [
    ("cross_entropy", "tiny", {}, {}),
    ("cross_entropy", "tiny-llama", {}, {}),
    ("cross_entropy", "tiny", {}, {"weight_decay": 0.1, "grad_clip_norm": 1.0}),
    ("cross_entropy top-k", "tiny", {}, {}),
    ("importance_sampling", "tiny", {}, {}),
    ("ppo", "tiny", {}, {}),
    ("cispo", "tiny", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}, {}),
    ("dro", "tiny", {"beta": 0.3}, {}),
    ("gspo", "tiny", {}, {}),
]


@pytest.mark.parametrize("eps,tolerance", [(1e-4, TIGHT), (1e-12, LOOSE)], ids=["eps=1e-4", "default eps"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join([c[0], c[1], *c[3]]))
def test_parity(server, service, tmp_path, case, eps, tolerance, record_property):
    name, base, config, adam_changes = case
    loss_fn = name.split()[0]
    client = service.create_lora_training_client(base, rank=8, seed=5).result()
    adapter = download(server, client.save_weights_external("start").result().path, tmp_path / "adapter")
    if name.endswith("top-k"):
        data = [topk_datum(8, 4, seed=i) for i in range(3)]
    elif loss_fn == "cross_entropy":
        data = [sft_datum(6 + 5 * i, seed=i, weights=[1.0, 0.5, -0.25] * 2 + [1.0] * (5 * i)) for i in range(3)]
    else:
        data = near_policy(client, [rl_datum(8 + 4 * i, seed=i, gspo=loss_fn == "gspo") for i in range(4)])

    adam = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": eps, "weight_decay": 0.0, "grad_clip_norm": 0.0,
            **adam_changes}
    torch.manual_seed(0)
    model = load(server.models[base], adapter)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 2 * (7 * 2 + 1)
    optimizer = torch.optim.AdamW(trainable, lr=adam["learning_rate"], betas=(adam["beta1"], adam["beta2"]), eps=eps,
                                  weight_decay=adam["weight_decay"])
    start = None
    for step in range(STEPS):
        out = client.forward_backward(data, loss_fn, loss_fn_config=config or None)
        client.optim_step(tinker.AdamParams(**adam)).result()
        out = out.result()
        lps = [model_logprobs(model, d) for d in data]
        loss = sum(torch_loss(loss_fn, d, lp, config) for d, lp in zip(data, lps))
        if step == 0:  # the export is the adapter: nothing has moved yet
            start = [lp.detach().numpy() for lp in lps]
            for ours, theirs in zip(logprobs(out), start):
                np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
            assert out.metrics["loss:sum"] == pytest.approx(float(loss), rel=1e-4, abs=1e-4)
        optimizer.zero_grad()
        loss.backward()
        if adam["grad_clip_norm"] > 0:
            torch.nn.utils.clip_grad_norm_(trainable, adam["grad_clip_norm"])
        optimizer.step()
    ours = logprobs(client.forward(data, loss_fn, loss_fn_config=config or None).result())
    with torch.no_grad():
        theirs = [model_logprobs(model, d).numpy() for d in data]
    apart = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs))
    moved = max(float(np.abs(a - b).max()) for a, b in zip(theirs, start))
    record_property("largest difference", apart)
    print(f"{name} on {base}, eps {eps}: logprobs moved by {moved:.3g}, differ by {apart:.3g}")
    assert moved > 100 * tolerance, "three steps must move the logprobs far more than the tolerance"
    assert apart <= tolerance

    # and the adapter that the server exports now is the one that PEFT has
    trained = load(server.models[base], download(server, client.save_weights_external("end").result().path, tmp_path / "end"))
    with torch.no_grad():
        for d, lp in zip(data, ours):
            np.testing.assert_allclose(model_logprobs(trained, d).numpy(), lp, atol=2e-5, rtol=0)
