"""Where things lie: the repository, its package, its examples, and the stored files of the tests."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = ROOT / "diffusers_vdm"
EXAMPLES = ROOT / "examples"
FIXTURES = TESTS / "fixtures"
# a run, its pipeline, its report and its card, as version 99c0f40 wrote them
SAVED_BEFORE_ROOMS = FIXTURES / "saved_before_rooms"
# a network of 25,000 parameters for the bundled digits, 1.86 bits/dim; see fixtures/README.md
DIGITS_MODEL = FIXTURES / "digits_model"


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by their paths relative to it."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
