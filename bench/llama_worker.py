"""llama.cpp doing the work of bench/decode and bench/prefill, one command a line on stdin; run by lib.py.

    llama_worker.py cpu|cuda THREADS MODEL.gguf
    prefill LEN | decode N STEPS | logprobs TOKEN... | memory        answers: one JSON object a line, the first when ready
"""

import ctypes
import json
import sys
import time

import llama_cpp as ll
import numpy as np

from worker import memory, serve

CONTEXT, SEQUENCES = 4096, 64


class Llama:
    def __init__(self, device, threads, path):
        if device == "cuda" and not ll.llama_supports_gpu_offload():
            sys.exit("this llama.cpp was built without CUDA")
        ll.llama_backend_init()
        self.quiet = ll.llama_log_callback(lambda level, text, data: None)
        ll.llama_log_set(self.quiet, ctypes.c_void_p(0))
        placed = ll.llama_model_default_params()
        placed.n_gpu_layers = 1000 if device == "cuda" else 0
        self.model = ll.llama_model_load_from_file(path.encode(), placed)
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = CONTEXT, CONTEXT, 512, SEQUENCES
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self.context = ll.llama_init_from_model(self.model, params)
        self.batch = ll.llama_batch_init(CONTEXT, 0, 1)
        self.vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.rng = np.random.default_rng(1)

    def clear(self):
        ll.llama_memory_clear(ll.llama_get_memory(self.context), False)

    def run(self, tokens, positions, sequences, wanted):
        b = self.batch
        b.n_tokens = len(tokens)
        for i, (token, pos, seq, logits) in enumerate(zip(tokens, positions, sequences, wanted)):
            b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = token, pos, 1, seq, logits
        if ll.llama_decode(self.context, b):
            raise RuntimeError("llama_decode failed")

    def logits(self, i):
        return np.ctypeslib.as_array(ll.llama_get_logits_ith(self.context, i), shape=(self.vocab,))

    def ids(self, n):
        return self.rng.integers(0, self.vocab, n).tolist()

    def prefill(self, length):
        ids = self.ids(length)
        self.clear()
        start = time.perf_counter()
        self.run(ids, range(length), [0] * length, [0] * (length - 1) + [1])
        self.logits(length - 1).argmax()
        return {"seconds": time.perf_counter() - start}

    def decode(self, n, steps):
        """Prompts of 16 tokens first, untimed."""
        self.clear()
        for seq in range(n):
            self.run(self.ids(16), range(16), [seq] * 16, [0] * 15 + [1])
        last = self.ids(n)
        start = time.perf_counter()
        for step in range(steps):
            self.run(last, [16 + step] * n, range(n), [1] * n)
            last = [int(self.logits(i).argmax()) for i in range(n)]
        return {"seconds": time.perf_counter() - start}

    def logprobs(self, *ids):
        """Of each token but the first, given those before it."""
        n = len(ids)
        self.clear()
        self.run(ids, range(n), [0] * n, [1] * n)
        out = []
        for i in range(n - 1):
            z = self.logits(i).astype(np.float64)
            out.append(float(z[ids[i + 1]] - z.max() - np.log(np.exp(z - z.max()).sum())))
        return {"logprobs": out}


def main():
    side = Llama(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    print(json.dumps({"llama-cpp-python": ll.__version__, "system": ll.llama_print_system_info().decode(), **memory()}),
          flush=True)
    serve({"prefill": side.prefill, "decode": side.decode, "logprobs": side.logprobs, "memory": memory})


if __name__ == "__main__":
    main()
