#!/usr/bin/env python3
"""Writes ops.json: what PyTorch makes of many expressions in a custom loss, for test_graph.c.

Needs torch and tinker, whose tracer writes the graphs as clients upload them. Each expression is
traced and run on every case's inputs; the result is the loss and its gradient, without them where
they are not finite or PyTorch has no derivative, or null where it raises an error.
"""
import contextlib
import io
import json
import math
import os
import sys
import warnings

import torch
import torch.nn.functional as F
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss

warnings.filterwarnings("ignore")

# Spellings of common losses; every one must work or be refused by name.
COMMON = """x + y; x - y; x * y; x / y; x // 2; x % 2; x ** 2; 2 ** x; -x; abs(x); x @ y; 1 - x
x > y; x >= 0; x < y; x <= y; x == y; x != y; x & y; x | y; ~(x > 0)
x[0]; x[1:]; x[:-1]; x[..., 0]; x[:, 0]; x[x > 0]; x[None]; x.shape[0]; x.size(0); x.numel(); x.ndim; x.dtype; x.T
x.sum(); x.sum(-1); x.sum(dim=-1, keepdim=True); x.mean(); x.mean(dim=0); x.max(); x.max(dim=0).values; x.min()
x.amax(dim=0); x.std(); x.var(); x.prod(); x.norm(); x.cumsum(0); x.logsumexp(0); x.any(); x.all()
x.exp(); x.log(); x.sqrt(); x.abs(); x.square(); x.pow(2); x.neg(); x.sigmoid(); x.tanh(); x.relu(); x.softmax(-1)
x.log_softmax(-1); x.clamp(0.8, 1.2); x.clamp(min=0.0); x.clip(0, 1); x.detach(); x.float(); x.double()
x.to(torch.float32); x.int(); x.bool(); x.long(); x.view(-1); x.reshape(-1); x.flatten(); x.unsqueeze(0); x.squeeze()
x.transpose(0, 1); x.expand(2, 2); x.masked_fill(y > 0, 0.0); x.where(y > 0, y); x.gather(0, y.long()); x.flip(0)
x.sign(); x.reciprocal(); x.rsqrt(); x.log1p(); x.expm1(); x.contiguous(); x.type_as(y); x.new_zeros(1)
x.sort().values; x.argmax(); x.dot(y); x.clone(); x.requires_grad
torch.exp(x); torch.log(x); torch.sum(x); torch.mean(x); torch.sum(x, dim=-1); torch.minimum(x, y)
torch.maximum(x, y); torch.min(x, y); torch.max(x, y); torch.clamp(x, 0.8, 1.2); torch.clip(x, 0, 1)
torch.where(x > 0, x, y); torch.abs(x); torch.sqrt(x); torch.square(x); torch.pow(x, 2); torch.sigmoid(x)
torch.tanh(x); torch.relu(x); torch.softmax(x, dim=-1); torch.log_softmax(x, dim=-1); torch.logsumexp(x, dim=-1)
torch.ones_like(x); torch.zeros_like(x); torch.full_like(x, 0.5); torch.cat([x, y]); torch.stack([x, y])
torch.dot(x, y); torch.matmul(x, y); torch.cumsum(x, 0); torch.log1p(x); torch.expm1(x); torch.sign(x)
torch.logaddexp(x, y); torch.lerp(x, y, 0.5); torch.nan_to_num(x); torch.isfinite(x)
torch.logical_and(x > 0, y > 0); torch.logical_not(x > 0); torch.flatten(x); torch.roll(x, 1); torch.zeros(1)
torch.tensor(0.5); torch.arange(3); torch.einsum('i,i->', x, y); torch.true_divide(x, y); torch.rsqrt(x)
torch.erf(x); torch.special.expit(x)
F.relu(x); F.logsigmoid(x); F.softplus(x); F.softmax(x, dim=-1); F.log_softmax(x, dim=-1); F.mse_loss(x, y)
F.mse_loss(x, y, reduction='sum'); F.smooth_l1_loss(x, y); F.l1_loss(x, y); F.huber_loss(x, y)
F.binary_cross_entropy_with_logits(x, y); F.kl_div(x, y, reduction='sum'); F.gelu(x); F.silu(x); F.elu(x)
F.normalize(x, dim=0); F.one_hot(y.long(), 3); F.pad(x, (1, 0)); F.cosine_similarity(x, y, dim=0)
math.sqrt(2.0) * x; math.log(2) * x; x * math.inf; max(1, 2) * x"""

