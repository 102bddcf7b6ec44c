"""Words that a tokenizer has a token of its own for, so that probes can hide them, ask for them and rank them.

A vocabulary alone does not say which of its entries are words: many are beginnings of longer ones. So common English
nouns are listed here, and a tokenizer's own are those that it writes as one token after a space, whatever stands
before. No word begins another one or stands in a probe's own sentences, so what a model writes is one of them or not.
"""

from collections.abc import Iterable
from typing import Any

__all__ = ["NOUNS", "single_token_words"]

_TEXT = """
    animal answer apple arrow artist autumn avenue award baby ball band bank barn basket beach beard bell belt bench
    bird blanket blood boat body bone bottle bowl brain branch bread breakfast bridge brother bucket building bus butter
    button cake camera camp candle castle cat ceiling cellar century chain chair cheese chest chicken child church
    circle city clock cloth cloud coach coast coat coffee coin collar college color copper corn cotton country cousin
    cover cow crowd crown cup curtain daughter desert desk diamond dinner doctor dog dollar door dream dress driver drum
    duck dust eagle earth egg elephant evening eye face factory family farmer father feather fence field finger fire
    fish flag floor flower forest fork fox frame friend frog fruit gate ghost gift girl glass glove goat gold grain
    grass guitar hair hammer hand harbor hat heart hill holiday honey horse hospital hotel house ice island jacket
    judge jungle king knife ladder lake lamp leather lemon library lion magazine market meadow meat metal milk mirror
    money monkey moon morning mother mouse mouth museum music nation neck needle nest nose novel ocean oil orange
    orchestra oven owner painter palace paper parent park path pencil people picture pig pilot planet plate pocket poet
    police pond potato prince prison queen rabbit radio rain restaurant rice ring road rock roof room rope rose salt
    sand scarf school seed shadow sheep ship shirt shoe shop shoulder silk silver sister skin sky smoke snake snow soap
    sofa soldier song soup spider spoon spring square stable stage station stone storm street student sugar suit summer
    sun sword table tail teeth temple tent theater ticket tiger tomato tongue tower toy train tree truck tunnel valley
    village violin voice wall water wheel whistle wife wing winter wolf woman wood wool yard
"""
NOUNS = tuple(_TEXT.split())


def single_token_words(tokenizer: Any, without: Iterable[str] = ()) -> dict[str, int]:
    """Word -> the id of its token, in the order of `NOUNS`.

    A word counts where the tokenizer writes it, after ` ` and behind a hyphen as behind a colon, as the same one token,
    and that token decodes to the word again.

    Args:
        tokenizer: of transformers.
        without: words to leave out.
    """
    leads = [(lead, tokenizer(lead, add_special_tokens=False)["input_ids"]) for lead in ("\n-", "\n- x:")]
    left_out = set(without)
    found: dict[str, int] = {}
    for word in NOUNS:
        if word in left_out:
            continue
        endings = set()
        for lead, before in leads:
            whole = tokenizer(f"{lead} {word}", add_special_tokens=False)["input_ids"]
            endings.add(whole[-1] if whole[:-1] == before else None)
        (token, *others) = endings
        if token is not None and not others and tokenizer.decode([token]).strip() == word:
            found[word] = token
    return found
