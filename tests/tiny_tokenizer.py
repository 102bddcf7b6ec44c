"""Tokenizers built in code, for tests: one token a character, 100 tokens in all; or with some words as well."""

import string
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

__all__ = ["VOCABULARY", "tiny_tokenizer", "word_tokenizer"]

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
# Printable ASCII and the line feed.
VOCABULARY = SPECIAL + sorted({*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"})


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a character of ASCII. With `bos`, every text starts with `<s>`."""
    return _tokenizer([], bos)


def word_tokenizer(words: Sequence[str], bos: bool = False) -> PreTrainedTokenizerFast:
    """The same with a token of its own for each of the words, where it stands whole after a space; ids from 100 on."""
    return _tokenizer(words, bos)


def _tokenizer(words: Sequence[str], bos: bool) -> PreTrainedTokenizerFast:
    vocabulary = [*VOCABULARY, *(f" {word}" for word in words)]
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(vocabulary)}, unk_token="<unk>"))
    whole = f" (?:{'|'.join(words)})(?![a-z])|" if words else ""
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{whole}[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
