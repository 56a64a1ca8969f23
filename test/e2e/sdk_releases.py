"""Runs the tour of sdk_tour.py with many releases of the official SDK, each in an environment of its own, against one server, and
writes the table of docs/compatibility.md. The command is test/e2e/sdk_matrix.

An environment holds one unmodified `tinker` of PyPI; what it needs besides comes from the base environment, that of the
interpreter that runs this. The newest release's requirements include those of all others but torch, which the oldest import.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile

import sdk_tour
from daemon import ROOT, Daemon, find_daemon
from random_model import make_model

RELEASES = ["0.1.5", "0.3.0", "0.6.3", "0.8.1", "0.12.0", "0.16.1", "0.18.2", "0.22.7", "0.25.0", "0.30.4", "0.38.0"]
IMPORT_TORCH = {"0.1.5", "0.3.0", "0.6.3"}
TESTED = ["0.8.1", "0.16.1", "0.25.0", "0.38.0"]  # by every run of tools/test
LIMIT = 600  # seconds for one release


class Problem(Exception):
    """Something that the user of the command can mend."""


# ------------------------------------------------------------------------------------------ environments
def python_of(folder):
    return os.path.join(folder, "bin", "python")


def site_packages(python):
    return subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], check=True, text=True,
                          capture_output=True).stdout.strip()


def environment(folder, release, install=True):
    """The interpreter of the environment for a release, made if it is missing and `install` allows it; else None."""
    folder = os.path.join(folder, f"tinker-{release}")
    python, stamp = python_of(folder), os.path.join(folder, "base")
    try:
        with open(stamp, encoding="utf-8") as file:
            if file.read() == sys.prefix:
                return python
    except FileNotFoundError:
        pass
    if not install:
        return None
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    done = subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps",
                           "--disable-pip-version-check", f"tinker=={release}"], text=True, capture_output=True, check=False)
    if done.returncode:
        raise Problem(f"pip could not install tinker {release}:\n{done.stderr.strip()}")
    # only now, or pip would find the base's own release there
    with open(os.path.join(site_packages(python), "base.pth"), "w", encoding="utf-8") as file:
        file.write(site_packages(sys.executable) + "\n")
    with open(stamp, "w", encoding="utf-8") as file:
        file.write(sys.prefix)
    return python


def runnable(release):
    return sdk_tour.HAVE_TORCH or release not in IMPORT_TORCH


# ------------------------------------------------------------------------------------------ tours
def tour(python, url, models, only=None):
    """The results of one release; `models` is the folder that holds the served model under its name."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TINKER_")}
    env.update(TINKER_BASE_URL=url, TINKER_API_KEY="tml-tour", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "results.json")
        command = [python, os.path.abspath(sdk_tour.__file__), out] + ([only] if only else [])
        try:
            done = subprocess.run(command, cwd=models, env=env, text=True, capture_output=True, timeout=LIMIT, check=False)
        except subprocess.TimeoutExpired as error:
            raise Problem(f"{python}: no end within {LIMIT} s\n{str(error.stderr)[-4000:]}") from None
        if done.returncode or not os.path.exists(out):
            raise Problem(f"{python}: the tour ended with {done.returncode}\n{done.stderr[-4000:]}")
        with open(out, encoding="utf-8") as file:
            return json.load(file)


def in_parallel(function, items):
    """function of each item, as many at once as there are cores, in order."""
    with concurrent.futures.ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        return list(pool.map(function, items))


# ------------------------------------------------------------------------------------------ the table
CELLS = {"works": "yes", "absent": "–", "hosted": "hosted", "needs torch": "needs torch", "fails": "**fails**"}
HEAD = """# Compatibility

Written by `test/e2e/sdk_matrix --write docs/compatibility.md`, which runs the tour of `test/e2e/sdk_tour.py` with unmodified releases
of the official SDK (`tinker` on PyPI), each in an environment of its own, against one server. Nothing here is typed by hand.

Each row is a check of values, and not only a call: losses against their formulas, sampled logprobs against the trainer's bits, a
resumed run against the losses of the first. `tools/test` runs {tested}, and {oldest} where it is given
torch; its tests compare the rows with the public methods of the installed SDK, so a new method fails until it has a row.

**yes**: works. **–**: not in this release. **hosted**: the release has it and only a hosted service can give it; what this server
answers was checked, and is listed at the end.
"""


