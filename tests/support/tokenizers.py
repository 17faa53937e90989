"""Small tokenizers of the kinds that language models have, trained on a few sentences in milliseconds."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Germany is Berlin.",
    "Paris is the capital of France, and Rome is the capital of Italy. Is Rome older than Paris?",
    "The old theory of the other thing is that they were there then, not here.",
    "When Mary and John went to the store, John gave a drink to Mary.",
    "The café in Zürich is naïve; the crème brûlée there is the best of all cafés.",
    "def add(a, b):\n    return a + b\n\n# adds two numbers\n",
    "Numbers: 12 and 345 and 6789. Quotes: 'single' and \"double\".",
)
"""What the tokenizers have seen: words of here become whole tokens, all else falls to pieces."""


ANSWERS = (
    "Question: Is it? Choices: (A) Yes (B) No (C) Maybe. Answer: A",
    "Answer: (A)",
    "Answer: (B)",
    "Answer: (C)",
    "Answer: B",
    "Answer: C",
    "Answer:A",
    "Answer:B",
    "Answer: Yes",
    "Answer: No",
    "user: Is it?\nassistant\n(A)",
    "user: Is it?\nassistant\n(B)",
)
"""What tokenizers for questions have seen besides: letters and words of answers become whole tokens."""

GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How GPT-4's vocabulary (and Llama 3's, Qwen's) cuts a text: a sign before a word goes with it, as in ``:A``."""


def _wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


@cache
def byte_level_bpe(
    *,
    size: int = 420,
    bos: bool = False,
    trim_offsets: bool = False,
    lossy: bool = False,
    split: str | None = None,
    answers: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama 3, Qwen and SmolLM2 have it.

    ``bos`` puts a special token before every text; ``trim_offsets`` leaves spaces out of the offsets, as GPT-2's does;
    ``lossy`` loses case and composes accents, so that decoding does not give the text back; ``split`` cuts the text as
    it says in place of GPT-2's way; ``answers`` has whole tokens for the letters of answers. There is no padding token.
    """
    tokenizer = Tokenizer(models.BPE())
    if lossy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES + ANSWERS * 20 if answers else SENTENCES,
        trainers.BpeTrainer(
            vocab_size=size,
            show_progress=False,
            special_tokens=["<|endoftext|>", "<|im_start|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    byte_level = processors.ByteLevel(trim_offsets=trim_offsets)
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.post_processor = processors.Sequence([byte_level, template]) if bos else byte_level
    return _wrapped(tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@cache
def sentencepiece_like(
    *, size: int = 330, legacy: bool = False, answers: bool = False
) -> PreTrainedTokenizerFast:
    """BPE on ``▁`` with a space before the text, bytes for unknown characters and ``<s>`` in front.

    ``legacy`` is the older make, without a pre-tokeniser, as Llama 2 and the first Mistral have it; ``answers`` has
    whole tokens for the letters of answers.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        [
            sentence.translate(str.maketrans("", "", "éüïèû\n"))
            for sentence in (SENTENCES + ANSWERS * 20 if answers else SENTENCES)
        ],
        trainers.BpeTrainer(vocab_size=size, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"]),
    )
    model = json.loads(trained.to_str())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = decoders.Strip(content=" ", left=1, right=0)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        strip = decoders.Strip(content=" ", left=1, right=0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return _wrapped(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def words() -> PreTrainedTokenizerFast:
    """One token a word, spaces lost: decoding does not give the text back, and only offsets know the places."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    tokenizer.train_from_iterator(
        SENTENCES, trainers.WordLevelTrainer(show_progress=False, special_tokens=["[UNK]", "[EOS]"])
    )
    return _wrapped(tokenizer, eos_token="[EOS]", unk_token="[UNK]")
