"""Steps that can be profiled: of a decoder with its adapter, of a module, of a side network beside a decoder.

Each is a class that says which options it does not take, traces itself, and knows what the profile says of its model.
May import: sources, models, tracing.
"""
