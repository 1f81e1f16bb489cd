"""The families of decoders, one file each: what they have that Llama has not, as a `Family` called FAMILY.

A new family is a new file here. May import: `profiles.models.family`.
"""
