"""Plans for several devices: micro-batches by speed, one chain over which gradients are added, one simulator for all.

May import the planner and profiles; nothing of the runtime but its common words.
"""
