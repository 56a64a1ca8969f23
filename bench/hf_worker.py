"""Hugging Face transformers + PEFT doing the work of the benchmarks, one command a line on stdin; run by lib.py.

    hf_worker.py cpu|cuda THREADS DIR RANK [MEMORY]        rank 0: the base model alone; MEMORY: the part of a GPU's it may use
    train N LEN | fitted | prefill LEN [N] | decode N STEPS | adapter 0|1 | logprobs TOKEN... | memory
    answers: one JSON object a line, the first when ready
"""

import json
import sys
import time

import peft
import torch
import transformers

from worker import memory, serve


def main():
    device, threads, folder, rank = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(float(sys.argv[5]))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    vocab = model.config.vocab_size
    if rank:
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=rank, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]))
    model.eval()

    def now():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    fits = {"sequences": sys.maxsize, "checkpointing": False}

    def train(n, length):
        """Gradients of n sequences add up, as many at once as fit: half as many after each lack of memory, and where one does
        not fit, layers are computed again in the backward pass."""
        ids = torch.randint(0, vocab, (n, length + 1), device=device)
        while True:
            fits["sequences"], logits = min(n, fits["sequences"]), None
            model.train(fits["checkpointing"])
            start = now()
            try:
                for part in ids.split(fits["sequences"]):
                    logits = model(input_ids=part[:, :-1], use_cache=False).logits
                    torch.nn.functional.cross_entropy(logits.reshape(-1, vocab).float(), part[:, 1:].reshape(-1),
                                                      reduction="sum").backward()
                model.eval()
                return {"seconds": now() - start}
            except torch.cuda.OutOfMemoryError:
                if fits["sequences"] > 1:
                    fits["sequences"] //= 2
                elif not fits["checkpointing"]:
                    fits.update(sequences=n, checkpointing=True)
                    model.gradient_checkpointing_enable()
                    model.enable_input_require_grads()
                else:
                    raise
            logits = None
            torch.cuda.empty_cache()

    @torch.no_grad()
    def prefill(length, n=1):
        ids = torch.randint(0, vocab, (n, length), device=device)
        start = now()
        model(input_ids=ids, logits_to_keep=1, use_cache=True).logits.argmax(-1)
        return {"seconds": now() - start}

    @torch.no_grad()
    def decode(n, steps):
        ids = torch.randint(0, vocab, (n, 16), device=device)
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        start = now()
        for _ in range(steps):
            out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        return {"seconds": now() - start}

    def adapter(on):
        """Whether the adapter takes part from now on."""
        if on:
            model.enable_adapter_layers()
        else:
            model.disable_adapter_layers()
        return {}

    @torch.no_grad()
    def logprobs(*ids):
        """Of each token but the first, given those before it."""
        ids = torch.tensor([ids], device=device)
        out = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
        return {"logprobs": out.gather(-1, ids[:, 1:, None]).flatten().tolist()}

    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
                      **memory()}), flush=True)
    serve({"train": train, "fitted": lambda: fits, "prefill": prefill, "decode": decode, "adapter": adapter, "logprobs": logprobs,
           "memory": memory})


if __name__ == "__main__":
    main()
