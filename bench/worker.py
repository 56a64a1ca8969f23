"""What the peers' processes share: the loop over commands."""

import json
import sys


def memory():
    with open("/proc/self/status", encoding="ascii") as f:
        fields = {line.split(":")[0]: line.split()[1] for line in f if line.startswith("Vm")}
    return {"rss": int(fields["VmRSS"]) * 1024, "peak": int(fields["VmHWM"]) * 1024}


def serve(commands):
    """Answers `NAME NUMBER...` lines until the input ends; each command returns a JSON object."""
    for line in sys.stdin:
        name, *numbers = line.split()
        print(json.dumps(commands[name](*(int(n) for n in numbers))), flush=True)