MORE = """x[torch.arange(x.shape[0])]; torch.zeros(x.shape[0]) + x; torch.ones(x.shape) * x; torch.full((x.shape[0],), 0.5) + x
torch.arange(x.shape[0]) * x; torch.arange(0.5, x.shape[0]); torch.arange(1, x.numel(), 2); x.new_ones(x.shape[0]) * x
x.new_full((2,), 3.0) * 2; x * math.sqrt(x.shape[0]); x * math.log(2.0 + x.shape[0]); math.pow(x.shape[0], 2) * x
abs(x.shape[0]) * x; (x.shape[0] > 2) * x; x / x.shape[0]; x[: x.shape[0] // 2]; x[x.shape[0] - 1]; x.shape[0] % 2
x.shape[0] ** 2; x.shape[0] / 3; -x.shape[0]; x.shape[-1] - 1.5; x.shape[0] * 2 == x.numel()
x[[0, 1]]; x[-1]; x[::2]; x[None, :]; x[:, None]; x[None, ..., 0]; x[y.long()]; x[y.long() % 2, None]; x[1:, 0]; x[..., None]
x[:, y.long() % 2]; x[y.long() % 2, y.long() % 2]; x[x > -1]; x[:, None, y.long() % 2]; x[y > 0]; x[None, y.long() % 2, 0]
x[0, y.long() % 2]; x[(x > -1) & (x < 9)]; x[-5:5]; x[5]; x[1:0]; x[y.long()[:1]]; x[y.long() - 1]
torch.linalg.norm(x); torch.linalg.vector_norm(x); torch.linalg.vector_norm(x, 3, dim=0); torch.norm(x); torch.norm(x, p=1)
x.norm(dim=0); x.norm(1); x.norm(math.inf); x.norm(3.0, 0); x.norm(0); torch.norm(x, p=2, dim=-1, keepdim=True); x.norm(-math.inf)
torch.special.logit(x); torch.logit(x, eps=1e-6); x.logit(); torch.special.xlogy(x, y); torch.xlogy(y, x); F.sigmoid(x); F.tanh(x)
F.cross_entropy(x[None], y.long()[:1]); F.cross_entropy(x, y.long() % 2, reduction='sum'); F.nll_loss(x, y.long() % 2)
F.nll_loss(x[None], y.long()[:1]); F.leaky_relu(x); F.leaky_relu(x, 0.2); F.hardtanh(x); F.relu6(x * 9)
F.binary_cross_entropy(x, y); F.binary_cross_entropy(x * 0.1, y * 0.1, weight=y); F.elu(x, 0.5); F.gelu(x, approximate='tanh')
F.softplus(x, beta=2); F.softplus(x * 30); F.mse_loss(x, y, reduction='none'); F.l1_loss(x, y, reduction='sum')
F.smooth_l1_loss(x, y, beta=0.5); F.smooth_l1_loss(x, y, beta=0.0); F.huber_loss(x, y, delta=0.3, reduction='sum')
F.kl_div(x, y, reduction='batchmean'); F.kl_div(x, y, reduction='mean', log_target=True); F.kl_div(x, y, reduction='none')
F.binary_cross_entropy_with_logits(x, y, pos_weight=y + 1, reduction='none'); F.binary_cross_entropy_with_logits(x, y, weight=y)
F.pad(x, (1, 2), value=0.5); F.pad(x, (-1, 0)); F.pad(x[None], (0, 1, 1, 0)); F.normalize(x, p=1.0, dim=-1); F.one_hot(y.long())
F.cosine_similarity(x, y + 0.5, dim=-1); F.log_softmax(x, 0); F.softmax(x, dim=0, dtype=torch.float64); torch.softmax(x, 0)
torch.diff(x); torch.var(x, unbiased=False); torch.var(x, 0); torch.std(x, dim=0, correction=0); x.std(0, keepdim=True); x.std(False)
torch.cat((x, y), dim=0); torch.cat([x, x], -1); torch.stack((x, x), dim=1); torch.stack([x, x], dim=-1); torch.concat([x, y])
torch.sort(x, descending=True)[0]; x.sort().indices; torch.argsort(x); torch.topk(x, 2).values; x.topk(1, largest=False)[0]
torch.masked_select(x, y > 0); x.masked_select(x > -1); torch.outer(x, y); torch.triu(torch.outer(x, x)); torch.tril(torch.outer(x, y), -1)
torch.einsum('i,j->ij', x, y); torch.einsum('ij,ij->i', x, x); torch.einsum('ij,jk->ik', x, x); torch.einsum('ii', x)
torch.einsum('i,i,i->i', x, y, x); torch.einsum('ij->ji', x); torch.einsum('i->', x); torch.einsum('ij,kj->ik', x, x)
torch.mm(x, x); torch.mv(x, x[0]); torch.bmm(x[None], x[None]); torch.inner(x, y); x.matmul(x); x @ x; x @ x.T; x[0] @ x; x[None] @ x
x.softmax(dim=0); torch.special.log_softmax(x, dim=0); torch.special.softmax(x, dim=0); torch.special.logsumexp(x, 0)
torch.logsumexp(x, 0, keepdim=True); x.logsumexp((0,)); x.sum(dim=(0,)); x.sum((0, 1)); x.sum(0, True); x.mean(axis=0); x.mean([0])
x.amin(); x.amin(-1, keepdim=True); x.amax(); x.min(0).indices; x.max(-1, keepdim=True)[0]; torch.max(x, dim=0)[0]; torch.min(x, -1).values
x.argmin(0); x.argmax(-1, keepdim=True); x.prod(0); x.prod(-1, keepdim=True); torch.cumprod(x, 0); (x * 0).cumprod(-1); (y * x).cumprod(0)
(y * x).prod(); x.cumsum(-1); torch.count_nonzero(x); x.any(0); (x > -1).all(-1); (x > 0).sum(); (x > 0).float().mean(); x.long().sum(0)
x.repeat(2); x.repeat(2, 1); x.tile(2); x.expand_as(y); x.view_as(y); torch.broadcast_to(x, (2, 2)); x.expand(3, -1, -1); x.expand(2, -1)
x.view(x.shape[0], 1); x.reshape((x.shape[0], 1)); x.reshape(1, -1); x.permute(0); x.permute(1, 0); x.swapaxes(0, 1); x.t(); x.mT
x.unsqueeze(-1); x.unsqueeze(1).squeeze(1); x[None].squeeze(0); torch.squeeze(x[None]); x.flatten(0, 1); x[None].flatten(1); torch.ravel(x)
x.flip(-1); x.flip([0, 1]); torch.flip(x, (0,)); x.roll(1, 0); torch.roll(x, -1); x.roll((1, 1), (0, 1)); torch.roll(x, 3, -1)
x.index_select(0, y.long() % 2); torch.gather(x, 1, x.long().abs() % 2); torch.narrow(x, 0, 1, 1); x.narrow(-1, 0, 2)
x.split(1)[0]; x.chunk(2)[1]; torch.unbind(x)[0]; x.unbind(-1)[1]; torch.chunk(x, 2, dim=-1)[0]; torch.split(x, 1, 0)[1]
x.clamp_min(0.95); x.clamp_max(0.95); torch.clamp(x, min=y); torch.clamp(x, y, y + 0.15); torch.clamp(x, max=y); x.clamp(1.2, 0.8)
torch.where(x > 0, 1.0, 0.0); torch.where(x > 0, x, 0.0); torch.where(x > 0, x, 1); torch.where(y > 0, x.log(), 0.0); x.where(y > 0, 0.5)
torch.pow(2.0, x); torch.pow(x, y); x ** y; x ** 0; x ** -1; x ** 0.5; x.pow(3.0); torch.float_power(x, 2); y ** x; (x * 0) ** 2; (x * 0) ** 0
torch.sub(x, y, alpha=2); torch.add(x, y, alpha=0.5); torch.rsub(x, 1); torch.div(x, y, rounding_mode='floor'); torch.div(x, 0.3, rounding_mode='trunc')
x.fmod(0.4); torch.remainder(x, -0.4); x % y; torch.fmod(x, y); y // x.detach(); x.floor(); x.ceil(); x.round(); x.trunc(); x.frac()
x.sin(); x.cos(); x.tan(); x.atan(); x.sinh(); x.cosh(); x.erf(); x.erfc(); x.exp2(); x.log2(); x.log10(); torch.atan2(x, y); torch.hypot(x, y)
x.ne(0); x.eq(y); x.lt(0.9); x.ge(y); torch.greater(x, y); torch.le(x, y); x.isnan(); (x / 0).isinf(); (x.log()).isfinite(); x.nan_to_num(0.0)
(x / 0).nan_to_num(); (x * math.nan).nan_to_num(0.5); (x / 0).nan_to_num(posinf=2.0, neginf=-3.0); torch.logical_or(x > 0, y > 0)
torch.logical_xor(x, y); ~y.long(); y.long() & 1; y.long() | 2; y.long() ^ 3; (x > 0) & (y > 0); (x > 0) | (y > 0); (x > 0) ^ (y > 0)
(x > 0) + (y > 0); (x > 0) * (y > 0); (x > 0) - (y > 0); -(x > 0); (x > 0) * x; (x > 0) / 2; (x > 0) * 2; ~(y > 0); (x > 0) < (y > 0)
y.long() + 1; y.long() * 0.5; y.long() / 2; y.long() // 2; y.long() % 2; y.long() ** 2; 2 - y.long(); y.long() * x; y.long().float().exp()
y.long().exp(); y.long().abs(); y.long().clamp(0, 1); y.long().clamp(0.5); y.long().mean(); y.long().sum(); y.long().max(); y.long().cumsum(0)
y.long().prod(); y.long() // 0; y.long().softmax(0); y.long().square(); y.long().sign(); y.long().relu(); y.long() > 0.5; y.long() == 1
x.to(y); x.to('cpu'); x.to(dtype=torch.float64); x.to(torch.int64); x.double() * 0.1; x.double().sum() * x; x.double() + y; x.to(torch.bool)
x.to(x.dtype) * 2; x.to(x.device); torch.zeros_like(x, dtype=torch.float64) + 0.1; torch.ones_like(x).cumsum(0); torch.full_like(x, 2)
x.dim(); x.nelement(); x.is_floating_point(); x.device; torch.numel(x); x.size(); x.size(-1); x.shape; torch.is_floating_point(x)
torch.addcmul(x, x, y); torch.addcdiv(x, x, y + 2, value=0.5); torch.lerp(x, y, y); torch.absolute(x); torch.negative(x); torch.detach(x) * x
torch.clone(x); x.mean().detach() * x; torch.multiply(x, 2); torch.divide(x, y); torch.subtract(x, y); torch.not_equal(x, y); +x
(x - x.mean()) / (x.std() + 1e-6); (x - x.max()).exp().sum().log(); torch.minimum(x, x); torch.maximum(x * 0, x.relu() * 0); (x * 0).abs()
(x * 0).norm(); (x * 0).std(); (x * 0).sqrt(); (x * 0).relu(); (x * 0).max(); (x * 0).amax(0); (x * 0 + 0.8).clamp(0.8, 1.2); (x * 100).exp()
(x * 0).max(0).values; (x * 0).logsumexp(0); (x - math.inf).logsumexp(0); (x * 1000).softmax(-1); (x * 1000).log_softmax(-1); (x * 300).sigmoid()
F.logsigmoid(x * 300); (x * math.nan).max(); (x * math.nan).relu(); torch.minimum(x * math.nan, y); (x * math.nan).clamp(0, 1)
(x * math.nan).amax(0); (x * 0).sign(); (x * math.nan) > 0; (x * math.nan).argmax(0); (x * math.nan).sort().values; torch.where(x == x, x, x / 0)
x[:0].sum(); x[:0].mean(); x[:0].prod(); x[:0].max(); x[:0].cumsum(0); x[:0].std(); torch.cat([x, x[:0]]); x[0:0].logsumexp(0); x[:0].norm()
x + x[0]; x + x[None]; x[:, None] * x; x.sum() * y; x.T + x; x[:1] - x; torch.stack([x.sum(), x.mean()]); torch.cat([x.sum()[None], y])
x[0, 0] * x; x[-1, -1]; x[0][1]; x[1:][0]; x[:, 1:] - x[:, :-1]; x.view(2, 2, 1); x.view(3, 5); x.reshape(-1, -1); x.flatten(1, 0); x[0, 0, 0]
x.sum(5); x.sum((0, 0)); x.gather(0, y); x.index_select(0, y); x.unsqueeze(9); x.repeat(-1); x.expand(3); x.permute(0, 0)
F.mse_loss(x, y, reduction='nope'); x.topk(9).values; torch.einsum('ij,ij->ij', x, y); torch.cat([x, x[None]]); x & 1.5; x[0.5]"""

