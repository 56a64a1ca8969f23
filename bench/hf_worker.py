"""The other side of bench/run: Hugging Face transformers + PEFT doing the same work, one command a line on stdin.

    train N LEN | prefill LEN | decode N STEPS | memory | quit        answers: one JSON object a line
"""

import json
import sys
import time


def memory():
    with open("/proc/self/status", encoding="ascii") as f:
        fields = {line.split(":")[0]: line.split()[1] for line in f if line.startswith("Vm")}
    return {"rss": int(fields["VmRSS"]) * 1024, "peak": int(fields["VmHWM"]) * 1024}


def main():
    folder, rank, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    began = time.perf_counter()
    import peft
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = peft.get_peft_model(base, peft.LoraConfig(
        r=rank, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]))
    model.eval()
    vocab = base.config.vocab_size

    def train(n, length):
        ids = torch.randint(0, vocab, (n, length + 1))
        start = time.perf_counter()
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, vocab).float(), ids[:, 1:].reshape(-1), reduction="sum")
        loss.backward()
        return time.perf_counter() - start

    @torch.no_grad()
    def prefill(length):
        ids = torch.randint(0, vocab, (1, length))
        start = time.perf_counter()
        model(input_ids=ids, logits_to_keep=1, use_cache=True).logits.argmax(-1)
        return time.perf_counter() - start

    @torch.no_grad()
    def decode(n, steps):
        ids = torch.randint(0, vocab, (n, 16))
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(steps):
            out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - start

    print(json.dumps({"ready": time.perf_counter() - began, "torch": torch.__version__,
                      "transformers": transformers.__version__, "peft": peft.__version__, **memory()}), flush=True)
    for line in sys.stdin:
        command, *numbers = line.split()
        numbers = [int(n) for n in numbers]
        if command == "quit":
            return
        if command == "memory":
            answer = memory()
        else:
            answer = {"seconds": {"train": train, "prefill": prefill, "decode": decode}[command](*numbers)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
