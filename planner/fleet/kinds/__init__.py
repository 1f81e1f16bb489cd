"""The kinds of fleets: how each is searched, what its plan states, and what it is compared with."""
