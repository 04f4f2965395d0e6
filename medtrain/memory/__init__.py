"""How much memory training takes, before anything is loaded.

model.base → its architecture (medtrain.memory.architecture) → bytes on one GPU for a strategy
(medtrain.memory.estimate) → the cheapest strategy that fits (medtrain.memory.choose). `measure`
counts what a training really takes, to hold the estimate against it.
"""

from medtrain.memory.architecture import Architecture, architecture_of
from medtrain.memory.choose import Choice, choose_strategy, choose_under, strategies_for
from medtrain.memory.estimate import Estimate, estimate
from medtrain.memory.work import Work, optimizers_of, sides_of, work_of

__all__ = [
    "Architecture",
    "Choice",
    "Estimate",
    "Work",
    "architecture_of",
    "choose_strategy",
    "choose_under",
    "estimate",
    "optimizers_of",
    "sides_of",
    "strategies_for",
    "work_of",
]
