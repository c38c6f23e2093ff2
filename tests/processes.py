"""Runs work in a forked child of this process, which must not hang."""

from __future__ import annotations

import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable
from typing import Any

import pytest

can_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_forked_child(work: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What `work` returns in a forked child. A child that raises, dies or hangs fails the test."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reads)
            try:
                answer = True, work()
            except BaseException:
                answer = False, traceback.format_exc()
            with os.fdopen(writes, "wb") as file:
                pickle.dump(answer, file)
            status = 0
        finally:
            os._exit(status)  # neither pytest nor anything else of the parent's goes on here
    os.close(writes)
    with os.fdopen(reads, "rb") as file:
        ready, _, _ = select.select([file], [], [], seconds)
        if not ready:
            os.kill(child, signal.SIGKILL)
        answer = file.read()
    _, status = os.waitpid(child, 0)
    assert ready, f"the forked child hung for {seconds} seconds"
    assert status == 0, f"the forked child ended with {os.waitstatus_to_exitcode(status)}"
    returned, value = pickle.loads(answer)
    assert returned, value
    return value
