"""Documents as tokens, and which of a chat's tokens are answers."""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from linearize.distill.sources import Content
from linearize.errors import LinearizeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "encode"]

# Stands for an answer's text in a second rendering of a chat: a character of Unicode's private use area.
STAND_IN = "\ue0a5"


class Encoded(NamedTuple):
    """A document. ids: its tokens; counted: for each whether end-to-end losses count it as a target, None for all."""

    ids: list[int]
    counted: list[bool] | None = None


def encode(tokenizer: "PreTrainedTokenizerBase", content: Content, loss: str | None = None) -> Encoded:
    """A document as token ids, ended by the end-of-text token; no ids if it has no tokens of its own.

    Args:
        tokenizer: the model's.
        content: a text, chat messages or token ids.
        loss: `"answers"`: of a chat only the assistant's words count, and the token that ends each answer. `"all"` or
            None: all tokens do, as in any other content.

    Raises:
        LinearizeError: chat messages for a tokenizer without a chat template, or whose template refuses them or does
            not show where an answer is.
    """
    counted: list[bool] | None = None
    if isinstance(content, str):
        # With what the tokenizer puts around a text by default, such as Llama's first token.
        ids = list(tokenizer(content, verbose=False)["input_ids"]) if content.strip() else []
    elif content and isinstance(content[0], dict):
        messages: list[Any] = content
        if tokenizer.chat_template is None:
            raise LinearizeError(
                "tokenizer: it has no chat template, which chat messages need; use an instruct model's tokenizer, set "
                "tokenizer.chat_template, or give plain texts"
            )
        if loss == "answers":
            ids, counted = _with_answers(tokenizer, messages)
        else:
            ids = list(_apply(tokenizer, messages, tokenize=True, return_dict=False))
    else:
        ids = [int(token) for token in content]  # type: ignore[arg-type]
    eos = tokenizer.eos_token_id
    # Chat templates end with it already, most of them followed by a line break.
    if ids and eos is not None and eos not in ids[-2:]:
        ids.append(eos)
        if counted is not None:
            counted.append(content[-1]["role"] == "assistant")  # type: ignore[index]
    return Encoded(ids, counted)


def _with_answers(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """A chat's tokens, and which of them are answers."""
    if not tokenizer.is_fast:
        raise LinearizeError(
            f"tokenizer: {type(tokenizer).__name__} does not tell which characters a token stands for, so a chat's "
            "answers cannot be told from the rest; use a fast tokenizer, or set the source's loss to all"
        )
    if re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template()):
        marked = _apply(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(marked["input_ids"]), [bool(x) for x in marked["assistant_masks"]]
    text = _apply(tokenizer, messages, tokenize=False)
    spans = _answer_spans(tokenizer, messages, text)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counted, following = [], 0
    for begin, end in tokens["offset_mapping"]:
        while following < len(spans) and spans[following][1] <= begin:
            following += 1
        counted.append(following < len(spans) and begin < end and spans[following][0] < end)
    return list(tokens["input_ids"]), counted


def _answer_spans(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], text: str
) -> list[tuple[int, int]]:
    """Where in the rendered chat each answer begins and ends, the special token that ends it included.

    The chat is rendered once more for each answer, with another text in the answer's place: what differs is the
    answer, whatever the template puts around it, and however it treats the last turn.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = "|".join(map(re.escape, sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)))
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        replaced = {**message, "content": STAND_IN}
        other = _apply(tokenizer, [*messages[:index], replaced, *messages[index + 1 :]], tokenize=False)
        begin = _common(text, other)
        after = _common(text[begin:][::-1], other[begin:][::-1])
        end = len(text) - after
        if STAND_IN not in other[begin:] or (spans and begin < spans[-1][1]):
            raise LinearizeError(
                f"tokenizer: its chat template does not show where the answer {message['content'][:40]!r} is in the "
                "chat; set the source's loss to all, or mark answers in the template by {% generation %}"
            )
        closing = re.compile(rf"\s*(?:{ends})").match(text, end) if ends else None
        spans.append((begin, closing.end() if closing else end))
    return spans


def _common(a: str, b: str) -> int:
    """How many characters two texts share at their start."""
    for index, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return index
    return min(len(a), len(b))


def _apply(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        raise LinearizeError(
            f"tokenizer: its chat template refuses a chat of {', '.join(m['role'] for m in messages)} that begins "
            f"{messages[0]['content'][:40]!r} ({' '.join(str(error).split())}); leave such chats out"
        ) from error
