"""What a block of code takes of Python's memory."""

import contextlib
import tracemalloc


@contextlib.contextmanager
def takes_less_than(limit):
    """Asserts that a block never holds as many bytes at one time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
