"""DeepSpeed's op is ready before processes ask for it, or it is said why it cannot be."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from medtrain.errors import BadNodeError
from medtrain.launch import deepspeed_op

SURROUNDINGS = {**os.environ, "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}


def test_without_a_compiler_it_says_what_to_install(tmp_path: Path) -> None:
    lacking = {**SURROUNDINGS, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    with pytest.raises(BadNodeError, match="cannot be compiled") as refused:
        deepspeed_op.build(lacking)
    assert "g++" in refused.value.fix


def test_a_mark_that_a_killed_compiler_left_blocks_nobody(tmp_path: Path) -> None:
    mark = tmp_path / "lock"
    mark.touch()
    os.utime(mark, (0, time.time() - 3600))
    deepspeed_op._remove_left_mark(mark)
    assert not mark.exists()
