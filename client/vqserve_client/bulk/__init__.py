"""Jobs over data sets: files of latents to files of tokens, and back. A job that was stopped goes on where it was.

`encode` and `decode` do what `vqserve encode SRC... -o OUT` and `vqserve decode` do. Readers and writers of your own
are objects with the members of `Reader` and `Writer`; `add_reader` and `add_writer` register them.
"""

from vqserve_client.bulk.dataset import JobOptions, Summary, decode, encode
from vqserve_client.bulk.parts import Limits, TooManyErrors
from vqserve_client.conversion import ConversionOptions
from vqserve_data.errors import FileError, MissingLibrary
from vqserve_data.items import BadItem, Entry, Item, RawItem
from vqserve_data.readers import add_reader
from vqserve_data.readers.protocol import Reader, Selection, SourceFile
from vqserve_data.writers import add_writer
from vqserve_data.writers.protocol import Shard, Writer, Written

__all__ = [
    "BadItem",
    "ConversionOptions",
    "Entry",
    "FileError",
    "Item",
    "JobOptions",
    "Limits",
    "MissingLibrary",
    "RawItem",
    "Reader",
    "Selection",
    "Shard",
    "SourceFile",
    "Summary",
    "TooManyErrors",
    "Writer",
    "Written",
    "add_reader",
    "add_writer",
    "decode",
    "encode",
]
