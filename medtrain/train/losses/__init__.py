"""What training minimises, and the figures of it that a line of metrics shows.

outputs of TRL's fused head for a forward pass → one formula a file → `Computed`: the loss, and sums
whose quotients are the figures. Everything stays on the device: reading a number there would make
the host wait for all that it has launched. The arithmetic is that of TRL's trainers, which their
settings beyond the ones here still go through.
"""
