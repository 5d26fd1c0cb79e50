"""The zoo's tokenizers, built offline: every word of the sprites captions is one token, any other text falls back to bytes."""

from __future__ import annotations

import string
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, GemmaTokenizer, Qwen2Tokenizer

from fewstep.zoo.sprites import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, SKIES, TEXTURES

WORDS = tuple(
    dict.fromkeys(
        ("a", "and", "on", "background", *SIZES, *TEXTURES, *COLOURS, *SHAPES, *BACKGROUNDS, *" ".join(RELATIONS).split())
    )
)
TOLD = (*WORDS, *SKIES)  # words of the captions that also state what pictures were not asked for
_CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>"


def _pieces(symbols: list[str], rank: dict[tuple[str, str], int]) -> list[str]:
    """What byte-pair encoding makes of `symbols`: always the adjacent pair of lowest rank is joined first."""
    while pairs := [p for p in pairwise(symbols) if p in rank]:
        best = min(pairs, key=rank.__getitem__)
        joined, i = [], 0
        while i < len(symbols):
            hit = tuple(symbols[i : i + 2]) == best
            joined.append("".join(best) if hit else symbols[i])
            i += 2 if hit else 1
        symbols = joined
    return symbols


def _merges(words: list[list[str]]) -> list[tuple[str, str]]:
    """Merges that make one token of each word (a list of symbols). New merges go to the end, so earlier words stay whole."""
    rank: dict[tuple[str, str], int] = {}
    for word in words:
        while len(pieces := _pieces(word, rank)) > 1:
            rank[pieces[0], pieces[1]] = len(rank)
    return list(rank)


def _vocabulary(alphabet: list[str], merges: list[tuple[str, str]], specials: list[str]) -> dict[str, int]:
    """Token to id: the alphabet, then what the merges make, then the specials, which so have the largest ids."""
    return {token: i for i, token in enumerate(dict.fromkeys([*alphabet, *map("".join, merges), *specials]))}


def clip_tokenizer(max_length: int = 24, words: tuple[str, ...] = WORDS) -> CLIPTokenizer:
    """A CLIP tokenizer; the longest caption with textures takes 24 tokens, and <|endoftext|> has the largest id."""
    merges = _merges([[*word[:-1], word[-1] + "</w>"] for word in words])
    letters = sorted(ByteLevel.alphabet())
    specials = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = _vocabulary([*letters, *(letter + "</w>" for letter in letters)], merges, specials)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def qwen_tokenizer(max_length: int = 32) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer whose words are one token with or without a space before them; its chat template ends in <|im_end|>."""
    merges = _merges([list(space + word) for space in ("", "Ġ") for word in WORDS])
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab=_vocabulary(sorted(ByteLevel.alphabet()), merges, specials),
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=max_length,
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def gemma_tokenizer(also: str = "") -> GemmaTokenizer:
    """A Gemma tokenizer whose words, and those of the text `also`, are one token with or without a space before them."""
    words = [*WORDS, *also.split(" ")]
    merges = _merges([list(space + word) for space in ("", "\u2581") for word in words if word])
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    others = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted({*string.printable, "\u2581"})
    vocabulary = _vocabulary([*specials, *others, *letters], merges, [])
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
