"""The commit that a result is of."""

import subprocess
from pathlib import Path


def describe_commit() -> str:
    """Names the commit the code stands at, marked where the code differs from it.

    Returns:
      What `git describe` says, or `unknown` where there is no git.
    """
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=12']
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:  # no git here, which must not fail a run at its end
        return 'unknown'
    return answer.stdout.strip() or 'unknown'
