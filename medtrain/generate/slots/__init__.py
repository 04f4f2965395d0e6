"""Decoding in slots: how a GPU answers, many rows a step and the host out of the way.

A fixed number of rows ("slots") of fixed length; every row begins at position 0 of its slot and
goes on for itself, so a step is the same work whatever is in it and can be recorded once and
replayed. What a row computes depends on the number of slots and their length, and on no neighbour.

sizes      how long slots are, and how many of them a card holds
cache      the slots' keys and values, and those of prompts on their way there
attention  one new token a row, over its slot
stepper    one step of all slots: forward, draw, stop test, bookkeeping, all on the device
recorded   the step as a CUDA graph, or as it is
fitting    which models this is for, and a small try on the device before it is trusted
decoder    units of prompts → slots → finished answers, slot by slot refilled
"""
