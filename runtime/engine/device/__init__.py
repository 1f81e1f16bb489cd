"""What the engine asks of a device (`Device`), transfers to and from disk (channel, spill file), and the memory meter.

The devices themselves have rooms of their own, `engine.cpu` today. May import: `runtime.common`.
"""
