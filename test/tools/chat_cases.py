#!/usr/bin/env python3
"""Writes test/data/chat: conversations and the tokens that the Tinker cookbook's renderers make of them (cases.json), and
a small tokenizer with Llama 3's special tokens (llama3.json).

    PYTHON test/tools/chat_cases.py

PYTHON has tinker_cookbook, transformers and torch. The other tokenizers are those of test/data/tokenizer.
"""

import json
import os

from tinker_cookbook import renderers
from tinker_cookbook.exceptions import RendererError
from transformers import PreTrainedTokenizerFast

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data")
LLAMA3 = {"<|endoftext|>": "<|begin_of_text|>", "<|im_start|>": "<|start_header_id|>",
          "<|im_end|>": "<|end_header_id|>", "<think>": "<|eot_id|>"}
QWEN = ["qwen3", "qwen3_disable_thinking", "qwen3_instruct"]
RENDERERS = {"qwen": QWEN + ["role_colon"], "qwen35": ["qwen3_5", "qwen3_5_disable_thinking"],
             "llama3": ["llama3", "role_colon"]}

S, U, A, T = "system", "user", "assistant", "tool"
CONVERSATIONS = [
    [(U, "Hi")],
    [(S, "You are terse."), (U, "What is 2 + 2?")],
    [(U, "a"), (A, "b"), (U, "c")],
    [(S, "x\n\ny"), (U, " leading and trailing \n"), (A, "\n\nok\n"), (U, "caf\u00e9 \u4f60\u597d \U0001f642")],
    [(U, "")],
    [(S, "only a system message")],
    [(U, "q"), (A, ("because", "yes")), (U, "and?")],
    [(U, "q"), (A, ("because\nof it", "yes"))],
    [(U, "q"), (A, ("\n\npadded\n", "\n\nyes"))],
    [(U, "q"), (A, "<think>\nin line\n</think>\nanswer")],
    [(U, "q"), (A, "<think>never closed")],
    [(U, "q"), (A, "plain")],
    [(U, "q"), (A, "call"), (T, "{\"t\": 21}"), (A, "21")],
    [(U, "q"), (A, "two calls"), (T, "one"), (T, "two")],
    [(U, "q"), (A, "two calls"), (T, "one"), (T, "two"), (A, "done"), (U, "thanks")],
    [(A, "I begin")],
    [(S, "s"), (A, ("t", "no user here"))],
    [(U, "x" * 200), (A, "y\n" * 50), (U, "1234567890 !?")],
]


def message(role, content):
    if isinstance(content, tuple):
        content = [{"type": "thinking", "thinking": content[0]}, {"type": "text", "text": content[1]}]
    return {"role": role, "content": content}


def plain(role, content):
    if isinstance(content, tuple):
        return {"role": role, "thinking": content[0], "content": content[1]}
    return {"role": role, "content": content}


def write_llama3():
    with open(os.path.join(DATA, "tokenizer", "llama3.json")) as f:
        text = f.read()
    for old, new in LLAMA3.items():
        text = text.replace(old, new)
    o = json.loads(text)
    for token in o["added_tokens"]:
        token["special"] = token["special"] or token["content"] == "<|eot_id|>"
    with open(os.path.join(DATA, "chat", "llama3.json"), "w") as f:
        json.dump(o, f, separators=(",", ":"))


def main():
    cases = []
    write_llama3()
    for kind, names in RENDERERS.items():
        folder = "chat" if kind == "llama3" else "tokenizer"
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=os.path.join(DATA, folder, kind + ".json"))
        if kind == "llama3":
            tokenizer.bos_token = "<|begin_of_text|>"
        for name in names:
            renderer = renderers.get_renderer(name, tokenizer, model_name="x")
            for conversation in CONVERSATIONS:
                if name in ("role_colon", "llama3") and any(isinstance(c, tuple) for _, c in conversation):
                    continue
                try:
                    prompt = renderer.build_generation_prompt([message(*m) for m in conversation])
                except RendererError:
                    continue  # the cookbook refuses it
                cases.append({"tokenizer": kind, "renderer": name,
                              "messages": [plain(*m) for m in conversation], "ids": prompt.to_ints()})
    with open(os.path.join(DATA, "chat", "cases.json"), "w") as f:
        f.write("[" + ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases) + "]\n")


if __name__ == "__main__":
    main()
