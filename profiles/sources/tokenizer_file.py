"""Says where a model's tokenizer lies, and loads it. The library `tokenizers` is imported by the process that loads it
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tightfit.profiles.sources.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """Where a model's tokenizer lies."""

    kind: Literal["directory", "bundle", "gguf"]
    path: str
    """of the GGUF file, or of the folder that has tokenizer.json"""

    def vocabulary(self) -> Vocabulary | None:
        """Load the tokenizer into this process; None if it is gone. Raises InputError for a damaged one."""
        path = Path(self.path)
        if self.kind == "gguf":
            from tightfit.profiles.sources.gguf_tokenizer import gguf_vocabulary

            return gguf_vocabulary(path)
        from tightfit.profiles.sources.directory_tokenizer import directory_vocabulary, read_vocabulary

        return read_vocabulary(path) if self.kind == "bundle" else directory_vocabulary(path)
