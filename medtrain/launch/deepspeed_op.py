"""DeepSpeed's shared-memory op for CPUs, compiled before several processes ask for it at once.

`build` in the launcher → this module as a process of its own → under a lock: a compiler's mark
that a killed process left is removed, and the op is loaded, which compiles it unless that was done
(20 s on one core; 1 s where it was).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from medtrain.errors import BadNodeError
from medtrain.locks import waiting

_BUILDER = "ShareMemCommBuilder"
_LONGEST_BUILD_S = 300.0
_PAUSE_S = 0.5


def build(environment: Mapping[str, str]) -> None:
    """Have the op ready for processes with this environment.

    Raises:
        BadNodeError: it cannot be compiled here.
    """
    command = [sys.executable, "-m", "medtrain.launch.deepspeed_op"]
    done = subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise BadNodeError(
            f"DeepSpeed's op for CPUs cannot be compiled here: {last}",
            fix="Install g++ (Debian: apt-get install g++; ninja comes with deepspeed), or set "
            "train.strategy=ddp.",
        )


def main() -> None:
    """Compile and load the op, one process at a time."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder(_BUILDER)
    if not builder.is_compatible(verbose=False):
        return  # DeepSpeed does without it
    directory = Path(_get_build_directory(builder.name, verbose=False))
    with waiting(directory.parent / f"{builder.name}.medtrain.lock", 2 * _LONGEST_BUILD_S):
        _remove_left_mark(directory / "lock")
        builder.load()


def _remove_left_mark(mark: Path) -> None:
    """Wait for whoever compiles, or for the time after which nobody can.

    torch marks a build by a file, and waits for its end for ever: also where a process was killed
    in the middle of it.
    """
    while mark.exists():
        if time.time() - mark.stat().st_mtime > _LONGEST_BUILD_S:
            mark.unlink(missing_ok=True)
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    main()
