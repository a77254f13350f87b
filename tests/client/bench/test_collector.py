"""What the garbage collector looks at while a load is put on a server."""

from __future__ import annotations

import gc

import pytest

from vqserve_bench.driver import run_loop


@pytest.fixture(autouse=True)
def nothing_set_aside():
    gc.unfreeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_what_was_there_before_is_set_aside_meanwhile(error):
    seen = []

    async def load():
        seen.append(gc.get_freeze_count())
        if error is not None:
            raise error

    for _ in range(2):
        if error is None:
            run_loop(load())
        else:
            with pytest.raises(error):
                run_loop(load())
        assert seen.pop() > 0
        assert gc.get_freeze_count() == 0


def test_what_the_caller_has_set_aside_stays_so():
    async def load():
        pass

    gc.freeze()
    run_loop(load())
    assert gc.get_freeze_count() > 0