def table(results):
    """The text of docs/compatibility.md, of the results of several releases."""
    lines = [HEAD.format(tested=", ".join(TESTED[:-1]) + " and " + TESTED[-1], oldest=RELEASES[0])]
    releases = [r["release"] for r in results]
    groups = {name: [r for r in sdk_tour.ROWS if r.name.startswith(name + ".")] for name in sdk_tour.CLIENTS}
    groups["Features"] = [r for r in sdk_tour.ROWS if r.name.split(".")[0] not in sdk_tour.CLIENTS]
    for title, rows in groups.items():
        lines += [f"## {title}", "", f"| | {' | '.join(releases)} |", "|---|" + "---|" * len(releases)]
        for row in sorted(rows, key=lambda r: r.name) if title != "Features" else rows:
            cells = [CELLS[r["rows"][row.name][0]] for r in results]
            lines.append(f"| {row.name.removeprefix(title + '.')} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## What only a hosted service has", "", "| | answer of this server |", "|---|---|"]
    answers = {}
    for row in sdk_tour.ROWS:
        if row.hosted:
            answers.setdefault(row.hosted, []).append(row.name)
    lines += [f"| {', '.join(names)} | {answer} |" for answer, names in answers.items()]
    return "\n".join(lines) + "\n"


def failures(result):
    return {name: text for name, (outcome, text, _) in result["rows"].items() if outcome == "fails"}


# ------------------------------------------------------------------------------------------ the command
def arguments():
    parser = argparse.ArgumentParser(prog="sdk_matrix", description="Runs the full tour of the Tinker API with many releases of the "
                                     "official SDK. Its own interpreter needs the requirements of the newest release, as an "
                                     "environment made by tools/install-deps --sdk has them, and torch for " +
                                     ", ".join(sorted(IMPORT_TORCH)) + " and custom losses.")
    parser.add_argument("--releases", default=",".join(RELEASES), help='separated by commas, or "tested" for those of tools/test '
                        "(default: all)")
    parser.add_argument("--daemon", help="the server (default: $TB_DAEMON, or what is built in build/)")
    parser.add_argument("--venvs", default=os.path.join(ROOT, "build", "sdk-releases"), metavar="DIR",
                        help="where the environments are, or are made (default: build/sdk-releases)")
    parser.add_argument("--only", metavar="TEXT", help="only rows whose name contains this")
    parser.add_argument("--write", metavar="FILE", help="write the table there; needs all releases and rows")
    parser.add_argument("--install-only", action="store_true", help="make the environments and stop")
    return parser.parse_args()


def main():
    options = arguments()
    releases = TESTED if options.releases == "tested" else [r.strip() for r in options.releases.split(",")]
    try:
        if options.daemon:
            os.environ["TB_DAEMON"] = options.daemon
        if unknown := [r for r in releases if r not in RELEASES]:
            raise Problem(f"--releases {unknown[0]}: known are {', '.join(RELEASES)}")
        if options.write and (options.only or releases != RELEASES or not sdk_tour.HAVE_TORCH):
            raise Problem("--write needs all releases, all rows, and an interpreter with torch")
        skipped = [r for r in releases if not runnable(r)]
        releases = [r for r in releases if runnable(r)]
        if skipped:
            print(f"not run, {sys.executable} has no torch: {', '.join(skipped)}")
        os.makedirs(options.venvs, exist_ok=True)
        pythons = in_parallel(lambda r: environment(options.venvs, r), releases)
        if options.install_only:
            return 0
        if not find_daemon():
            raise Problem("no server to test: build it, or name it with --daemon")
        return run_all(pythons, options)
    except Problem as problem:
        print(f"sdk_matrix: {problem}", file=sys.stderr)
        return 2


def run_all(pythons, options):
    with tempfile.TemporaryDirectory() as folder:
        models = os.path.join(folder, "models")
        server = Daemon({sdk_tour.MODEL: make_model(os.path.join(models, sdk_tour.MODEL))}, os.path.join(folder, "data"))
        server.start()
        try:
            results = in_parallel(lambda p: tour(p, server.url, models, options.only), pythons)
        finally:
            server.stop()
    bad = 0
    for result in results:
        outcomes = [row[0] for row in result["rows"].values()]
        print(f"{result['release']}: " + ", ".join(f"{outcomes.count(o)} {o}" for o in CELLS if o in outcomes))
        for name, text in failures(result).items():
            bad += 1
            print(f"  {name} fails: " + text.strip().replace("\n", "\n    "))
    if options.write:
        with open(options.write, "w", encoding="utf-8") as file:
            file.write(table(results))
    return 1 if bad else 0
