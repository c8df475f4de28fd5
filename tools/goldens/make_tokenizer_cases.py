"""Trains a small SentencePiece model of T5's kind and writes odd strings with the ids that sentencepiece gives them.

    python make_tokenizer_cases.py --out tests/goldens/tokenizer

`spiece.model`: unigram, nmt_nfkc, no byte fallback, pad 0, end 1, unknown 2, as in T5. `cases.jsonl`: 500 lines
`{"text": …, "ids": […]}`, without the end token. The corpus is made up here, so a second run writes the same bytes.
"""

import argparse
import io
import json
import random
from pathlib import Path

import sentencepiece

VOCABULARY = 1000
CASES = 500
SENTENCES = 6000

NOUNS = """animal apple arm artist balloon bear beach bicycle bird boat book bottle box bridge building butterfly camera
candle car castle cat chair child church city clock cloud coat coffee cook cow crystal cup dancer desert dog dolphin
door dragon dress drone eagle elephant engine eye face farmer field finger fire fish flag flame flower forest fox frog
garden girl glass glove guitar hair hand hat helmet hill horse house island jellyfish jungle kitchen kitten lake lamp
leaf light lion machine man market mirror monkey moon mountain mouse night ocean owl painting panda paper path penguin
person phone piano picture planet puppy rabbit rain reflection river road robot rock roof rose ship shadow shoe skateboard
sky snow soldier spaceship spider star station statue storm street sun surfer table teacher tiger tower train tree
umbrella valley village violin wall watch water waterfall wave whale wheel wind window wing wolf woman wood world""".split()
ADJECTIVES = """abstract ancient beautiful big black blue bright broken brown calm cinematic clear cold colourful cosy dark
deep detailed distant dramatic dry empty fast foggy frozen futuristic gentle giant glowing golden gray green heavy high
huge hyperrealistic large lonely long loud lush magical misty modern mysterious narrow neon old orange pale photorealistic
pink purple quick quiet rainy red round rusty shallow sharp shiny silver slow small snowy soft stormy strange sunny sunlit
tall thick thin tiny transparent underwater vibrant vintage violet warm wet white wide wild wooden yellow young""".split()
VERBS = """bounce break burn carry catch chase climb dance dive dream drift drink drive drop eat explode explore fall float
fly follow glide grow hold hover jump laugh lean lift look melt move open paint play pour pull push race read rest ride
rise roll rotate run sail shake shine sing sit skate sleep slide smile spin splash stand stare surf swim swing talk throw
travel turn walk watch wave whisper write""".split()
PLACES = (
    "above across against along around behind beside beyond in inside into near on over through towards under".split()
)
STYLES = """a close-up of|a wide shot of|a slow-motion video of|an aerial view of|a 4K documentary about|a time-lapse of|a
tracking shot of|an oil painting of|a macro photograph of|a black-and-white film about|handheld footage of""".replace(
    "\n", " "
).split("|")
OTHER_SCRIPTS = """café naïve façade piñata jalapeño crème brûlée über schön Straße Ångström smörgåsbord déjà vu São Paulo
Łódź Kraków Zürich Gdańsk Málaga coração garçon Öresund tromsø fjörd háček Dvořák İstanbul
καλημέρα κόσμε θάλασσα ουρανός φως το ήλιος σκιά και νερό
красный мяч движется налево синее небо над морем снег идёт ёлка город ночью
赤い 風船 が 空 を 飛ぶ 猫 と 犬 夜 の 東京 ロボット カメラ
红色 的 球 向左 移动 天空 中国 山水 城市 夜晚""".split()


def corpus(rng):
    """English-like sentences, some with numbers, and a share of other scripts."""

    def verb():
        word = rng.choice(VERBS)
        stem = word[:-1] if word.endswith("e") else word
        return rng.choice([word, word + "s", stem + "ing", stem + "ed"])

    def noun():
        return rng.choice(NOUNS) + rng.choice(["", "", "s", "'s"])

    for _ in range(SENTENCES):
        words = [
            rng.choice(["a", "the", "one", "some", rng.choice(STYLES) + " a"]),
            rng.choice(ADJECTIVES),
            noun(),
            verb(),
        ]
        words += [rng.choice(PLACES), rng.choice(["a", "the"]), rng.choice(ADJECTIVES), noun()]
        if rng.random() < 0.3:
            words += ["with", str(rng.randrange(10 ** rng.randint(1, 4))), rng.choice(ADJECTIVES), noun()]
        if rng.random() < 0.4:
            words += rng.sample(OTHER_SCRIPTS, rng.randint(1, 5))
        sentence = " ".join(words)
        if rng.random() < 0.5:
            sentence = sentence[0].upper() + sentence[1:]
        yield sentence + rng.choice(["", ".", ".", "!", "?", ', (8K) "HDR";', " - 35mm: f/1.4 & more"])


def train(rng):
    model = io.BytesIO()  # a path would end up inside the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(rng),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCABULARY,
        character_coverage=0.9995,
        normalization_rule_name="nmt_nfkc",
        byte_fallback=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


