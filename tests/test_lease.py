"""A cache's lock holds between hosts that share a file system, and no holder that is gone blocks it for ever."""

import errno
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import filelock
import pytest

from gradpruner import lease as leases
from gradpruner import waiting
from gradpruner.lease import Lease, LostLockError, find_holder
from gradpruner.pipeline.cache import StageCache
from gradpruner.waiting import locked

FORK = multiprocessing.get_context("fork")  # a new interpreter would import torch for 10 s
SECONDS = 2.0  # of a lease, instead of 300; a busy machine may stop a process for a second


def tried(given, gets):
    return pytest.mark.bad_input("Waiting", given, gets)


@pytest.fixture(autouse=True)
def short_leases(monkeypatch):
    monkeypatch.setattr(leases, "LEASE_SECONDS", SECONDS)
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.1)


@pytest.fixture
def network_disk(monkeypatch):
    """Gives this process and its children a file system like NFS: no locks of the system, no exchange of names."""

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "_acquire", refuse)
    monkeypatch.setattr(filelock._soft, "exchange_names", lambda *args: False)


def on_another_host(name, work, *args):
    """Starts a process whose host has another name."""

    def run():
        socket.gethostname = lambda: name
        leases.own_host.cache_clear()
        work(*args)
        os._exit(0)

    process = FORK.Process(target=run)
    process.start()
    return process


def hold(file, held):
    with locked(file, "holds"):
        held.set()
        time.sleep(60)


def killed_holder(host, file):
    held = FORK.Event()
    process = on_another_host(host, hold, file, held)
    assert held.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process


def seconds_to_lock(file):
    start = time.monotonic()
    with locked(file, "works"):
        return time.monotonic() - start


@tried("a cache's lock of a process on another host that died", "is waited for until its heartbeat is 5 minutes old")
@pytest.mark.parametrize("disk", ["local disk", "network disk"])
def test_a_holder_that_died_on_another_host_blocks_for_one_lease(tmp_path, request, disk):
    if disk == "network disk":
        request.getfixturevalue("network_disk")
    file = tmp_path / "stage.lock"
    process = killed_holder("node7", file)
    holder = find_holder(tmp_path / "stage.lease")
    assert (holder.host, holder.pid, holder.is_here, holder.has_died) == ("node7", process.pid, False, False)
    assert 0.9 * SECONDS <= seconds_to_lock(file) < 10 * SECONDS
    assert {path.name for path in tmp_path.iterdir()} <= {"stage.lock"}


@tried("a cache's lock of a process on this host that died", "is taken at once, on a network disk, too")
@pytest.mark.parametrize("disk", ["local disk", "network disk"])
def test_a_holder_that_died_here_blocks_nobody(tmp_path, request, monkeypatch, disk):
    if disk == "network disk":
        request.getfixturevalue("network_disk")
    monkeypatch.setattr(leases, "LEASE_SECONDS", 300.0)
    killed_holder(socket.gethostname(), tmp_path / "stage.lock")
    assert find_holder(tmp_path / "stage.lease").has_died
    assert seconds_to_lock(tmp_path / "stage.lock") < 5


def test_a_heartbeat_keeps_a_lock_for_longer_than_a_lease(tmp_path, network_disk, caplog, monkeypatch):
    monkeypatch.setattr(waiting, "SILENT_SECONDS", 0.05)
    held, file = FORK.Event(), tmp_path / "stage.lock"

    def work():
        with locked(file, "works"):
            held.set()
            time.sleep(2 * SECONDS)

    start, process = time.monotonic(), on_another_host("node7", work)
    assert held.wait(30)
    assert seconds_to_lock(file) > 1.5 * SECONDS and time.monotonic() - start > 2 * SECONDS
    process.join()
    assert f"Waiting for another process that works; process {process.pid} on node7 holds {file}" in caplog.text


def test_one_process_at_a_time_between_hosts_that_die(tmp_path, network_disk):
    """Four hosts count under the lock, and one of them dies with the lock in its hands."""
    file, counter, inside = tmp_path / "stage.lock", tmp_path / "count", tmp_path / "inside"
    counter.write_text("0")

    def count(dies):
        for turn in range(5):
            with locked(file, "counts"):
                if dies and turn == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another process is inside
                value = int(counter.read_text())
                time.sleep(0.01)
                counter.write_text(str(value + 1))
                inside.unlink()

    processes = [on_another_host(f"node{number}", count, number == 0) for number in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0, 0]
    assert counter.read_text() == "17"


