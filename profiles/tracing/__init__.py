"""From an `nn.Module` and a sample batch to layers and programs of operators, and whether they compute what autograd does.

May import: `profiles.schema`, `runtime.engine`.
"""
