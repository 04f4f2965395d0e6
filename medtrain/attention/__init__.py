"""Attention over rows that lie side by side in one sequence, by the best kernel that there is.

`choice` says, from facts alone and without PyTorch, which kernels can compute it and why the
others cannot; `families`, which models' rows can be packed; `kernels` has them; `trial` tries a
kernel once on the device before it is trusted; `packed` is what transformers calls.
"""

from medtrain.attention.choice import Choice, Facts, Kernel, choose, installed_facts

__all__ = ["Choice", "Facts", "Kernel", "choose", "installed_facts"]
