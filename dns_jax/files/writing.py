"""Files that are written whole or not at all."""

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    r"""Writes a file under a temporary name, then moves it to its own.

    Args:
      path: the file, in a folder that exists.
      content: all of it; text is encoded as UTF-8.

    Raises:
      OSError: if it cannot be written; what was there before is then as it was.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_whole(Path(folder, 'tiny.txt'), 'σ')
      ...     Path(folder, 'tiny.txt').read_bytes()
      b'\xcf\x83'
    """
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        with temporary.open('wb') as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # A full disk's error has no file name of its own.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
