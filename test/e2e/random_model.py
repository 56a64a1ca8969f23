"""Writes a model folder with random weights: config.json, model.safetensors, tokenizer.json, generation_config.json.

Only numpy is needed. Tests use tiny models; bench/make-random-model makes one of a real model's shape.

    python3 test/e2e/random_model.py DIR [--family qwen3|qwen2|llama] [--hidden N] ...
"""

import argparse
import json
import os
import struct

import numpy as np

ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_map():
    """The 256 characters that stand for bytes in a byte-level vocabulary."""
    plain = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    chars, extra = [], 0
    for b in range(256):
        if b in plain:
            chars.append(chr(b))
        else:
            chars.append(chr(256 + extra))
            extra += 1
    return chars


def tokenizer_json(vocab_size):
    """Byte-level BPE: 256 bytes, merges of common pairs, the added tokens at the end of a vocabulary of at most 320."""
    chars = byte_map()
    tokens = list(chars)
    merges = []
    for pair in ("h e", "t he", "i n", "a n", "e r", "o n", "Ġ a", "Ġ t", "r e", "Ġt he", "a t", "e n", "o r", "s t", "i s",
                 "e s", "Ġ s", "a l", "i t", "a r", "in g", "n d", "Ġa nd", "o u", "l e", "Ġ w", "Ġ o", "Ġ c", "l l", "e d"):
        if len(tokens) + len(ADDED) >= vocab_size:
            break
        merges.append(pair)
        tokens.append(pair.replace(" ", ""))
    first = len(tokens)
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": first + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, t in enumerate(ADDED)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges},
    }


def to_bf16(a):
    """float32 to bfloat16 (as uint16), rounding to nearest even."""
    bits = np.ascontiguousarray(a, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path, shapes, make, dtype):
    """Writes tensors one after the other; make(name, shape) gives each as float32 when its turn comes, or fewer numbers that
    repeat to its end."""
    size = 2 if dtype == "BF16" else 4
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        n = int(np.prod(shape)) * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + n]}
        offset += n
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            a = make(name, shape)
            block = (to_bf16(a) if dtype == "BF16" else np.ascontiguousarray(a, dtype=np.float32)).reshape(-1)
            for at in range(0, int(np.prod(shape)), len(block)):
                f.write(block[:int(np.prod(shape)) - at].data)


def write_shards(folder, shapes, make, dtype, limit):
    """One file, or as many as keep each to about `limit` bytes, and their index."""
    shards, room = [{}], limit
    for name, shape in shapes.items():
        n = int(np.prod(shape)) * (2 if dtype == "BF16" else 4)
        if shards[-1] and n > room:
            shards.append({})
            room = limit
        shards[-1][name] = shape
        room -= n
    if len(shards) == 1:
        write_safetensors(os.path.join(folder, "model.safetensors"), shapes, make, dtype)
        return
    where = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(os.path.join(folder, file), shard, make, dtype)
        where.update(dict.fromkeys(shard, file))
    with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as f:
        json.dump({"metadata": {}, "weight_map": where}, f, indent=1)
        f.write("\n")


def make_model(folder, family="qwen3", hidden=64, ffn=128, layers=2, heads=4, kv_heads=2, head_dim=32, vocab=320, tied=True,
               dtype="BF16", seed=1, context=512, most=None, shard=5 << 30):
    """Returns the folder. Weights have the size that keeps every layer's output near one, so logits are neither flat nor
    saturated. most: a tensor has that many random numbers, which repeat; a prime, so that no two rows are equal. shard: about
    how many bytes a file may have."""
    os.makedirs(folder, exist_ok=True)
    arch = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[family]
    if family == "qwen2":
        head_dim = hidden // heads
    tokenizer = tokenizer_json(vocab)
    eos = tokenizer["added_tokens"][0]["id"]
    config = {
        "architectures": [arch], "model_type": family, "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": context, "rms_norm_eps": 1e-5 if family == "llama" else 1e-6,
        "rope_theta": 500000.0 if family == "llama" else 1000000.0, "rope_scaling": None, "tie_word_embeddings": tied,
        "hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "torch_dtype": "bfloat16" if dtype == "BF16" else "float32", "bos_token_id": eos, "eos_token_id": eos,
    }
    if family != "qwen2":
        config["head_dim"] = head_dim
        config["attention_bias"] = False
    if family == "llama":
        config["mlp_bias"] = False
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes[p + "input_layernorm.weight"] = (hidden,)
        shapes[p + "self_attn.q_proj.weight"] = (heads * head_dim, hidden)
        shapes[p + "self_attn.k_proj.weight"] = (kv_heads * head_dim, hidden)
        shapes[p + "self_attn.v_proj.weight"] = (kv_heads * head_dim, hidden)
        if family == "qwen2":
            for which, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                shapes[p + f"self_attn.{which}_proj.bias"] = (n * head_dim,)
        if family == "qwen3":
            shapes[p + "self_attn.q_norm.weight"] = (head_dim,)
            shapes[p + "self_attn.k_norm.weight"] = (head_dim,)
        shapes[p + "self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        shapes[p + "post_attention_layernorm.weight"] = (hidden,)
        shapes[p + "mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[p + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[p + "mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    rng = np.random.default_rng(seed)

    def make(name, shape):
        n = int(np.prod(shape))
        a = rng.standard_normal(min(n, most or n), dtype=np.float32)
        if "norm" in name:
            return 1 + 0.1 * a
        if name.endswith("bias"):
            return 0.2 * a
        if name.startswith(("model.embed", "lm_head")):
            return a * (1.5 / np.sqrt(hidden))
        return a / np.sqrt(shape[1])

    write_shards(folder, shapes, make, dtype, shard)
    for name, content in (
            ("config.json", config), ("generation_config.json", {"eos_token_id": eos, "bos_token_id": eos}),
            ("tokenizer.json", tokenizer),
            ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": ADDED[0],
                                       "pad_token": ADDED[0], "model_max_length": context})):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            json.dump(content, f, indent=1, ensure_ascii=False)
            f.write("\n")
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dir")
    parser.add_argument("--family", choices=["qwen3", "qwen2", "llama"], default="qwen3")
    for name, default in (("hidden", 64), ("ffn", 128), ("layers", 2), ("heads", 4), ("kv-heads", 2), ("head-dim", 32),
                          ("vocab", 320), ("seed", 1), ("context", 512)):
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--f32", action="store_true", help="store float32 instead of bfloat16")
    a = parser.parse_args()
    print(make_model(a.dir, a.family, a.hidden, a.ffn, a.layers, a.heads, a.kv_heads, a.head_dim, a.vocab, not a.untied,
                     "F32" if a.f32 else "BF16", a.seed, a.context))


if __name__ == "__main__":
    main()