REFUSED = """torch.randn_like(x); torch.rand_like(x); F.dropout(x); x.item; x.data; x.grad; x.half(); x.bfloat16(); x.requires_grad_(); x.fill_(0)
torch.empty_like(x); x.register_hook(x); torch.sigmoid_(x); x.share_memory_(); x.map_(x, x); x.apply_(x)
x.to(torch.float16); x.to(torch.complex64); F.prelu(x, y); torch.quantile(x, 0.5); x.unfold(0, 2, 1); torch.histc(x)
F.glu(x); x.scatter(0, y.long(), 0.0); x.nonzero(); torch.where(x > 0); F.pad(x, (1, 0), mode='reflect'); F.relu(x, inplace=True)
F.mse_loss(x, y, size_average=True); F.cross_entropy(x, y.long(), label_smoothing=0.5); torch.bernoulli(x); x.cosh; x.values; x[None].norm('nuc'); torch.linalg.norm(x[None], 1)"""

# Inputs: x is logprobs, y another one of the same shape (or [2] beside a matrix).
CASES = {
    "negative": ([-0.6931, -1.5], [1.0, 0.0]),
    "positive": ([0.25, 1.75], [0.0, 1.0]),
    "matrix": ([[0.9, -0.4], [1.1, 0.6]], [1.0, 0.0]),
}


