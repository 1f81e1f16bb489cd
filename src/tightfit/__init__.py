"""tightfit: fit training into the memory you have."""
