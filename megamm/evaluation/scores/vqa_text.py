"""What VQA's evaluator makes of an answer before it compares it (vqaEval.py of github.com/GT-Vision-Lab/VQA).

Four steps, in this order: white space, punctuation, full stops, words. Their oddities decide about answers,
so they are kept: which marks go and which become spaces depends on the answer as it was before any of them
was touched, and no more than 32 full stops go.
"""

from __future__ import annotations

import re
from functools import lru_cache

MARKS = ';/[]"{}()=+\\_-><@`,?!'
MAX_STOPS = 32  # the evaluator passes re.UNICODE, which is 32, where re.sub takes a count
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
# Written without an apostrophe, or with one too few, and as it should be; with its mistakes ("somebody'd").
# The evaluator has four more, for "Im" and such: they are looked up in small letters, and never found.
_TABLE = """
aint ain't | arent aren't | cant can't | couldve could've | couldnt couldn't | couldn'tve couldn't've |
couldnt've couldn't've | didnt didn't | doesnt doesn't | dont don't | hadnt hadn't | hadnt've hadn't've |
hadn'tve hadn't've | hasnt hasn't | havent haven't | hed he'd | hed've he'd've | he'dve he'd've | hes he's |
howd how'd | howll how'll | hows how's | isnt isn't | itd it'd | itd've it'd've | it'dve it'd've |
itll it'll | let's let's | maam ma'am | mightnt mightn't | mightnt've mightn't've | mightn'tve mightn't've |
mightve might've | mustnt mustn't | mustve must've | neednt needn't | notve not've | oclock o'clock |
oughtnt oughtn't | ow's'at 'ow's'at | 'ows'at 'ow's'at | 'ow'sat 'ow's'at | shant shan't |
shed've she'd've | she'dve she'd've | she's she's | shouldve should've | shouldnt shouldn't |
shouldnt've shouldn't've | shouldn'tve shouldn't've | somebody'd somebodyd | somebodyd've somebody'd've |
somebody'dve somebody'd've | somebodyll somebody'll | somebodys somebody's | someoned someone'd |
someoned've someone'd've | someone'dve someone'd've | someonell someone'll | someones someone's |
somethingd something'd | somethingd've something'd've | something'dve something'd've |
somethingll something'll | thats that's | thered there'd | thered've there'd've | there'dve there'd've |
therere there're | theres there's | theyd they'd | theyd've they'd've | they'dve they'd've |
theyll they'll | theyre they're | theyve they've | twas 'twas | wasnt wasn't | wed've we'd've |
we'dve we'd've | weve we've | werent weren't | whatll what'll | whatre what're | whats what's |
whatve what've | whens when's | whered where'd | wheres where's | whereve where've | whod who'd |
whod've who'd've | who'dve who'd've | wholl who'll | whos who's | whove who've | whyll why'll |
whyre why're | whys why's | wont won't | wouldve would've | wouldnt wouldn't | wouldnt've wouldn't've |
wouldn'tve wouldn't've | yall y'all | yall'll y'all'll | y'allll y'all'll | yall'd've y'all'd've |
y'alld've y'all'd've | y'all'dve y'all'd've | youd you'd | youd've you'd've | you'dve you'd've |
youll you'll | youre you're | youve you've
"""
CONTRACTIONS = dict(pair.split() for pair in _TABLE.split("|"))

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_STOP = re.compile(r"\.(?!\d)")


def trimmed(text: str) -> str:
    """Line ends and tabs as spaces, and none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 18)
def normalised(text: str) -> str:
    """The answer as the evaluator compares it."""
    return words(punctuation(trimmed(text)))


def punctuation(text: str) -> str:
    """Without marks and full stops.

    A mark is removed if it stands beside a space somewhere, or if any comma stands between two digits;
    otherwise all of its kind become spaces. Both are seen in `text`, not in what is left of it. A full stop
    is removed unless a digit follows.
    """
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    left = text
    for mark in MARKS:
        if mark in text:
            removed = has_number or f"{mark} " in text or f" {mark}" in text
            left = left.replace(mark, "" if removed else " ")
    return _STOP.sub("", left, count=MAX_STOPS)


def words(text: str) -> str:
    """In small letters, numbers up to ten as digits, without articles, contractions with their
    apostrophes."""
    kept = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in kept if word not in ARTICLES)
