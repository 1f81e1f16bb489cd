"""What the engine asks of a device (`Device`), and what stands between it and the disk: channel, spill file, meter.

The devices themselves have rooms of their own, `engine.cpu` today. May import: `runtime.common`.
"""
