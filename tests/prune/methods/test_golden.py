"""Every golden file, index for index. `VLMPRUNE_GOLDEN` names another folder of them."""

import pytest
from kit import golden as kit_golden
from kit.golden import METHODS, load, run, runners
from kit.paths import GOLDEN, TESTS

RUNNERS = runners()
FOLDER = GOLDEN
FILES = sorted(FOLDER.glob("*.npz"))
RESULTS = (
    "kept",
    "kept_slots_0",
    "merged",
    "ttv",
    "assign",
    "centers",
    "kl",
)  # what a file holds to compare, first of these


def test_folder_has_files():
    assert FILES, f"no .npz file in {FOLDER}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_equals_the_official_selection(path):
    run(path)


def test_key_without_runner_fails(tmp_path):
    stray = tmp_path / "nobody__case.npz"
    stray.touch()
    with pytest.raises(LookupError, match="nobody"):
        run(stray)


@pytest.mark.parametrize("key", RUNNERS)
def test_a_wrong_result_is_noticed(key, tmp_path, monkeypatch):
    """Each runner compares: with one value of the official result changed, it fails."""
    path = min((TESTS / "golden").glob(f"{key}__*.npz"))
    golden = load(path)
    result = next(name for name in RESULTS if name in golden.arrays)
    golden.arrays[result][0] += 1
    monkeypatch.setattr(kit_golden, "load", lambda _: golden)
    with pytest.raises(AssertionError):
        run(path)


def test_runners_stand_in_the_file_of_their_method():
    for key, runner in RUNNERS.items():
        assert f'"{key}": Runner(' in (METHODS / f"test_{runner.method}.py").read_text()
