"""Which kernel is chosen for what, and what is said of it."""

from __future__ import annotations

import pytest

from medtrain.attention import Facts, Kernel, choose

_H100 = Facts((9, 0), bytes_each=2, head_dim=128, torch=(2, 13), flash_attn=False)


@pytest.mark.parametrize(
    ("changes", "kernel", "said"),
    [
        ({}, "varlen", ""),
        ({"flash_attn": True}, "varlen", ""),
        (
            {"torch": (2, 9)},
            "efficient",
            "2.9 has none, no flash: flash-attn is not installed",
        ),
        ({"torch": (2, 9), "flash_attn": True}, "flash", "no varlen: PyTorch 2.9 has none"),
        ({"bytes_each": 4}, "efficient", "no varlen: it computes in 16 bits only"),
        ({"capability": (7, 0)}, "efficient", "a GPU of compute capability 7.0 is too old"),
        ({"head_dim": 512}, "efficient", "it takes no heads of 512 elements"),
        ({"head_dim": 100}, "efficient", "it takes no heads of 100 elements"),
        ({"capability": None}, "rows", "no GPU"),
    ],
)
def test_the_best_that_fits_is_chosen(
    changes: dict[str, object], kernel: Kernel, said: str
) -> None:
    best = choose(_H100._replace(**changes))[0]
    assert best.kernel == kernel
    assert said in best.reason
    assert bool(said) == bool(best.reason)


def test_row_by_row_is_always_left() -> None:
    assert [choice.kernel for choice in choose(_H100)] == ["varlen", "efficient", "rows"]


def test_what_was_asked_for_is_kept() -> None:
    facts = _H100._replace(flash_attn=True)
    assert [c.kernel for c in choose(facts, "sdpa")] == ["varlen", "efficient", "rows"]
    assert [c.kernel for c in choose(facts, "flash_attention_2")] == ["flash"]
    assert choose(_H100, "flash_attention_2") == []
    assert choose(_H100._replace(capability=None), "flash_attention_2") == []


def test_a_choice_says_what_it_is() -> None:
    said = str(choose(_H100._replace(torch=(2, 9)))[0])
    assert said.startswith(
        "efficient (PyTorch's memory-efficient attention, one call for all rows)"
    )
    assert "; no varlen: PyTorch 2.9 has none" in said
