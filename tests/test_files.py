"""files.py: files are whole or not there, and one run at a time writes in a place."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_vdm import files
from diffusers_vdm.files import Lock, write_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("as_path", [str, Path])
def test_text_and_bytes_are_written_exactly(tmp_path, as_path):
    path = as_path(tmp_path / "file.json")
    for content in ("γ ≤ 4\r\n", "", b"\x00\xff\n", "shorter"):
        write_atomically(path, content)
        assert Path(path).read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_file_is_on_disk_before_it_replaces_another(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(files.os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    write_atomically(tmp_path / "file", "text")
    assert order == ["fsync", "replace"]


# ---- locks -------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from diffusers_vdm.files import Lock
print(Lock(sys.argv[1]).acquire(), flush=True)
time.sleep(600)
"""
# a child of the process that holds the lock lives on, for example a worker of a data set
FORK = """
import os, sys, time
from diffusers_vdm.files import Lock
held = Lock(sys.argv[1]).acquire()
if os.fork() == 0:
    print(held, flush=True)
time.sleep(20)
"""
ONE_OF_US = """
import sys
from pathlib import Path
from diffusers_vdm.files import Lock
counter = Path(sys.argv[2])
done = 0
while done < 40:
    lock = Lock(sys.argv[1])
    if lock.acquire():
        value = int(counter.read_text(encoding="utf-8"))
        counter.write_text(str(value + 1), encoding="utf-8")
        done += 1
        lock.release()
"""


def holder(path, code=HOLD):
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip() == "True"


@pytest.mark.parametrize("code", [HOLD, FORK], ids=["alone", "with a child that lives on"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_holds_no_lock(tmp_path, number, code):
    path = tmp_path / "new" / "folder" / ".lock"
    process, holds = holder(path, code)
    try:
        assert holds and not Lock(path).acquire() and path.exists()
        process.send_signal(number)
        process.wait(20)
        lock = Lock(path)
        assert lock.acquire() and not Lock(path).acquire()
        lock.release()
        assert not path.exists()
    finally:
        process.kill()
        process.stdout.close()


def test_a_released_lock_removes_its_empty_folders(tmp_path):
    path = tmp_path / "a" / "b" / ".lock"
    lock = Lock(path)
    assert lock.acquire()
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    assert lock.acquire()
    (path.parent / "result").touch()
    lock.release()
    assert list(path.parent.iterdir()) == [path.parent / "result"]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        Lock(tmp_path / "file" / ".lock").acquire()


def test_only_one_of_many_processes_holds_a_lock(tmp_path):
    """A process removes the lock file while others are about to lock it: no update is lost."""
    counter = tmp_path / "counter"
    counter.write_text("0", encoding="utf-8")
    command = [sys.executable, "-c", ONE_OF_US, str(tmp_path / "folder" / ".lock"), str(counter)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    assert counter.read_text(encoding="utf-8") == "160" and not list(tmp_path.glob("folder/.*"))
