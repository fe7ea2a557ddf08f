"""Numbers in prose: each is written from a stored result, or stands on the list of studies/constants.py.

`{{ key }}` in a template becomes a value between two marks: what is left outside of them was typed by a person. Code,
links and comments are no prose, and names with digits in them (ResNet-20, bf16, 4x4) no numbers. A number word before a
unit, "two points", is one.
"""

import re
from collections import Counter
from typing import NamedTuple

from studies.constants import CONSTANTS

OPEN, CLOSE, NAMED = "\ue000", "\ue001", "\ue002"  # around what a key gave; what takes its place
NUMBER = re.compile(r"(?<![\w./^-])[-+]?\d(?:[\d.,]*\d)?(?:e-?\d+)?(?![\w^]|\.\d)")
WORDS = "two three four five six seven eight nine ten eleven twelve fifteen twenty thirty half twice third quarter"
UNITS = "points? percent minutes? hours? seconds? times"
NUMBER_WORD = re.compile(rf"\b({'|'.join(WORDS.split())}) (?=({'|'.join(UNITS.split())})\b)", re.IGNORECASE)
KINDS = {  # of what a key gave: by what is around it
    "in sentences: accuracies and other shares": r"\s?\*{0,2}\s?%",
    "in sentences: speeds and ratios": r"\s?(images/s|GFLOP/s|times|GB/s|MB/s)",
    "in sentences: times": r"\s?(s|ms|min|minutes?|hours?|h|seconds?|years)\b",
    "in sentences: memory": r"\s?(MB|GB|kB|bytes)",
    "in sentences: points": r"\s?points",
}


class Found(NamedTuple):
    """What is typed in a text and not on the list, and how many numbers of each kind there are."""

    unknown: list[str]  # each with the words around it
    typed: Counter
    keyed: Counter


def without_marks(text: str) -> str:
    return text.replace(OPEN, "").replace(CLOSE, "")


def find_numbers(marked: str, page: str = "") -> Found:
    """The numbers of a text in Markdown, whose keyed parts are marked."""
    keyed = count_keyed(marked)
    text = re.sub(f"{OPEN}[^{CLOSE}]*{CLOSE}", NAMED, marked)
    for pattern in (r"```.*?```", r"<!--.*?-->", r"\$\$.*?\$\$"):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*(\n[^`\n]+)?`", " ", text)
    text = re.sub(r"\]\([^)\s]*\)|https?://\S+|^ {4}\S.*$|^\s*\d+\. ", " ", text, flags=re.MULTILINE)
    text = re.sub(r"\s+", " ", text)
    typed = Counter()
    for reason, patterns in CONSTANTS.items():
        for pattern in patterns:
            only, expression = re.match(r"(?:(\w+\.\w+): )?(.*)", pattern).groups()
            if only in (None, page):
                text, count = re.subn(expression, lambda found: re.sub(r"\w+", "_", found[0]), text)
                typed[reason] += count
    unknown = [*NUMBER.finditer(text), *NUMBER_WORD.finditer(text)]
    return Found([f"{text[max(0, m.start() - 40) : m.end() + 25].strip()}" for m in unknown], +typed, keyed)


def count_keyed(marked: str) -> Counter:
    """Numbers that keys gave: in tables, and in sentences by what follows them."""
    counts = Counter()
    for line in marked.split("\n"):
        for found in re.finditer(f"{OPEN}([^{CLOSE}]*){CLOSE}", line):
            rest = without_marks(line[found.end() : found.end() + 40])
            for number in re.finditer(r"\d(?:[\d.,]*\d)?", found[1]):
                after = found[1][number.end() :] + rest
                named = (kind for kind, pattern in KINDS.items() if re.match(pattern, after))
                kind = (
                    "in tables" if line.startswith("|") else next(named, "in sentences: counts, sizes, intervals, ...")
                )
                counts[kind] += 1
    return counts
