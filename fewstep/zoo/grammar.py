"""What the zoo's text encoders learn before they see a picture: to bind each attribute to its object, in reading order.

A large teacher comes with a text encoder that knows language. Without one, a small teacher learns a bag of words first: after
500,000 pictures the first zoo still drew every relation at random. Reading is learned here from captions alone, in a minute.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.zoo.sprites import BACKGROUNDS, COLOURS, SHAPES, SIZES, parse

_RELATIONS = ("left", "right", "above", "below")
# What a reader should know at a word: of the object named last, of the first one, of how the first lies to the second.
QUESTIONS = {
    "size": len(SIZES),
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "first colour": len(COLOURS),
    "first shape": len(SHAPES),
    "relation": len(_RELATIONS) + 1,
    "background": len(BACKGROUNDS),
}
UNASKED = -100
_KINDS = {"size": SIZES, "colour": tuple(COLOURS), "shape": SHAPES, "background": tuple(BACKGROUNDS)}
_WORDS = {word: (question, i) for question, words in _KINDS.items() for i, word in enumerate(words)}


def answers(caption: str, words: list[str]) -> list[list[int]]:
    """What can be known at each of the caption's words: (words, questions), -100 where nothing can."""
    if not caption:
        return [[UNASKED] * len(QUESTIONS) for _ in words]
    claim = parse(caption)
    known: dict[str, int] = {}
    found, nouns = [], 0
    for word in words:
        if word == "a":
            known = {k: v for k, v in known.items() if k not in ("size", "colour", "shape")}
        if word in _WORDS:
            question, answer = _WORDS[word]
            known[question] = answer
            nouns += question == "shape"
        if nouns == 1 and "relation" not in known and len(claim.nouns) > 1 and (word in _RELATIONS or word == "and"):
            known["relation"] = _RELATIONS.index(word) if word in _RELATIONS else len(_RELATIONS)
            known["first colour"], known["first shape"] = known["colour"], known["shape"]
        if word in BACKGROUNDS:  # the sentence is over: the object named last is asked for again
            known |= {question: answer for question, answer in map(_WORDS.__getitem__, claim.nouns[-1])}
        found.append([known.get(question, UNASKED) for question in QUESTIONS])
    return found


class Pupil(nn.Module):
    """A text encoder with linear heads that are asked QUESTIONS at every word; the heads are thrown away afterwards.

    text: what is trained, under the name a checkpoint keeps. asked: answers (N, L, questions)."""

    def __init__(self, text: nn.Module, width: int, asked: Tensor) -> None:
        super().__init__()
        self.text, self.heads, self.asked = text, nn.Linear(width, sum(QUESTIONS.values())), asked

    def loss(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Mean cross-entropy of the questions at the states hidden (B, L, width) of captions `rows`."""
        logits = self.heads(hidden).split(list(QUESTIONS.values()), -1)
        asked = self.asked[rows].long()
        each = [F.cross_entropy(x.flatten(0, 1), asked[..., i].flatten(), ignore_index=UNASKED) for i, x in enumerate(logits)]
        return torch.stack(each).mean()
