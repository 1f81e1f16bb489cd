"""What the page offers in place of typed paths: models and data under the roots, published shapes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tightfit.planner.service.wire.schema import ResponseBody, example_of

FilesKind = Literal["models", "data"]
FileKind = Literal["gguf", "folder", "bundle", "config", "jsonl", "csv", "parquet", "arrow"]

LLAMA = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30}
"""some of a config"""

UPLOADED = "upload:"
"""what stands before the id of an upload where a path may stand"""


def uploaded(data: str | None) -> str | None:
    """The id of the upload that is named as data; None: none is."""
    return data.removeprefix(UPLOADED) if data is not None and data.startswith(UPLOADED) else None


class FileUnderRoot(ResponseBody):
    """A model or data that a request may name by its `path`."""

    path: str = Field(description="relative to a root, as `path` of a profile and `data` of a run take it")
    name: str = Field(description="for people: of a file in the cache of the Hugging Face hub, the model's id there")
    kind: FileKind = Field(description="of data, folder: several files that are read as one")
    bytes: int = Field(description="of all its files")
    modified: float
    family: str | None = Field(None, description="of a model: model_type, or what the GGUF file calls its architecture")
    parameters: int | None = Field(None, description="of a model, where its headers say so")
    precision: str | None = Field(None, description="of a model: the type of most of its weights in the file")


class FilesAnswer(ResponseBody):
    model_config = example_of(
        roots=["models"],
        files=[
            {
                "path": "SmolLM2-135M-Instruct.Q4_1.gguf",
                "name": "SmolLM2-135M-Instruct.Q4_1",
                "kind": "gguf",
                "bytes": 91735360,
                "modified": 1790000000.0,
                "family": "llama",
                "parameters": 134515008,
                "precision": "Q4_1",
            }
        ],
        cut=False,
    )

    roots: list[str] = Field(description="names of the folders that are open to requests")
    files: list[FileUnderRoot]
    cut: bool = Field(description="whether there is more: too many files, or reading headers took too long")


class Shape(ResponseBody):
    """A published model's sizes, from which a profile can be made without its weights."""

    name: str
    family: str
    parameters: int
    layers: int
    config: dict[str, Any] = Field(description="as `config` of a request for a profile takes it")


class Gallery(ResponseBody):
    model_config = example_of(
        shapes=[
            {"name": "SmolLM2-135M", "family": "llama", "parameters": 134515008, "layers": 30, "config": LLAMA},
        ]
    )

    shapes: list[Shape]
