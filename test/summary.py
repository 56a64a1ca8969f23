#!/usr/bin/env python3
"""Adds up the results that tools/test left in a folder: meson's testlog.json (as meson-*.json) and pytest's junit files
(e2e-*.xml). Shows what failed, and ends with one line: N passed, N failed, N skipped. Exits 1 if anything failed or nothing ran."""

import glob
import json
import os
import sys
import xml.etree.ElementTree as xml

MESON_GOOD = ("OK", "EXPECTEDFAIL")


def meson_results(path):
    """(name, outcome, text) of each test."""
    with open(path, encoding="utf-8") as f:
        for line in f:
            if line.strip():
                test = json.loads(line)
                outcome = "passed" if test["result"] in MESON_GOOD else "skipped" if test["result"] == "SKIP" else "failed"
                text = (test.get("stdout") or "") + (test.get("stderr") or "")
                yield f"{test['name']} ({test['result']})", outcome, text


def pytest_results(path):
    for case in xml.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"
        bad = [c for c in case if c.tag in ("failure", "error")]
        skipped = [c for c in case if c.tag == "skipped"]
        if bad:
            yield name, "failed", bad[0].get("message") or ""
        elif skipped:
            yield name, "skipped", skipped[0].get("message") or ""
        else:
            yield name, "passed", ""
    # a file that could not be imported is an error of the suite without a case


def main():
    folder = sys.argv[1]
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    skips = []
    files = [(p, meson_results, 60) for p in sorted(glob.glob(os.path.join(folder, "meson-*.json")))]
    files += [(p, pytest_results, 3) for p in sorted(glob.glob(os.path.join(folder, "e2e-*.xml")))]
    for path, read, lines in files:
        where = os.path.basename(path).split(".")[0]
        for name, outcome, text in read(path):
            counts[outcome] += 1
            if outcome == "failed":
                print(f"FAILED {where}: {name}")
                for line in text.strip().splitlines()[-lines:]:
                    print("    " + line)
            elif outcome == "skipped":
                skips.append(f"skipped {where}: {name}: {(text.strip().splitlines() or ['no reason given'])[-1]}")
    stages = os.path.join(folder, "failed-stages")
    if os.path.exists(stages):
        with open(stages, encoding="utf-8") as f:
            for line in f:
                print(f"FAILED {line.strip()}")
                counts["failed"] += 1
    for line in skips:
        print(line)
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return 0 if counts["failed"] == 0 and counts["passed"] > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
