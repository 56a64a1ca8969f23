#!/usr/bin/env python3
"""Compares the logprobs of random models: ours in f32 and bf16, PyTorch's in f32 and bf16.

    bf16_accuracy.py PATH/TO/logprobs

Needs torch and transformers. Weights are bf16 on disk, so all four start from the same numbers. Prints, against
PyTorch in float32: the root mean square, the mean and the largest difference, and the mean of ½d² (the KL
estimate that trainers watch). Fails when ours in bf16 is farther from float32 than PyTorch's own bf16 by more
than a tenth, or ours in f32 by more than 1e-4.
"""
import os, subprocess, sys, tempfile

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

SHAPES = [
    ("qwen3 wide", Qwen3Config, Qwen3ForCausalLM, dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
     num_attention_heads=8, num_key_value_heads=4, head_dim=128, vocab_size=8192, tie_word_embeddings=True)),
    ("qwen3 deep", Qwen3Config, Qwen3ForCausalLM, dict(hidden_size=256, intermediate_size=704, num_hidden_layers=24,
     num_attention_heads=8, num_key_value_heads=2, head_dim=64, vocab_size=4001, tie_word_embeddings=False)),
    ("qwen2", Qwen2Config, Qwen2ForCausalLM, dict(hidden_size=448, intermediate_size=1216, num_hidden_layers=8,
     num_attention_heads=7, num_key_value_heads=1, vocab_size=5000, tie_word_embeddings=True)),
    ("llama", LlamaConfig, LlamaForCausalLM, dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
     num_attention_heads=8, num_key_value_heads=8, vocab_size=6000, tie_word_embeddings=False,
     rope_theta=500000.0)),
    ("llama odd", LlamaConfig, LlamaForCausalLM, dict(hidden_size=200, intermediate_size=333, num_hidden_layers=5,
     num_attention_heads=5, num_key_value_heads=5, head_dim=40, vocab_size=1003, tie_word_embeddings=False)),
]


def randomize(model, seed):
    """Activations of order one and peaked predictions, as in a trained model."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 2 and "embed" in name:
            std = 1.0 / p.shape[1] ** 0.5 * 3
        elif p.ndim == 2:
            std = 1.4 / p.shape[1] ** 0.5
        elif name.endswith("bias"):
            std = 0.3
        else:
            p.data = 1 + 0.2 * torch.randn(p.shape, generator=g)
            continue
        p.data = torch.randn(p.shape, generator=g) * std


def torch_logprobs(model, seqs):
    out = []
    with torch.no_grad():
        for s in seqs:
            ids = torch.tensor([s])
            z = model(ids).logits[0].float()
            lp = z.log_softmax(-1)
            out.append(lp[:-1].gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(out)


def ours(tool, folder, dtype, seqs):
    text = "\n".join(" ".join(map(str, s)) for s in seqs) + "\n"
    r = subprocess.run([tool, folder, dtype], input=text, capture_output=True, text=True)
    if r.returncode:
        sys.exit(r.stderr)
    return torch.tensor([float(x) for x in r.stdout.split()])


def main():
    tool, bad = sys.argv[1], 0
    print(f"{'model':<12} {'run':<12} {'rms':>9} {'mean':>9} {'max':>9} {'½d²':>10}")
    for k, (name, config, cls, shape) in enumerate(SHAPES):
        torch.manual_seed(k)
        model = cls(config(max_position_embeddings=1024, attn_implementation="eager", **shape))
        randomize(model, k)
        model = model.to(torch.bfloat16).eval()
        g = torch.Generator().manual_seed(100 + k)
        seqs = [torch.randint(0, shape["vocab_size"], (n,), generator=g).tolist() for n in (300, 64, 17, 129)]
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            p16, p32 = (torch_logprobs(cls.from_pretrained(folder, dtype=t, attn_implementation="eager").eval(), seqs)
                        for t in (torch.bfloat16, torch.float32))
            runs = {"ours f32": ours(tool, folder, "f32", seqs), "torch bf16": p16,
                    "ours bf16": ours(tool, folder, "bf16", seqs)}
        rms = {}
        for run, lp in runs.items():
            d = (lp - p32).double()
            rms[run] = d.square().mean().sqrt().item()
            print(f"{name:<12} {run:<12} {rms[run]:9.2e} {d.abs().mean():9.2e} {d.abs().max():9.2e} "
                  f"{0.5 * d.square().mean():10.2e}")
        bad += rms["ours bf16"] > 1.1 * rms["torch bf16"] or rms["ours f32"] > 1e-4
    print("FAIL" if bad else "OK")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
