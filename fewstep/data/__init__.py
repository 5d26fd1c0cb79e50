"""Data: prompts, captioned images, and their encodings by the teacher, kept on disk."""

from fewstep.data.cache import cached, default_cache
from fewstep.data.fingerprint import digest, fingerprint
from fewstep.data.images import ImageSet, read_images
from fewstep.data.pairs import CHUNK, Pairs
from fewstep.data.prompts import read_prompts
from fewstep.data.source import ENCODED_AT_ONCE, Buckets, Source, open_source

__all__ = [
    "CHUNK",
    "ENCODED_AT_ONCE",
    "Buckets",
    "ImageSet",
    "Pairs",
    "Source",
    "cached",
    "default_cache",
    "digest",
    "fingerprint",
    "open_source",
    "read_images",
    "read_prompts",
]
