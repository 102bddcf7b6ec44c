"""The table of what works on a student as on its original; `python -m tests.parity_table` writes it as a page.

Every row names its tests, and every test of `tests/test_compatibility_*.py` stands in a row; a test sees to both.
"""

from dataclasses import dataclass
from pathlib import Path

from tests.parity import WAYS

__all__ = ["PAGE", "TABLE", "Row", "markdown"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    what: is done with the model. tests: `file::Class::test` without `test_compatibility_` and `.py`. student: "works",
    "refused: why" or how far it goes. hybrids: what transformers' own hybrids do instead, where that is less.
    """

    what: str
    tests: tuple[str, ...]
    student: str = "works"
    hybrids: str = ""


# What LFM2 (convolutions and attention), Falcon-H1 (Mamba and attention) and MiniMax (linear attention and attention)
# cannot do, as `tests/test_compatibility_hybrids.py` finds it with tiny models.
_WAYS = {
    "padding between tokens": "all three are wrong",
    "padding between tokens in pieces": "LFM2, Falcon-H1: wrong",
    "packed documents": "all three mix the documents",
    "empty past": "all three raise on `DynamicCache()`",
}


def _ways() -> tuple[Row, ...]:
    rows = (Row(way.name, ("forward::test_ways",), hybrids=_WAYS.get(way.name, "")) for way in WAYS)
    return (*rows, Row("in pieces, padded or not, in every other family", ("forward::test_other_families",)))


TABLE: dict[str, tuple[Row, ...]] = {
    "Handing tokens over": _ways(),
    "Masks and positions": (
        Row("masks of bool, int and float", ("bad_input::TestMasks::test_dtypes",)),
        Row("a mask with room for tokens that come later", ("bad_input::TestMasks::test_room_for_the_future",)),
        Row("left padding without `position_ids`", ("bad_input::TestMasks::test_left_padding_without_positions",)),
        Row("a row that is all padding", ("bad_input::TestMasks::test_a_row_of_nothing",)),
        Row(
            "4-D masks",
            ("bad_input::TestMasks::test_four_dimensions",),
            "refused: a converted layer does not choose which token sees which",
        ),
        Row("a mask that is shorter than the tokens", ("bad_input::TestMasks::test_too_short",), "refused"),
        Row(
            "positions with gaps, those of padding; without a past repeated, negative, fractions",
            (
                "bad_input::TestPositions::test_as_the_original_takes_them",
                "bad_input::TestPositions::test_padding_has_any_position",
                "bad_input::TestPositions::test_gaps_with_a_past",
            ),
            "works: as the original takes them",
        ),
        Row(
            "positions that go backwards",
            (
                "bad_input::TestPositions::test_backwards",
                "bad_input::TestPositions::test_backwards_with_a_past",
                "bad_input::TestPositions::test_without_a_mask_they_tell_documents_apart",
            ),
            "refused: a state cannot be read from before its end; without a mask they tell documents apart, as in the "
            "original",
        ),
        Row(
            "a mask that hides a token after it was read",
            (
                "bad_input::TestMasks::test_hidden_later",
                "bad_input::TestMasks::test_pads_of_a_chat",
                "bad_input::TestMasks::test_of_the_new_tokens_alone",
            ),
            "refused: what is in a state stays there",
        ),
        Row(
            "packed documents with a cache",
            (
                "bad_input::TestPositions::test_documents_with_a_cache",
                "bad_input::TestPositions::test_documents_with_a_cache_in_the_original",
            ),
            "refused: no cache can go on with several documents (the original mixes them silently)",
        ),
    ),
    "Outputs": (
        Row("`logits_to_keep`", ("model::TestOutputs::test_some_logits",)),
        Row("hidden states", ("model::TestOutputs::test_hidden_states", "generate::TestOutputs::test_hidden_states")),
        Row("loss of labels, some of them -100", ("model::TestOutputs::test_loss",)),
        Row("tuples in place of records", ("model::TestOutputs::test_tuples",)),
        Row("attention maps", ("model::TestOutputs::test_attention_maps",), "refused: a converted layer has none"),
    ),
    "Generation": (
        Row(
            "greedy, with processors of the scores",
            ("generate::TestModes::test_greedy", "generate::TestModes::test_greedy_with_processors"),
        ),
        Row(
            "ends of rows, stopping criteria",
            ("generate::TestModes::test_rows_that_end_early", "generate::TestModes::test_stopping_criteria"),
        ),
        Row(
            "sampling from a seed",
            ("generate::TestModes::test_sampling",),
        ),
        Row("`num_return_sequences`", ("generate::TestModes::test_several_sequences",)),
        Row(
            "beam search and its scores",
            (
                "generate::TestModes::test_beam_search",
                "generate::TestModes::test_beam_search_with_several_sequences",
                "generate::TestModes::test_beam_scores",
            ),
            hybrids="MiniMax: wrong, its states do not follow the beams",
        ),
        Row("beam sampling", ("generate::TestModes::test_beam_sample",)),
        Row(
            "contrastive search, DoLa, groups of beams",
            ("generate::TestModes::test_what_transformers_has_moved_to_the_hub",),
            "as in the original: transformers has moved them to code on the hub",
        ),
        Row(
            "prompt lookup",
            ("generate::TestAssisted::test_prompt_lookup",),
            hybrids="only LFM2",
        ),
        Row(
            "an assistant model; a student as assistant",
            ("generate::TestAssisted::test_an_assistant_model",),
            hybrids="only LFM2",
        ),
        Row("scores and logits", ("generate::TestOutputs::test_scores_and_logits",)),
        Row(
            "streamers",
            ("generate::TestOutputs::test_streamers", "generate::TestOutputs::test_streamer_to_the_console"),
        ),
        Row("without a mask", ("generate::TestInputs::test_mask_or_none",)),
        Row(
            "from `inputs_embeds`",
            ("generate::TestInputs::test_embeddings", "generate::TestInputs::test_embeddings_into_a_given_cache"),
        ),
        Row("`prefill_chunk_size`", ("generate::TestInputs::test_prefill_in_pieces",)),
        Row("from a cache that forward passes have filled", ("generate::TestInputs::test_a_cache_from_forward",)),
        Row(
            "a chat that goes on from its cache",
            ("generate::TestInputs::test_a_chat_goes_on",),
            hybrids="MiniMax: wrong",
        ),
        Row(
            "one reading of the prompt for several sequences",
            ("generate::TestInputs::test_one_prefill_for_several_sequences",),
            hybrids="LFM2, Falcon-H1: `batch_repeat_interleave` raises, or the next call does",
        ),
        Row(
            "some rows go on",
            ("generate::TestInputs::test_half_of_the_batch_goes_on",),
            hybrids="LFM2, Falcon-H1: `batch_select_indices` raises, or the next call does",
        ),
    ),
    "Caches": (
        Row("a `DynamicCache` of the user", ("generate::TestCaches::test_a_cache_of_the_user",)),
        Row(
            "static caches, whose steps ask the device nothing",
            (
                "bad_input::TestPositions::test_a_step_for_graphs_is_not_asked",
                "generate::TestCaches::test_static",
                "generate::TestCaches::test_static_with_beams_and_pieces",
            ),
        ),
        Row("`torch.compile` of a decoding step, one graph", ("model::TestCompile::test_decoding",)),
        Row(
            "an offloaded cache",
            ("cache::test_offloaded_layers_are_back_in_time", "cache::TestCopies::test_offload_and_prefetch"),
            "works; tested with recorded moves, not on a GPU",
        ),
        Row(
            "lengths, sizes of masks, what it says that it can",
            (
                "cache::TestSizes::test_lengths",
                "cache::TestSizes::test_a_constant_size",
                "cache::TestSizes::test_what_it_says_it_can",
            ),
        ),
        Row(
            "`reorder_cache`, `batch_repeat_interleave`, `batch_select_indices`",
            ("cache::TestRows::test_moves", "cache::TestRows::test_moves_of_an_empty_cache"),
            hybrids="LFM2, Falcon-H1: `reorder_cache` only",
        ),
        Row("`reset`", ("cache::TestReset::test_as_a_fresh_one",)),
        Row(
            "`crop`",
            (
                "cache::TestCrop::test_after_a_pass",
                "cache::TestCrop::test_by_a_tensor",
                "cache::TestCrop::test_after_tokens",
                "cache::TestCrop::test_rows_of_different_lengths",
                "cache::TestCrop::test_padding_among_them",
                "cache::TestCrop::test_again_and_again",
                "cache::TestCrop::test_nothing_to_remove",
                "cache::TestCrop::test_recorded",
                "cache::TestCrop::test_too_far",
                "bad_input::TestCaches::test_crop_by_a_length",
            ),
            "works, exactly, by up to W tokens (not gla), or by all since `activate_past_recording`; else refused",
            "raises; LFM2 can where past recording was switched on",
        ),
        Row("copies and pickles", ("cache::TestCopies::test_branches",)),
        Row(
            "from inference mode to training",
            (
                "cache::TestCopies::test_inference_mode",
                "cache::TestCopies::test_in_and_out_of_inference_mode",
            ),
        ),
        Row("two caches at once", ("model::test_two_models_do_not_share",)),
        Row(
            "a prompt's cache on disk, `save_cache` and `load_cache`",
            (
                "prompt_cache::test_the_file_goes_on_as_the_cache",
                "prompt_cache::test_generate",
                "prompt_cache::test_rows_are_added_after_loading",
                "prompt_cache::test_tokens_are_taken_back_after_loading",
                "prompt_cache::test_beside_sliding_layers",
                "prompt_cache::test_what_the_header_says",
                "prompt_cache::test_a_fresh_process",
            ),
            hybrids="transformers has no such file",
        ),
        Row(
            "that file in another model; other files; other caches",
            (
                "prompt_cache::TestRefused::test_another_model",
                "prompt_cache::TestRefused::test_a_trained_mixer",
                "prompt_cache::TestRefused::test_other_files",
                "prompt_cache::TestRefused::test_caches_that_cannot_be_saved",
            ),
            "refused",
        ),
        Row(
            "a cache of another number of rows, kind of model, window, dtype",
            (
                "bad_input::TestCaches::test_another_number_of_rows",
                "bad_input::TestCaches::test_of_another_model",
                "bad_input::TestCaches::test_of_another_window",
                "bad_input::TestCaches::test_of_another_dtype",
                "bad_input::TestCaches::test_of_fewer_layers",
            ),
            "refused; one that differs in weights alone is not noticed, as in the original",
        ),
        Row(
            "random conversations of all this",
            ("fuzz::test_conversations", "fuzz::test_many_conversations"),
        ),
    ),
    "Other libraries": (
        Row("a text-generation pipeline", ("model::test_pipeline",)),
        Row(
            "PEFT: LoRA trained, saved, loaded, merged; by a PeftModel or the model's own methods",
            (
                "interoperation::TestPeft::test_train_save_load_merge",
                "interoperation::TestPeft::test_by_the_model_itself",
            ),
        ),
        Row(
            'mixers trained beside it, `modules_to_save=["mixer", "mix"]`',
            ("interoperation::TestPeft::test_mixers_learn_beside_it",),
        ),
        Row(
            "accelerate: `device_map`, weights on disk, `prepare`",
            ("interoperation::TestAccelerate::test_device_map", "interoperation::TestAccelerate::test_prepared"),
        ),
        Row(
            "serving: requests in threads, streamed, going on from a chat's cache",
            ("interoperation::TestLoops::test_a_serving_thread",),
        ),
        Row("a decoding loop of one's own", ("interoperation::TestLoops::test_a_loop_of_ones_own",)),
        Row(
            "continuous batching, `generate_batch`",
            ("interoperation::TestLoops::test_continuous_batching",),
            "refused: it pages keys and values, and a converted layer keeps a memory",
        ),
        Row(
            "an exported folder: `linearize.export`, `linearize export`",
            (
                "export::test_another_process",
                "export::test_what_is_written",
                "export::test_the_card_names_no_folder",
                "export::test_a_card_of_ones_own_stays",
                "export::test_saved_again",
                "export::test_refusals",
                "export::TestCommand::test_an_adapter_with_lora",
                "export::TestCommand::test_refusals",
            ),
            "loads after `import linearize` or with `trust_remote_code=True`; where linearize is missing or too old, "
            "the error names the version",
        ),
    ),
    "Training and copies": (
        Row(
            "gradient checkpointing",
            (
                "model::TestTraining::test_gradient_checkpointing",
                "model::TestTraining::test_no_cache_under_checkpointing",
                "model::TestTraining::test_training_mode",
            ),
        ),
        Row("`resize_token_embeddings`", ("model::TestVocabulary::test_more_and_fewer_tokens",)),
        Row("tied weights", ("model::TestVocabulary::test_tied_weights",)),
        Row("`save_pretrained`, `from_pretrained`", ("model::TestCopies::test_save_and_load",)),
        Row(
            "`deepcopy`, pickle, `load_state_dict`",
            ("model::TestCopies::test_model", "model::TestCopies::test_state_dict"),
        ),
        Row("`half()`, `bfloat16()`", ("model::TestCopies::test_half",)),
        Row(
            "both kinds of tokens, none at all, tokens that do not exist",
            (
                "bad_input::TestInputs::test_both_kinds_of_tokens",
                "bad_input::TestInputs::test_no_tokens_at_all",
                "bad_input::TestInputs::test_a_token_that_is_none",
            ),
            "refused, as by the original",
        ),
    ),
}

_INTRODUCTION = """\
# What works on a student

Whatever works on an original should work on its student. This page is written by the tests' own table
([`parity_table.py`](../tests/parity_table.py)); every row is tested, with tiny random models of Llama, Mistral, Qwen2
and Qwen3, mixers `hedgehog` (each mix), `gla` and `none`, all layers converted and with layers that stay softmax, and
prompts that are long enough for the state to be in use. "Works" means: the logits are those of one pass over each text
alone, without a cache (1e-5 in float32; in half precision at most twice the error of that pass), and generated tokens
are the same with a cache, without one, in a padded batch and row by row. The original itself goes through the same
tests.

The last column says where transformers' own hybrids, LFM2, Falcon-H1 and MiniMax, do less (tiny ones in transformers
5.23, on a CPU). Qwen3-Next and OLMo-Hybrid do not run on a CPU where flash-linear-attention is installed.
"""


def markdown() -> str:
    """The page."""
    parts = [_INTRODUCTION]
    for topic, rows in TABLE.items():
        parts.append(f"## {topic}\n\n| what | student | hybrids of transformers |\n|---|---|---|")
        parts += [f"| {row.what} | {row.student} | {row.hybrids} |" for row in rows]
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