@tried("a run that was suspended while another host took over its stage", "error: The lock must be held until")
@pytest.mark.parametrize("moment", ["at work", "at its end"])
def test_a_process_that_lost_its_lock_stops_and_publishes_nothing(
    tmp_path, network_disk, caplog, monkeypatch, request, moment
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    if moment == "at its end":  # before a heartbeat, or where SIGINT is ignored
        monkeypatch.setattr(leases._thread, "interrupt_main", lambda: None)
    cache, key = StageCache(tmp_path), {"seed": 0}
    entry = cache.path("stage", key)

    def lose(folder):
        entry.with_suffix(".lease").unlink()
        entry.with_suffix(".lease").write_text("another's")
        deadline = time.monotonic() + 20
        while "was lost" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        if moment == "at work":
            time.sleep(20)
            raise AssertionError("not stopped")

    with pytest.raises(LostLockError, match=r"must be held .*, got .*\.lease lost \(owner-changed\): .*Run again"):
        cache.get("stage", key, lose)
    assert cache.find("stage", key) is None and entry.with_suffix(".lease").read_text() == "another's"


def test_ctrl_c_under_a_lock_stays_ctrl_c(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "stage.lock", "works"):
        raise KeyboardInterrupt
    assert not (tmp_path / "stage.lease").exists()


def test_a_suspended_process_on_this_host_keeps_its_lock(tmp_path):
    """The system's lock knows that it is there, although its heartbeat is missing."""
    held, file = FORK.Event(), tmp_path / "stage.lock"
    process = FORK.Process(target=hold, args=(file, held))
    process.start()
    assert held.wait(30)
    os.kill(process.pid, signal.SIGSTOP)
    done = []
    waiter = threading.Thread(target=lambda: done.append(seconds_to_lock(file)))
    waiter.start()
    waiter.join(3 * SECONDS)
    assert not done and waiter.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    waiter.join(30)
    process.join()
    assert done


def test_the_systems_lock_of_a_host_that_is_gone_is_passed_over(tmp_path):
    """As on NFS 3, whose server keeps the locks of a client until that is back."""
    file = tmp_path / "stage.lock"
    killed_holder("node7", file)
    with filelock.FileLock(file):
        assert seconds_to_lock(file) < 20 * SECONDS


def test_other_errors_of_the_lock_file_are_raised(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), locked(tmp_path / "file" / "stage.lock", "works"):
        pass


def test_a_file_without_a_name_in_it_is_abandoned_too(tmp_path, network_disk):
    """A holder died between creating and writing it."""
    (tmp_path / "stage.lease").touch()
    assert seconds_to_lock(tmp_path / "stage.lock") < 10 * SECONDS


def test_a_guard_that_is_left_is_removed(tmp_path, network_disk):
    killed_holder("node7", tmp_path / "stage.lock")
    guard = Path(tmp_path / "stage.lease.removing")
    guard.touch()
    os.utime(guard, (0, 0))
    assert seconds_to_lock(tmp_path / "stage.lock") < 10 * SECONDS and not guard.exists()


def test_time_in_which_nothing_could_be_seen_does_not_count(tmp_path):
    """After a stall of the file system, its holder must have time for a heartbeat."""
    (tmp_path / "x").touch()
    now = [0.0]
    watch = leases._Watch(tmp_path / "x", lambda: now[0])
    assert watch.look() == 0
    now[0] += 0.1
    assert watch.look() == pytest.approx(0.1)
    now[0] += 1000
    assert watch.look() == pytest.approx(0.4)
    os.utime(tmp_path / "x", (1, 1))
    now[0] += 0.1
    assert watch.look() == 0


def test_a_lease_says_that_it_removes_an_abandoned_file(tmp_path, network_disk, caplog):
    killed_holder("node7", tmp_path / "stage.lock")
    with caplog.at_level(logging.WARNING):
        seconds_to_lock(tmp_path / "stage.lock")
    assert "Removing the abandoned lock" in caplog.text and "on node7" in caplog.text


def test_a_lease_that_is_not_held_has_nothing_to_release(tmp_path):
    Lease(tmp_path / "x").release()
