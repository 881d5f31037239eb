"""The two kinds of tokenizer LLaVA's language models use, tiny: Llama's pieces and GPT-2's bytes."""

from __future__ import annotations

from typing import Any

MERGES = "t h,h e,i n,a n,o u,s t,e r,w h,a t,l o,r e,wh at,th e,i s,an d,c o,co lo".split(",")
WORD_MERGES = [("▁", word) for word in ("t", "a", "i", "the", "what", "is", "and", "colo")]

CHAT_TEMPLATES = {
    "pieces": (  # as llava-1.5
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        "{{ message['role'].upper() + ': ' }}{% endif %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>\n' }}{% endfor %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "mistral": (  # the beginning-of-text token is in the template: the tokenizer must not add another
        "{{ bos_token }}{% for message in messages %}{{ '[INST] ' }}"
        "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\n' }}"
        "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{{ ' [/INST]' }}{% endfor %}"
    ),
    "bytes": (  # as llava-interleave-qwen
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>' }}"
        "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "smolvlm": (  # as SmolVLM
        "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
        "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
        "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
        "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}
SMOLVLM = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
SMOLVLM_PLACES = ["<global-img>", *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))]


def tokenizer_of(kind: str) -> Any:
    """A PreTrainedTokenizerFast of about 300 tokens; `kind` is "pieces", "pieces-eos" (as T5's, which ends
    every text), "bytes", "words" (as BERT's), "smolvlm", or "smolvlm-bare", which spells places of tiles
    as text."""
    from transformers import PreTrainedTokenizerFast

    if kind == "words":
        return PreTrainedTokenizerFast(
            tokenizer_object=_words(), unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]",
            cls_token="[CLS]", clean_up_tokenization_spaces=False,
        )  # fmt: skip
    if kind == "pieces-eos":
        return PreTrainedTokenizerFast(
            tokenizer_object=_pieces("$A </s>"), eos_token="</s>", unk_token="<unk>",
            pad_token="<unk>", additional_special_tokens=["<image>"],
            clean_up_tokenization_spaces=False,
        )  # fmt: skip
    if kind == "pieces":
        return PreTrainedTokenizerFast(
            tokenizer_object=_pieces(), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
            additional_special_tokens=["<image>"], clean_up_tokenization_spaces=False,
        )  # fmt: skip
    if kind.startswith("smolvlm"):
        return PreTrainedTokenizerFast(
            tokenizer_object=_bytes(), bos_token="<|im_start|>", eos_token="<end_of_utterance>",
            pad_token="<|im_end|>", clean_up_tokenization_spaces=False,
            additional_special_tokens=[*SMOLVLM, *([] if "bare" in kind else SMOLVLM_PLACES)],
        )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=_bytes(), eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _pairs() -> list[tuple[str, str]]:
    return [(first, second) for first, second in (merge.split() for merge in MERGES)]


def _vocabulary(first: list[str], merges: list[tuple[str, str]]) -> dict[str, int]:
    words = [*first, *("".join(pair) for pair in merges)]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def _pieces(around: str = "<s> $A") -> Any:
    """As the tokenizer.json of Llama 2: SentencePiece's "▁", unknown characters as bytes, <s> in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    merges = [*_pairs(), *WORD_MERGES]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = _vocabulary(
        ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ASU", *letters],
        merges,
    )
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, pair="<s> $A <s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def _words() -> Any:
    """As the tokenizer.json of BERT: WordPiece in lower case between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    words += [*"?.,:", "what", "is", "the", "color", "##or", "##ing"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def _bytes() -> Any:
    """As the tokenizer.json of Qwen2 and SmolLM2: byte-level BPE, nothing in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [*_pairs(), *(("Ġ", word) for _, word in WORD_MERGES)]
    tokenizer = Tokenizer(
        models.BPE(_vocabulary(sorted(pre_tokenizers.ByteLevel.alphabet()), merges), merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"])
    return tokenizer
