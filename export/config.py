"""config.json read strictly: every key is either used, known to be harmless, or refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from vlm_edge.errors import CheckpointMissing, UnsupportedConfig

T = TypeVar("T")

# Keys that no inference result depends on: bookkeeping, training, and defaults of `generate`, which
# transformers before version 5 wrote into every config. generation_config.json is read elsewhere.
HARMLESS = frozenset(
    """
    _attn_implementation_autoset _commit_hash _from_model_config _name_or_path
    activation_dropout add_cross_attention architectures attention_dropout
    attention_probs_dropout_prob auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward classifier_dropout
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    drop_path_rate dropout dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    hidden_dropout_prob id2label ignore_index image_seq_length init_std initializer_factor
    initializer_range is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id
    layerdrop layerscale_value length_penalty logit_scale_init_value max_length max_sequence_length
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id
    prefix pretraining_tp problem_type projection_dim pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class
    tokenizer_model_max_length tokenizer_padding_side top_k top_p torch_dtype torchscript
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    use_return_dict vocab_file
    """.split()
)


class Config:
    """One object of config.json; remembers which keys were asked for.

    Attributes:
        path: dotted path of the object in the file, for messages ("" at the top).
    """

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self.values, self.path = values, path
        self._used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The key's value; `default` where it is absent or null, as transformers' own defaults."""
        self._used.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def size(self, key: str, default: int) -> int:
        """A positive integer.

        Raises:
            UnsupportedConfig: it is something else.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UnsupportedConfig(self.name(key), value, "it should be a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number.

        Raises:
            UnsupportedConfig: it is something else.
        """
        value = self.get(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise UnsupportedConfig(self.name(key), value, "it should be a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise UnsupportedConfig(self.name(key), value, "it should be true or false")
        return value

    def choice(self, key: str, default: str, known: Iterable[str]) -> str:
        """One of `known`.

        Raises:
            UnsupportedConfig: another value; the sentence lists those known.
        """
        value = self.get(key, default)
        names = sorted(known)
        if value not in names:
            raise UnsupportedConfig(self.name(key), value, f"known are {', '.join(names)}")
        return str(value)

    def only(self, key: str, default: T, allowed: T, why: str) -> None:
        """The key may only have the value we implement."""
        value = self.get(key, default)
        if value != allowed:
            raise UnsupportedConfig(self.name(key), value, why)

    def sub(self, key: str) -> Config:
        """The object under `key`, an empty one where it is absent; its own keys are its own care."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise UnsupportedConfig(self.name(key), value, "it should be an object")
        return Config(value, self.name(key))

    def name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def finish(self) -> None:
        """Refuse what nobody asked for, unless it is harmless or switched off (null, false).

        Raises:
            UnsupportedConfig: a key that may change the result and that this architecture ignores.
        """
        for key, value in self.values.items():
            if key in self._used or key in HARMLESS or value is None or value is False:
                continue
            raise UnsupportedConfig(
                self.name(key), value, "vlm-edge does not know this key and will not ignore it"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        CheckpointMissing: the file is absent, or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointMissing(
            path.parent, f"{path.name} is missing; is this a checkpoint?"
        ) from error
    except (ValueError, OSError) as error:
        raise CheckpointMissing(
            path.parent, f"{path.name} is not readable JSON ({error})"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointMissing(path.parent, f"{path.name} should hold a JSON object")
    return data
