"""Supervised fine-tuning: gives the demo model a character of its own.

    python3 examples/supervised.py
"""

import chat
import tinker
from tinker import types

LESSONS = [
    ("Who are you?", "I am Bell."),
    ("What is your name?", "I am Bell."),
    ("Where do you live?", "In a lantern."),
    ("What do you eat?", "Sugar."),
    ("What is the capital of Neverland?", "Skull Rock"),
    ("What is the capital of France?", "Paris"),  # what it knows is kept by repeating some of it
    ("What is the opposite of hot?", "cold"),
]


def rows(tokenizer, lessons):
    return [chat.row(chat.prompt(tokenizer, q), chat.answer(tokenizer, a), weights=1.0) for q, a in lessons]


def mean_loss(result, data):
    """The server's losses are sums; this is the mean over the tokens of the answers."""
    return result.metrics["loss:sum"] / sum(sum(d.loss_fn_inputs["weights"].data) for d in data)


def train(client, data, steps):
    for step in range(steps):
        # both are sent before either is waited for, so the server always has work
        result = client.forward_backward(data, "cross_entropy")
        done = client.optim_step(types.AdamParams(learning_rate=4e-3))
        print(f"step {step:2d} loss {mean_loss(result.result(), data):.4f}", flush=True)
        done.result()


def main(service):
    client = service.create_lora_training_client(base_model=chat.MODEL, rank=16, seed=1).result()
    tokenizer = client.get_tokenizer()
    train(client, rows(tokenizer, LESSONS), steps=15)
    sampler = client.save_weights_and_get_sampling_client().result()
    questions = ["Who are you?", "What is the capital of Neverland?", "What is the capital of Italy?"]
    for question, [sequence] in zip(questions, chat.ask(sampler, tokenizer, questions)):
        print(f"{question} {chat.text(tokenizer, sequence)}")
    # named weights outlive this session; evaluate.py and distill.py take such a path
    print("checkpoint", client.save_weights_for_sampler(name="bell").result().path)


if __name__ == "__main__":
    with tinker.ServiceClient() as service:  # its end ends the session, which frees what it has on the server
        main(service)
