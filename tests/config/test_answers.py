from __future__ import annotations

import pytest
from pydantic import ValidationError

from medtrain.config import EvaluateConfig, GenerateConfig


@pytest.mark.parametrize(
    ("engine", "together"), [("transformers", 16), ("vllm", 256), ("openai", 16)]
)
def test_auto_lays_together_what_its_engine_wants(engine: str, together: int) -> None:
    assert GenerateConfig(engine=engine).prompts_together == together  # type: ignore[arg-type]
    assert EvaluateConfig(engine=engine, batch_size=5).prompts_together == 5  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -1, "many", None])
def test_a_batch_size_is_a_number_or_auto(size: object) -> None:
    with pytest.raises(ValidationError, match="batch_size"):
        GenerateConfig(batch_size=size)  # type: ignore[arg-type]
