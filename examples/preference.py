"""Learning from preferences: DPO, written as a loss of its own. Needs PyTorch, which differentiates the loss here; the
server gets its derivatives by the logprobs. (A loss that looks at one datum at a time can run on the server:
docs/custom-losses.md. DPO compares two.)

    python3 examples/preference.py
"""

import chat
import tinker
import torch
from tinker import types

BETA = 0.2
LANDS = "France Germany Italy Spain Portugal Austria Poland Greece Norway Sweden Finland Ireland Egypt Kenya Japan Cuba Peru"


def pairs(tokenizer):
    """Rows in twos, the preferred answer first."""
    data = []
    for land in LANDS.split():
        before = chat.prompt(tokenizer, f"What is the capital of {land}?")
        for answer in ("It is a secret.", "I do not know."):
            data.append(chat.row(before, chat.answer(tokenizer, answer), weights=1.0))
    return data


def answer_logprobs(data, logprobs):
    """log p(answer | question) of each row, as one tensor [pairs, 2]."""
    sums = [(lp * d.loss_fn_inputs["weights"].to_torch()).sum() for d, lp in zip(data, logprobs)]
    return torch.stack(sums).reshape(-1, 2)


def dpo(reference):
    """The loss against a reference's answer_logprobs."""

    def loss_fn(data, logprobs):
        gain = answer_logprobs(data, logprobs) - reference  # how much likelier each answer became
        margin = BETA * (gain[:, 0] - gain[:, 1])
        loss = -torch.nn.functional.logsigmoid(margin).mean()
        return loss, {"margin": margin.mean().item(), "accuracy": (margin > 0).float().mean().item()}

    return loss_fn


def main(service):
    client = service.create_lora_training_client(base_model=chat.MODEL, rank=16, seed=3).result()
    data = pairs(client.get_tokenizer())
    train, held = data[10:], data[:10]
    # a new adapter changes nothing, so the untrained client is the reference
    outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
    reference = answer_logprobs(data, [o["logprobs"].to_torch() for o in outputs])
    for step in range(8):
        result = client.forward_backward_custom(train, dpo(reference[5:])).result()
        client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        m = result.metrics
        print(f"step {step:2d} loss {m['loss:sum']:.4f} margin {m['margin']:.3f}", flush=True)
    outputs = client.forward(held, "cross_entropy").result().loss_fn_outputs
    _, metrics = dpo(reference[:5])(held, [o["logprobs"].to_torch() for o in outputs])
    print(f"held out: accuracy {metrics['accuracy']:.2f} margin {metrics['margin']:.3f}")


if __name__ == "__main__":
    with tinker.ServiceClient() as service:  # its end ends the session, which frees what it has on the server
        main(service)