def split(text):
    return [t.strip() for line in text.splitlines() for t in line.split(";") if t.strip()]


def tensor_loss(v, logprobs):
    flat = torch.nan_to_num(v.to(torch.float32), nan=0.25, posinf=3.0, neginf=-5.0).flatten()
    weights = torch.sin(0.7 * torch.ones_like(flat).cumsum(0))
    return (flat * weights).sum() + 0.5 * logprobs.sum()


# What becomes of the expression's value: a tensor, a Python number, or anything else. The test adds
# the same nodes.
MODES = {
    "tensor": tensor_loss,
    "number": lambda v, x: (x * v).sum() + 0.5 * x.sum(),
    "unused": lambda v, x: 0.5 * x.sum(),
}


def trace(expr, mode):
    names = {"torch": torch, "F": F, "math": math, "mode": mode}
    exec(f"def loss(logprobs, y):\n    x = logprobs\n    v = {expr}\n"
         "    v = v if isinstance(v, torch.fx.Proxy) else x * 0 + (v if isinstance(v, float) else 1)\n"
         "    return mode(v, logprobs), {}", names)
    return trace_loss(names["loss"], {"logprobs": 1, "y": 1}, "s")


def run(handle, x, y):
    x = torch.tensor(x, requires_grad=True)
    with contextlib.redirect_stderr(io.StringIO()):
        loss, _ = handle.graph(x, torch.tensor(y))
    if loss.ndim or not math.isfinite(loss.item()):
        return {}
    out = {"loss": loss.item()}
    try:
        loss.backward()
        if torch.isfinite(x.grad).all():
            out["grad"] = x.grad.flatten().tolist()
    except RuntimeError:
        pass
    return out