# Whole cases. What sentencepiece treats in its own way is spelled out in escapes.
PLAIN = """a red ball moving left on a black background|A blue triangle, rising: over a navy background!|THE QUICK BROWN FOX
|camelCase snake_case kebab-case|don't can't won't it's|3.14159 1,000,000 -42 +7 1e-9 50% $9.99|f/1.4 35mm 4K 8K 24fps 16:9
|http://example.org/path?q=1&r=2#top|user@example.org|#hashtag @name ~tilde `code` ^caret|(((nested))) [[lists]] {{braces}}
|"double" 'single' «guillemets» „low“ “curly” ‘quotes’ ‚one‛|C:\\dir\\file.txt|a/b\\c|<b>bold</b>|{"key": [1, 2, null]}
|...|…|!!!???|-- – — ―|a.b.c.d|e.g. i.e. etc.|1st 2nd 3rd|x² + y² = z²|½ cup ⅓ tsp ¼|5′ 10″|20 °C 68 °F|© ® ™ § ¶ † ‡|€ £ ¥ ¢ ₽ ₿
|→ ← ↑ ↓ ⇒ ∀ ∃ ∑ ∫ √ ∞ ≈ ≠ ≤|the the the the|antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis
|qwxzjkvb|zzzzzzzzzzzzzzzz|aAaAaAaA|0000000000|1234567890|٠١٢٣٤٥٦٧٨٩ ۰۱۲ १२३|０１２３４５|Ⅰ Ⅱ Ⅲ Ⅳ Ⅻ ⅰ ⅱ ⅻ ↀ|① ② ⑳ ⒈ ⒜ ⓐ Ⓩ ㉑ ㊿
|㎞ ㎏ ㎡ ㎥ ㏄ ㏑ ㎧ ㎐ ㏂|㈱ ㊗ ㋿ ㍻ ㌔ ㌫ ㍿|ﬁ ﬂ ﬀ ﬃ ﬄ ﬅ ﬆ|ĳ ŀ ŉ ǆ ǉ ǌ|ＦＵＬＬ　ｗｉｄｔｈ！？＠＃|ｱｲｳｴｵ ｶﾞｷﾞ ﾊﾟﾋﾟ ｰ ｡｢｣､･|\u30ab\u309b \u30ab\u3099 \uff76\uff9e \u30cf\u309c \u30cf\u309a|ﾡ ﾢ ￂ ￨ ￩ ￭
|caf\u00e9|cafe\u0301|\u00c5ngstr\u00f6m A\u030angstro\u0308m \u212bngstrom|\u01d6 u\u0308\u0304 \u00fc\u0304|q\u0323\u0307 q\u0307\u0323|\u00c5 \u212b \u03a9 \u2126 K \u212a|a\u0310e\u0301o\u0308\u0332|𝐁𝐨𝐥𝐝 𝑖𝑡𝑎𝑙𝑖𝑐 𝔉𝔯𝔞𝔨 𝕯 𝟙𝟚𝟛 ℌ ℝ ℵ ℓ|ᵃᵇᶜ ₁₂₃ ⁴⁵⁶ ª º
|한국어 문장|\u1112\u1161\u11ab\u1100\u116e\u11a8|\uac01 \u1100\u1161\u11a8 \u1100 \u3131 \uffa1|\uac00\uac01\uac02\u1100\u1160|日本語のテキスト|汉字和漢字|\uf900 \uf901 \uf902 \U0002f800|⼀ ⺟ ⻳|〇 々 〆 ヶ ゟ ヿ|「括弧」【】〈〉《》・ー〜～
|العربية نص|ﺎﻟﻌﺮﺑﻴﺔ|ﷲ ﷺ ﻻ ﻵ|مُحَمَّد|עברית טקסט|\ufb2c \ufb21 \ufb4f \ufb2f|हिन्दी क्षि ज्ञ|தமிழ் ไทย ำ ລາວ ຳ|ქართული Հայերեն և|ተግባር ᚠᚢᚦ Ꭰ
|красный мяч|КРАСНЫЙ МЯЧ \u0451 \u0435\u0308 \u0439 \u0438\u0306|καλημέρα ΚΌΣΜΕ ς σ ϐ ϑ ϕ ϖ|\u03ac \u1f71 \u1fb6 \u1fb3 \u0390 \u1fd3|\u017f \u212a \u212b \u1e9e ß|\u0130 i\u0307 ı I
|😀|😀😀😀|👍🏽 👍|👨‍👩‍👧‍👦 👩‍🚀 🏳️‍🌈|🇫🇷🇯🇵 🇺|❤️ ❤ ☎︎ ☎️|1️⃣ #️⃣ *️⃣|🏴󠁧󠁢󠁥󠁮󠁧󠁿|🫠🪿🧌|a😀b a 😀 b|☃ ★ ♫ ✓ ✗ ⚡|𓀀 𒀀 𐍈 𠀋 𪚥 🀄 🂡""".split(
    "|"
)

