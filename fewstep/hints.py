"""Slips of the pen: what a mistyped word may have meant, and YAML in which a key is given once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import yaml


def hint(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses a word: the nearest known one, or nothing where none is near."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), list(names), n=1)
    return f"; did you mean {names[near[0]]}?" if near else ""


class _Once(yaml.SafeLoader):
    """YAML in which a key may be given once. Looked at as it is written: merged mappings (<<) repeat keys rightfully."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.YAMLError(f"key {key.value!r} is given twice (line {key.start_mark.line + 1}); keep one")
            seen.add(key.value)
        return node


def read_yaml(text: str) -> Any:
    """Plain data of a YAML text. Raises yaml.YAMLError where it is none, or a key is given twice in one place."""
    return yaml.load(text, _Once)  # a SafeLoader
