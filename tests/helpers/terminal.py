"""A terminal, for tests of what is shown on one."""

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
import threading


@contextlib.contextmanager
def terminal(monkeypatch):
    """Makes standard error a terminal; what was written there is in the list afterwards."""
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack('4H', 24, 200, 0, 0))
    seen = []

    def read():
        with contextlib.suppress(OSError):  # at its end
            while part := os.read(main, 4_096):
                seen.append(part.decode())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(end, 'w') as stderr, monkeypatch.context() as patch:
            patch.setattr(sys, 'stderr', stderr)
            yield seen
    finally:
        reader.join()
        os.close(main)
