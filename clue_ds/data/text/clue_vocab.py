"""CLUE's rule that reduces Google's Chinese vocabulary of 21,128 tokens to 8,021, as code.

Kept: simplified characters, English letters and `##` pieces, digits, and a few numbers.
Dropped: traditional characters, `##` pieces of Han characters (they can never match, because every
Han character is a word by itself), kana, Hangul, zhuyin, emoji, English words, and other numbers.

Guarantee: for Google's vocabulary the result equals CLUE's published one, line by line
(tests/test_vocab.py). CLUE converted with another tool than OpenCC, so the 103 characters on which
the two tools differ are listed here. Of the 132 tokens that CLUE dropped by hand, the 90 that no
general rule drops are listed too.

Tokens keep their order; quotation marks and frequent numbers are inserted where CLUE has them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from clue_ds.data.text.special_tokens import is_special

# OpenCC 1.4 converts these to other simplified characters; the tool that CLUE used doesn't.
KEPT_HAN = frozenset(
    "佔侷俬倖僱剷勳唸喫嗰嚐囉夥孃峯崑崙巖弔彫彿悽慾拚捱捲擡敎昇暐査槓樑樫歎殭氾汎洩湧溼滙燻"
    "牴璿甕痠癒癡眞祕稜箇篠籤紮絃綑羣羨脣脩舖菸蒐蓆蔘薑薹蝨蠍蠔証諡譁讚豔蹟遶醃醣釦鍊鎌鑑閒"
    "闇闢陞霑頫餵鵰麴"
)
# The tool that CLUE used converts these; OpenCC doesn't.
DROPPED_HAN = frozenset("余垵幺瞭著藉衹覆阪")

DROPPED_BY_HAND = frozenset(
    (
        "ᗜ ㄨ ##℃ ##★ ##～ ##° ～～ ×× ##☆ ↓↓↓ ##● １０ ##㎡ ##♪ ##× ～～～ ##｜ "
        "##ｄ ##００ ##▲ ##ｏ ★★ ##→ ⋯⋯ ##▼ ##○ １１ ２０ ★★★★★ １２ ##∥ ##◆ ##ω "
        "★★★ ##ｃ ３０ ##ｓ ##ｅ ##ｐ ##■ ##↑ ##ｋ ##и ◆◆ ##ｇ １５ ##＋ ##а ##◎ "
        "##─ ##ｒ ##＞ ##² ##ｔ ★★★★ ##│ ##ｎ ##ｌ ##＝ １４ ##ｙ ☆☆☆ ##ｉ ##↓ ˋ▽ˊ "
        "##ｖ ↓↓ ２４ ##f2016 ##ｑ ##₂ ５０ １３ １６ ∟∣ ##я ##← ##◆◆ ##ｘ ##１０ "
        "##cm～ １８ ##ᗜ ##ㄨ ##ｆ ##ｈ ##ｊ ##ｕ ##ｗ ##ｚ "
    ).split()
)

# After which token CLUE inserts which tokens.
INSERTED: dict[str, tuple[str, ...]] = {
    '"': ("“", "‘"),
    "9": (*map(str, range(10, 101)), *map(str, range(2016, 2023))),
}

_HAN = re.compile("[\u4e00-\u9fff]")
_OTHER_SCRIPTS = {
    "kana": re.compile("[\u3040-\u30ff\uff71-\uff9d]"),
    "Hangul": re.compile("[\u1100-\u11ff\uac00-\ud7af]"),
    "zhuyin": re.compile("[\u3105-\u3126]"),
    "emoji": re.compile("[©®™↔↗↘▪▫▶☀☕☺♀♂♠♣♥♦✈✔✖✨❤👍🔥😂😎]"),
}
_LETTERS = re.compile("[a-z]")
_FULL_WIDTH_LETTERS = re.compile("[ａ-ｚ]")


class SlimVocab(NamedTuple):
    tokens: list[str]
    kept: Counter[str]  # number of tokens by kind
    dropped: Counter[str]  # number of tokens by reason


def slim_vocab(tokens: list[str]) -> SlimVocab:
    """Apply CLUE's rule to the tokens of a Chinese BERT vocabulary."""
    import opencc

    to_simplified = opencc.OpenCC("t2s").convert
    result: list[str] = []
    kept: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for token in map(str.strip, tokens):
        verdict = _verdict(token, to_simplified)
        if verdict in _KEPT_KINDS:
            result.append(token)
            kept[verdict] += 1
        else:
            dropped[verdict] += 1
        for added in INSERTED.get(token, ()):
            result.append(added)
            kept["inserted"] += 1
    return SlimVocab(result, kept, dropped)


_KEPT_KINDS = ("special", "simplified Han", "English", "digits", "other")


def _verdict(token: str, to_simplified: Callable[[str], str]) -> str:
    """The kind of a token that is kept (one of _KEPT_KINDS), or the reason why it is dropped."""
    if is_special(token):
        return "special"
    if not token:
        return "white space"
    if token in DROPPED_BY_HAND:
        return "by hand"
    is_piece = token.startswith("##") and len(token) > 2
    text = token[2:] if is_piece else token
    if _HAN.search(text):
        return _verdict_on_han(text, is_piece, to_simplified)
    for script, pattern in _OTHER_SCRIPTS.items():
        if pattern.search(text):
            return script
    if _FULL_WIDTH_LETTERS.search(text) and not is_piece:
        return "full-width letters"
    if _LETTERS.search(text):
        if is_piece:
            return "numbers" if text[0].isdigit() else "English"
        return "English" if len(text) == 1 else "English words"
    if re.search("[0-9]", text):
        return "digits" if len(text) == 1 else "numbers"
    return "other"


def _verdict_on_han(text: str, is_piece: bool, to_simplified: Callable[[str], str]) -> str:
    if is_piece:
        return "##Han"
    if text in DROPPED_HAN or (text not in KEPT_HAN and to_simplified(text) != text):
        return "traditional Han"
    return "simplified Han"
