"""Writes the tokenizer folder: T5's class with the words of the captions, and letters for everything else.

python make_tokenizer.py OUT
"""

import string
import sys

from transformers import T5Tokenizer

import tiny_data

WORD_SCORE, LETTER_SCORE = -4.0, -12.0  # one word costs less than any split of it


def main(out):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, WORD_SCORE) for word in tiny_data.vocabulary()]
    pieces += [(letter, LETTER_SCORE) for letter in "▁" + string.ascii_letters + string.digits + string.punctuation]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=256)
    tokenizer.save_pretrained(out)
    print(f"{out}: {len(tokenizer)} pieces; {tokenizer.tokenize('A red ball moving left, zzz.')}")


if __name__ == "__main__":
    main(sys.argv[1])
