"""Captions of all sorts, the same for every run."""

import random

WORDS = [
    "cat", "dog", "heart", "ship", "apple", "tower", "robot", "cloud", "violin", "sunset", "lantern", "fox", "bridge",
    "astronaut", "teapot", "a", "the", "of", "in", "on", "red", "blue", "green", "dark-skinned", "photo-realistic",
    "4k", "painting", "by", "very", "isn't", "they're", "we'll",
]  # fmt: skip
# accents, scripts, emoji, signs that are no letters, white space of all kinds, what looks like special tokens
OTHERS = [
    "", " ", "\n\t", "   two  spaces ", "\xc0\xc9\xce\xd5\xdc \xf1 \xe7 \xdf", "na\xefve caf\xe9 r\xe9sum\xe9",
    "\u4e1c\u4eac \u5854 \u591c", "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5", "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645", "\u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e", "\U0001f44d\U0001f3fd thumbs up",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",
    "\U0001f3f3\ufe0f\u200d\U0001f308\U0001f1e9\U0001f1ea", "e\u0301 combining", "\ufb01 ligature \xbd \xb2 \u2122",
    "zero\u200bwidth\xa0space", "\u202eright to left", "a\x00b\x07c", "\ufeffbom", "CAPITALS and MiXeD",
    "1234567890 3.14", "$\u20ac\xa3\xa5 #@!?", "it's I'd you've we're he'll I'm don't", "'S 'T",
    "under_score-dash/slash\\back", "http://example.org/?q=a&b=c", "((nested)) [brackets]",
    "\u2581 metaspace \u2581\u2581", "<notspecial>", "##suffix", "\U0001f9d1\U0001f3ff\u200d\U0001f680",
    "\u1e9e \u0130 \u01c5", "tab\tand\r\nnewline",
]  # fmt: skip
ALPHABETS = (32, 97, 0x3B1, 0x4E00, 0x1F600)


def captions(count: int) -> list[str]:
    """Sentences, then every odd one, then random characters, and one of 10,000 characters."""
    chance = random.Random(7)
    found = [*OTHERS, " ".join(WORDS * 200)[:10_000]]
    while len(found) < count:
        words = chance.choices(WORDS, k=chance.randint(1, 40))
        kind = chance.random()
        if kind < 0.15:
            words.insert(chance.randrange(len(words)), chance.choice(OTHERS))
        elif kind < 0.25:
            words = ["".join(chr(chance.choice(ALPHABETS) + chance.randrange(40)) for _ in range(12))]
        elif kind < 0.3:
            codes = [chance.randrange(1, 0x2FFFF) for _ in range(20)]
            words = ["".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)]
        found.append(chance.choice((" ", "  ", ", ")).join(words))
    return found[:count]
