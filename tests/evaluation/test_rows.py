"""evaluation/rows.py: the numbers of an evaluation, kept on disk, resumed, and shared among processes."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from diffusers_vdm import FixedLinearGamma, VariationalBound, evaluate_mc, files
from diffusers_vdm.evaluation import rows as rows_module
from diffusers_vdm.evaluation.rows import Rows, batches, check_rows_finite, fingerprint
from tests.models import CountingNet
from tests.paths import ROOT
from tests.running import LAUNCH, run_python
from tests.tensors import F64

NAN = math.nan
IDENTITY = {"seed": 3, "weights": "abc", "steps": (1, 2)}


def table(folder=None, rows=(), num_columns: int = 2, identity=IDENTITY) -> Rows:
    """A table with these rows, saved to its folder."""
    out = Rows(num_columns, resume_dir=folder, identity=identity)
    out.grow(len(rows))
    for i, row in enumerate(rows):
        out.values[i] = torch.tensor(row, dtype=F64)
    out.keep(now=True)
    return out


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal to the last bit, also for −0 and NaN."""
    return left.shape == right.shape and left.dtype == right.dtype and fingerprint([left]) == fingerprint([right])


# ---- pieces of work ----------------------------------------------------------------------------------------------


def test_fingerprint_tells_values_types_and_shapes_apart():
    one = torch.arange(6, dtype=torch.int32)
    kinds = [one, one.view(2, 3), one.view(3, 2), one.view(2, 3).T, one.float(), one + (one == 5), one.long(), one[:5]]
    assert len({fingerprint([kind]) for kind in kinds}) == len(kinds)
    assert fingerprint([one, one[:2]]) != fingerprint([one[:2], one]) != fingerprint([one])
    assert fingerprint([one.view(2, 3).T]) == fingerprint([one.view(2, 3).T.contiguous()])
    assert fingerprint(iter([torch.tensor(1.0), torch.tensor([], dtype=torch.bfloat16)])) == fingerprint(
        [torch.tensor(1.0, requires_grad=True), torch.tensor([], dtype=torch.bfloat16)]
    )


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_are_of_one_repeat_and_hold_every_row_once(batch_size):
    rows = torch.tensor([0, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 27])
    pieces = list(batches(rows, 7, batch_size))
    assert torch.equal(torch.cat([row for _, _, row in pieces]), rows)
    for repeat, images, row in pieces:
        assert 1 <= len(row) <= batch_size
        assert torch.equal(repeat * 7 + images, row) and int(images.max()) < 7
    # as few as there can be
    assert len(pieces) == sum(-(-count // batch_size) for count in (4, 7, 1))
    assert list(batches(rows[:0], 7, batch_size)) == []


def test_rows_that_are_not_finite_are_named_by_their_image():
    values, images = torch.ones(4, 3), torch.tensor([8, 5, 11, 2])
    assert check_rows_finite(values, images) is values
    for bad in (NAN, math.inf, -math.inf):
        values = torch.ones(4, 3)
        values[1, 2] = values[3, 0] = bad
        with pytest.raises(ValueError, match="image 5 is not finite"):
            check_rows_finite(values, images)


# ---- a table and its folder --------------------------------------------------------------------------------------


def test_a_table_grows_and_never_shrinks():
    out = table(rows=[(1, 2), (3, 4)])
    out.grow(5)
    assert out.values.shape == (5, 2) and out.values[2:].isnan().all() and out.values.dtype == F64
    assert out.values[:2].tolist() == [[1, 2], [3, 4]]
    out.grow(3)
    assert len(out.values) == 5
    # rows that are in memory only are not done
    assert out.mine(1, 5).tolist() == [1, 2, 3, 4] and out.mine(2, 2).tolist() == []
    assert same(out.share(1, 3), out.values[1:3])


def test_rows_on_disk_are_not_computed_again(tmp_path):
    rows = [(1.0, -0.0), (NAN, NAN), (5e-324, 1.7976931348623157e308), (0.1, -1 / 3), (NAN, NAN)]
    first = table(tmp_path / "a" / "b", rows)
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["rows-0.safetensors"]
    again = Rows(2, resume_dir=str(tmp_path / "a" / "b"), identity=IDENTITY)
    assert same(again.values, first.values)
    assert again.mine(0, 5).tolist() == [1, 4] and again.mine(2, 5).tolist() == [4]
    again.grow(7)
    assert again.mine(0, 7).tolist() == [1, 4, 5, 6]
    again.values[again.mine(0, 7)] = 8.0
    share = again.share(0, 7)
    assert share[1].tolist() == [8, 8] and same(share[[0, 2, 3]], first.values[[0, 2, 3]])
    last = Rows(2, resume_dir=tmp_path / "a" / "b", identity=IDENTITY)
    assert same(last.values, share) and len(last.mine(0, 7)) == 0


def test_files_of_several_processes_are_one_table(tmp_path):
    parts = {0: [(1, 1), (NAN, NAN)], 1: [(NAN, NAN), (2, 2), (NAN, NAN), (4, 4)], 10: [(NAN, NAN)] * 2 + [(3, 3)]}
    for rank, part in parts.items():
        table(tmp_path / "one", part)
        (tmp_path / "all").mkdir(exist_ok=True)
        (tmp_path / "one" / "rows-0.safetensors").rename(tmp_path / "all" / f"rows-{rank}.safetensors")
    out = Rows(2, resume_dir=tmp_path / "all", identity=IDENTITY)
    assert out.values.tolist() == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert len(out.mine(0, 4)) == 0


def test_a_partly_filled_row_is_kept_and_completed(tmp_path):
    table(tmp_path, [(1, NAN, 3), (4, 5, 6)], num_columns=3)
    out = Rows(3, resume_dir=tmp_path, identity=IDENTITY)
    assert out.mine(0, 2).tolist() == [0]
    assert out.values[0, 0] == 1 and out.values[0, 1].isnan() and out.values[0, 2] == 3
    # another process had the rest of it
    other = save({"values": torch.tensor([[9, 2, NAN]], dtype=F64)}, {"identity": json.dumps(IDENTITY)})
    (tmp_path / "rows-1.safetensors").write_bytes(other)
    out = Rows(3, resume_dir=tmp_path, identity=IDENTITY)
    assert out.values[0].tolist() == [1, 2, 3] and len(out.mine(0, 2)) == 0


def test_rows_are_saved_once_a_minute_and_on_request(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(rows_module.time, "monotonic", lambda: now[0])
    out = Rows(1, resume_dir=tmp_path, identity=IDENTITY)
    out.grow(3)

    def on_disk() -> list[float]:
        path = tmp_path / "rows-0.safetensors"
        return load_file(path)["values"].nan_to_num(-1).flatten().tolist() if path.exists() else []

    out.values[0] = 1
    out.keep()
    now[0] += 59
    out.keep()
    assert on_disk() == []
    now[0] += 2
    out.keep()
    assert on_disk() == [1, -1, -1]
    out.values[1] = 2
    now[0] += 59
    out.keep()
    assert on_disk() == [1, -1, -1]
    out.keep(now=True)
    assert on_disk() == [1, 2, -1]
    out.values[2] = 3
    out.share(0, 3)
    assert on_disk() == [1, 2, 3]


def test_a_table_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(rows=[(1, 2)]).share(0, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("identity", "named"),
    [
        (IDENTITY | {"seed": 4}, ["seed was 3 and is 4"]),
        (IDENTITY | {"seed": 4, "weights": None}, ["seed was 3 and is 4", "weights was 'abc' and is None"]),
        (IDENTITY | {"steps": [1, 3]}, ["steps was [1, 2] and is [1, 3]"]),
        (IDENTITY | {"new": 1.5}, ["new was None and is 1.5"]),
        ({"weights": "abc", "steps": (1, 2)}, ["seed was 3 and is None"]),
        (None, ["seed was 3 and is None", "steps was [1, 2] and is None", "weights was 'abc' and is None"]),
    ],
)
def test_numbers_of_another_evaluation_are_refused(tmp_path, identity, named):
    table(tmp_path, [(1, 2)])
    before = (tmp_path / "rows-0.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another evaluation") as error:
        Rows(2, resume_dir=tmp_path, identity=identity)
    assert str(tmp_path) in str(error.value)
    assert all(text in str(error.value) for text in named)
    same_names = set(IDENTITY) - {text.split()[0] for text in named}
    assert not any(f"{name} was" in str(error.value) for name in same_names)
    assert (tmp_path / "rows-0.safetensors").read_bytes() == before


def test_a_list_and_a_tuple_are_the_same_identity(tmp_path):
    table(tmp_path, [(1, 2)])
    assert len(Rows(2, resume_dir=tmp_path, identity=IDENTITY | {"steps": [1, 2]}).mine(0, 1)) == 0
    with pytest.raises(ValueError, match="other columns"):
        Rows(3, resume_dir=tmp_path, identity=IDENTITY)


def damaged(kind: str, good: bytes) -> bytes:
    values = {"values": torch.ones(3, 2, dtype=F64)}
    return {
        "empty": b"",
        "one byte": good[:1],
        "header cut": good[:40],
        "values cut": good[:-8],
        "garbage": bytes(range(256)) * 4,
        "text": b"not a table at all, but some text",
        "zeros": bytes(len(good)),
        "no metadata": save(values),
        "no identity": save(values, {"format": "pt"}),
        "identity is no JSON": save(values, {"identity": "{"}),
        "identity is no dict": save(values, {"identity": "[1]"}),
        "no values": save({"other": values["values"]}, {"identity": json.dumps(IDENTITY)}),
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "one byte", "header cut", "values cut", "garbage", "text", "zeros",
                                  "no metadata", "no identity", "identity is no JSON", "identity is no dict",
                                  "no values"])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, kind):
    table(tmp_path, [(1, 2), (3, 4)])
    path = tmp_path / "rows-1.safetensors"
    path.write_bytes(damaged(kind, (tmp_path / "rows-0.safetensors").read_bytes()))
    with pytest.raises(ValueError, match="is damaged") as error:
        Rows(2, resume_dir=tmp_path, identity=IDENTITY)
    assert str(path) in str(error.value) and "remove it" in str(error.value)
    # the message says to remove it
    path.unlink()
    assert len(Rows(2, resume_dir=tmp_path, identity=IDENTITY).mine(0, 2)) == 0


# ---- files that are whole or not there ---------------------------------------------------------------------------


class Stopped(BaseException):
    """Like KeyboardInterrupt, no subclass of Exception."""


def stops(*args, **kwargs):
    raise Stopped


class HalfWritten:
    """A file that takes half of what it is given."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        raise Stopped


@pytest.mark.parametrize("where", ["open", "write", "fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path, monkeypatch, where):
    rows = table(tmp_path, [(1, 2), (NAN, NAN)])
    path = tmp_path / "rows-0.safetensors"
    old = path.read_bytes()
    rows.values[1] = 7
    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(files, "open", lambda *args: HalfWritten(open(*args)), raising=False)
        elif where == "open":
            patch.setattr(files, "open", stops, raising=False)
        else:
            patch.setattr(files.os, where, stops)
        with pytest.raises(Stopped):
            rows.keep(now=True)
    assert path.read_bytes() == old
    again = Rows(2, resume_dir=tmp_path, identity=IDENTITY)
    assert again.values[0].tolist() == [1, 2] and again.mine(0, 2).tolist() == [1]
    # the temporary file of the interrupted write does not disturb the next write
    rows.keep(now=True)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert len(Rows(2, resume_dir=tmp_path, identity=IDENTITY).mine(0, 2)) == 0


# ---- two processes -----------------------------------------------------------------------------------------------

KINDS = {
    "plain": {"num_samples": 3},
    "importance": {"num_samples": 8, "importance_sampling": True},
    "target": {"num_samples": 2, "target_stderr_bpd": 0.2},
}
NUM_IMAGES = 37
TENSORS = ("per_image_bpd", "gamma_t", "mse", "diffusion_terms_bpd")


def work(kind: str, folder, stop_at: int = 0, accelerator=None) -> tuple[dict | None, int]:
    """All numbers of an evaluation, or `None` if it was interrupted; and how many images the network finished."""
    net = CountingNet(stop_at)
    images = torch.randint(0, 9, (NUM_IMAGES, 2), generator=torch.Generator().manual_seed(0))
    bound = VariationalBound(net, FixedLinearGamma(-3.0, 4.0), num_levels=9)
    try:
        out = evaluate_mc(
            bound, images, **KINDS[kind], batch_size=5, resume_dir=folder, accelerator=accelerator, progress_bar=False
        )
    except (KeyboardInterrupt, RuntimeError):  # the other process is gone
        return None, net.count
    numbers = [out.bpd, out.stderr_bpd, out.variance_per_call, out.plain_variance_per_call, out.num_samples]
    return {name: getattr(out, name).clone() for name in TENSORS} | {
        "numbers": torch.tensor(numbers, dtype=F64)
    }, net.count


def main(folder: Path, task: str, stop_at: int = 0) -> None:
    """What each of the processes does: `finish` what is in the folder, or be interrupted in `plain`."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    rank = accelerator.process_index
    for kind in KINDS:
        # only the first process is interrupted, and the second one notices that
        out, count = work(kind, folder / kind, stop_at if rank == 0 else 0, accelerator)
        save_file(out or {}, folder / f"{kind}-{task}-{rank}.result", {"count": str(count)})
        if out is None:
            os._exit(0)  # the other process has ended
    accelerator.end_training()


def two_processes(*arguments) -> None:
    """Runs [`main`] in two processes."""
    run_python(*LAUNCH.split(), 2, "-m", __name__, *arguments, cwd=ROOT, timeout=120)


def results(folder: Path, kind: str, task: str) -> list[tuple[dict, int]]:
    from safetensors import safe_open

    out = []
    for rank in (0, 1):
        path = folder / f"{kind}-{task}-{rank}.result"
        with safe_open(path, "pt") as file:
            out.append((load_file(path), int(file.metadata()["count"])))
    return out


def assert_equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path):
    """Begun by one process, or by none, and finished by two."""
    one = {kind: work(kind, None) for kind in KINDS}
    two_processes(tmp_path / "whole", "finish")
    begun = {}
    for kind in KINDS:
        half, begun[kind] = work(kind, tmp_path / "half" / kind, stop_at=12)
        assert half is None and begun[kind] > 0
    two_processes(tmp_path / "half", "finish")
    for kind, (expected, total) in one.items():
        whole, half = (results(tmp_path / name, kind, "finish") for name in ("whole", "half"))
        for out, _ in (*whole, *half):
            assert_equal(out, expected)
        counts = [count for _, count in whole]
        assert sum(counts) == total and abs(counts[0] - counts[1]) <= 4
        assert begun[kind] + sum(count for _, count in half) == total
        # each kept it all, and one process has nothing left to do
        again, count = work(kind, tmp_path / "whole" / kind)
        assert_equal(again, expected)
        assert count == 0


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 7])
def test_one_process_resumes_from_two(tmp_path, stop_at):
    expected, total = work("plain", None)
    two_processes(tmp_path, "interrupted", stop_at)
    left = results(tmp_path, "plain", "interrupted")
    assert not any(out for out, _ in left)
    # what the second one did while the first was gone is not lost
    counts = [count for _, count in left]
    assert counts[0] < counts[1] == total // 2
    out, count = work("plain", tmp_path / "plain")
    assert_equal(out, expected)
    assert sum(counts) + count == total


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
