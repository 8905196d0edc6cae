"""The command `card`: it writes the card of a folder, and keeps one that was edited."""

import shutil

import pytest

from tests.paths import SAVED_BEFORE_ROOMS
from tests.running import run_command


@pytest.fixture
def run_without_card(tmp_path):
    """The folder of a run that has no README.md."""
    ignored = shutil.ignore_patterns("README.md")
    return shutil.copytree(SAVED_BEFORE_ROOMS / "run", tmp_path / "run", ignore=ignored)


def test_a_card_with_a_license_and_the_measured_number_is_written(run_without_card):
    done = run_command("card", run_without_card, "--license", "mit")
    assert done.returncode == 0 and "written: " in done.stdout, done.stderr
    card = (run_without_card / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card and "6.326044443063438" in card


def test_an_edited_card_is_only_replaced_with_overwrite(run_without_card):
    card = run_without_card / "README.md"
    card.write_text("mine", encoding="utf-8")
    done = run_command("card", run_without_card)
    assert done.returncode == 1 and "--overwrite" in done.stderr and card.read_text(encoding="utf-8") == "mine"
    assert run_command("card", run_without_card, "--overwrite").returncode == 0
    assert "license" not in card.read_text(encoding="utf-8")
