"""The supported families of decoders, one file each, which defines its differences from Llama as a `Family` called
FAMILY.

A new family is a new file here; it is found without being registered. May import: `profiles.models.family`.
"""