# Around the pieces that the model or its users treat as special; to sentencepiece they are ordinary text.
SPECIAL = (
    """▁ ▁▁ ▁▁▁a a▁b ▁red▁ball red▁ball _ __ <unk> </s> <pad> <s> <extra_id_0> <extra_id_99> <0x41> <0xFF> a</s>b
red<pad>ball <unk><unk> ⁇ ▂""".split()
    + ["▁ red", "red ▁", " ▁ ", "the </s> end", "<unk> ball </s>", "a <pad> b", "< / s >", "</S>", " ⁇ "]
)

# Every kind of space, line end, format, control and special code point, alone and between words.
POINTS = {
    "space": " \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\u180e",
    "line": "\t\n\v\f\r\u0085\u2028\u2029",
    "format": "\u00ad\u034f\u061c\u115f\u17b4\u200b\u200c\u200d\u200e\u200f\u202a\u202e\u2060\u2061\u2066\u2069\ufeff\U000e0001\U000e0041",
    "control": "\x00\x01\x02\x07\x08\x0e\x1b\x1f\x7f\x80\x8f\x90\x9f",
    "variation": "\ufe00\ufe0e\ufe0f\U000e0100\u180b",
    "special": "\ufffc\ufffd\ufffe\uffff\ufdd0\ue000\uf8ff\U000f0000\U0010fffd\U0010ffff\U0001fffe",
    "combining": "\u0300\u0301\u0308\u0327\u0345\u20d0\u20e3\u3099\u309a\u1ab0",
}


def whole_cases():
    yield ""
    yield from (text.replace("\n", "") for text in PLAIN)
    yield from SPECIAL
    for points in POINTS.values():
        for point in points:
            yield point
            yield f"red{point}ball"
        yield points
        yield f"{points}red{points}ball{points}"
    for space in (" ", "  ", "     ", "\t", "\n", "\u3000", "\u00a0 "):
        yield f"{space}a red ball"
        yield f"a red ball{space}"
        yield f"{space}a{space}red{space}ball{space}"
    yield from (
        "a\nb",
        "a\r\nb",
        "a\rb",
        "a\n\nb",
        "a \n b",
        "\r\n",
        "a\x00b\x00",
        "\x00 \x00",
        "e\u0301",
        "\u0301e",
        " \u0301",
        "a\u200d",
    )
    # Long words and lines: the lattice may not be quadratic in them, nor cut them.
    yield from ("a" * 1000, "ball" * 250, "\u1e9b\u0323" * 200, "😀" * 500, "é" * 1000, "x1" * 500, "ﷺ" * 100)
    yield from (
        " ".join(NOUNS),
        " ".join(ADJECTIVES + VERBS),
        "".join(NOUNS),
        " ".join(OTHER_SCRIPTS),
        " " * 1000,
        "a " * 500,
    )


def mixed_case(rng):
    """A few fragments of every kind, glued with or without spaces."""
    kinds = [
        lambda: rng.choice(NOUNS + ADJECTIVES + VERBS),
        lambda: rng.choice(NOUNS).upper()[: rng.randint(1, 8)],
        lambda: rng.choice(OTHER_SCRIPTS),
        lambda: rng.choice(PLAIN + SPECIAL).strip()[: rng.randint(1, 12)],
        lambda: rng.choice(rng.choice(list(POINTS.values()))) * rng.randint(1, 3),
        lambda: str(rng.randrange(10 ** rng.randint(1, 9))),
        lambda: "".join(rng.choices("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", k=rng.randint(1, 6))),
        lambda: "".join(chr(rng.randrange(0x20, 0x3000)) for _ in range(rng.randint(1, 6))),
        lambda: "".join(any_point(rng) for _ in range(rng.randint(1, 4))),
    ]
    glue = rng.choice(["", " ", " ", "  "])
    return glue.join(rng.choice(kinds)() for _ in range(rng.randint(2, 14)))


def any_point(rng):
    """Any code point but a surrogate, which no UTF-8 text can hold."""
    point = rng.randrange(0x110000 - 0x800)
    return chr(point if point < 0xD800 else point + 0x800)


def all_cases(rng):
    texts = dict.fromkeys(whole_cases())  # a set that keeps order
    if len(texts) > CASES:
        raise SystemExit(f"{len(texts)} whole cases do not fit in {CASES}")
    print(f"{len(texts)} whole cases, the rest mixed")
    while len(texts) < CASES:
        texts[mixed_case(rng)] = None
    return list(texts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=20240)
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(arguments.seed)
    model = train(rng)
    (arguments.out / "spiece.model").write_bytes(model)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    with open(arguments.out / "cases.jsonl", "w", encoding="ascii") as file:
        for text in all_cases(rng):
            file.write(json.dumps({"text": text, "ids": tokenizer.encode(text)}) + "\n")


if __name__ == "__main__":
    main()
