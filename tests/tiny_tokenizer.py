"""A tokenizer built in code, for tests: one token a character, 100 tokens in all."""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

__all__ = ["VOCABULARY", "tiny_tokenizer"]

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
# Printable ASCII and the line feed.
VOCABULARY = SPECIAL + sorted({*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"})


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a character of ASCII. With `bos`, every text starts with `<s>`."""
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
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
