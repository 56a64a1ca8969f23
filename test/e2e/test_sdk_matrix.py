"""The tour of sdk_tour.py with several releases of the SDK, and the table that it writes.

TB_SDK_VENVS names the folder of environments (test/e2e/sdk_matrix --install-only makes them), TB_SDK_RELEASES what to run."""

import os

import pytest
import sdk_releases
import sdk_tour

tinker = pytest.importorskip("tinker")

VENVS = os.environ.get("TB_SDK_VENVS", os.path.join(sdk_releases.ROOT, "build", "sdk-releases"))
RELEASES = os.environ.get("TB_SDK_RELEASES", ",".join(sdk_releases.TESTED)).split(",")
TABLE = os.path.join(sdk_releases.ROOT, "docs", "compatibility.md")


@pytest.fixture(scope="module")
def results(server, tiny):
    """{release: results} of those with an environment, all run at once."""
    found = {r: sdk_releases.environment(VENVS, r, install=False) for r in RELEASES if sdk_releases.runnable(r)}
    found = {r: python for r, python in found.items() if python}
    done = sdk_releases.in_parallel(lambda p: sdk_releases.tour(p, server.url, os.path.dirname(tiny)), found.values())
    return dict(zip(found, done))


@pytest.mark.parametrize("release", RELEASES)
def test_release(results, release):
    if release not in results:
        pytest.skip(f"no environment of tinker {release} in {VENVS}: test/e2e/sdk_matrix --install-only makes it")
    result = results[release]
    assert result["release"] == release
    failed = sdk_releases.failures(result)
    assert not failed, "\n\n".join(f"{name}: {text}" for name, text in failed.items())
    done = [row[0] for row in result["rows"].values()]
    assert done.count("works") > 50 and done.count("needs torch") in ((0,) if sdk_tour.HAVE_TORCH else (2, 3))


def test_every_public_method_has_a_row():
    rows = [row.name for row in sdk_tour.ROWS]
    assert len(rows) == len(set(rows)), "a row is there twice"
    missing = set(sdk_tour.public_methods()) - set(rows)
    assert not missing, f"tinker {tinker.__version__} has methods without a row in sdk_tour.py: {sorted(missing)}"


def test_a_new_method_is_noticed(monkeypatch):
    monkeypatch.setattr(sdk_tour.client_class("RestClient"), "brand_new", lambda self: None, raising=False)
    assert "RestClient.brand_new" in sdk_tour.public_methods()
    with pytest.raises(AssertionError, match="brand_new"):
        test_every_public_method_has_a_row()


def table_rows():
    """{row: cells} of the committed table."""
    rows, title = {}, None
    with open(TABLE, encoding="utf-8") as file:
        for line in file:
            if line.startswith("## "):
                title = line[3:].strip()
            cells = [c.strip() for c in line.strip().strip("|").split("|")]
            if line.startswith("| ") and len(cells) == len(sdk_releases.RELEASES) + 1:
                name = cells[0] if title == "Features" else f"{title}.{cells[0]}"
                rows[name] = cells[1:]
                if not cells[0]:
                    assert cells[1:] == sdk_releases.RELEASES
    return {name: cells for name, cells in rows.items() if cells != sdk_releases.RELEASES}


def test_the_table_is_complete_and_green():
    rows = table_rows()
    assert set(rows) == {row.name for row in sdk_tour.ROWS}, "write it again with test/e2e/sdk_matrix --write"
    for name, cells in rows.items():
        assert set(cells) <= {"yes", "–", "hosted"}, f"{name}: {cells}"
        assert set(cells) != {"–"}, f"{name} is in no release"


def test_the_table_says_what_was_measured(results):
    rows = table_rows()
    for release, result in results.items():
        column = sdk_releases.RELEASES.index(release)
        for name, (outcome, _, _) in result["rows"].items():
            if outcome != "needs torch":
                assert rows[name][column] == sdk_releases.CELLS[outcome], f"{name} with {release}"
