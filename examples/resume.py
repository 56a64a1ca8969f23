"""Training that survives a restart, of this script or of the server: each run goes on where the last one was stopped, with
the optimizer's state, to the same bits as a run that was never stopped.

    python3 examples/resume.py state.json 5     five steps
    python3 examples/resume.py state.json 5     the next five
"""

import json
import os
import sys

import chat
import supervised
import tinker


def main(service, state_file, steps):
    if os.path.exists(state_file):
        with open(state_file, encoding="utf-8") as f:
            state = json.load(f)
        client = service.create_training_client_from_state_with_optimizer(state["path"]).result()
        print(f"resumed at step {state['steps']} from {state['path']}")
    else:
        state = {"steps": 0}
        client = service.create_lora_training_client(base_model=chat.MODEL, rank=16, seed=1).result()
    tokenizer = client.get_tokenizer()
    supervised.train(client, supervised.rows(tokenizer, supervised.LESSONS), steps)
    state["steps"] += steps
    state["path"] = client.save_state(name=f"step-{state['steps']}").result().path
    # written aside and renamed: whenever this script is stopped, the file names a whole checkpoint
    with open(state_file + ".new", "w", encoding="utf-8") as f:
        json.dump(state, f)
    os.replace(state_file + ".new", state_file)


if __name__ == "__main__":
    with tinker.ServiceClient() as service:  # its end ends the session, which frees what it has on the server
        main(service, sys.argv[1], int(sys.argv[2]))