def short(value):
    return json.loads(json.dumps(value), parse_float=lambda s: float("%.9g" % float(s)))


def measure(expr):
    """The expression's nodes and its results in the first mode that PyTorch can run on some case."""
    try:
        graph = encode_graph(trace(expr, lambda v, x: v)).model_dump()["nodes"]
    except ValueError:
        print("the client itself rejects", expr)
        return None
    nodes = [{k: v for k, v in n.items() if v or k == "args"} for n in graph[2:-1]]
    entry = {"expr": expr, "nodes": nodes, "value": graph[-1]["args"][0]["tuple"][0]["ref"]}
    for name, mode in MODES.items():
        results = {}
        for case, (x, y) in CASES.items():
            try:
                results[case] = run(trace(expr, mode), x, y)
            except Exception:
                results[case] = None
        if any(r is not None for r in results.values()) or name == "unused":
            return entry | {"mode": name, "results": results}


def main():
    out = {"cases": {n: {"x": x, "y": y} for n, (x, y) in CASES.items()}, "common": [], "more": [], "refused": []}
    for key, text in [("common", COMMON), ("more", MORE), ("refused", REFUSED)]:
        for expr in split(text):
            entry = measure(expr)
            if entry:
                out[key].append(entry)
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ops.json")
    with open(path, "w") as f:
        f.write("{\"cases\": " + json.dumps(short(out["cases"])))
        for key in ("common", "more", "refused"):
            f.write(f",\n\"{key}\": [\n" + ",\n".join(json.dumps(short(e), separators=(",", ":")) for e in out[key]) + "]")
        f.write("}\n")
    print({k: len(out[k]) for k in ("common", "more", "refused")}, os.path.getsize(path))


if __name__ == "__main__":
    sys.exit(main())
