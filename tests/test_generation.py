"""Generation with writes: every forward pass is changed, and the text is what a hand-written hook gives."""

from __future__ import annotations

import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.plain import assert_untouched, model_fingerprint
from tests.support.tokenizers import byte_level_bpe

IDS = [3, 14, 15, 9, 2, 6]


def by_hand(hf, ids: torch.Tensor, path: str, edit, count: int) -> list[int]:
    handle = hf.get_submodule(path).register_forward_hook(lambda _m, _a, output: edit(output))
    try:
        return hf.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)[
            0, ids.shape[1] :
        ].tolist()
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_writes_hold_in_every_step(family: str) -> None:
    hf = FAMILIES[family].build()
    model = tl.wrap(hf)
    torch.manual_seed(0)
    v = 3 * torch.randn(48)
    before = model_fingerprint(hf)
    with model.generate(IDS, max_new_tokens=8) as t:
        model.layers[1].resid_post += v
    assert_untouched(before, model_fingerprint(hf))
    path = "transformer.h.1" if family == "gpt2" else "model.layers.1"
    steered = by_hand(hf, torch.tensor([IDS]), path, lambda output: output + v, 8)
    plain = by_hand(hf, torch.tensor([IDS]), path, lambda output: output, 8)
    assert t.tokens == steered
    assert steered != plain
    with model.generate(IDS, max_new_tokens=8) as nothing:
        pass
    assert nothing.tokens == plain


def test_only_the_last_position_of_each_step() -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    v = 4 * torch.randn(48, generator=torch.Generator().manual_seed(1))

    def edit(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -1] += v
        return output

    with model.generate(IDS, max_new_tokens=6) as t:
        model.layers[0].resid_post[:, -1] += v
    assert t.tokens == by_hand(hf, torch.tensor([IDS]), "model.layers.0", edit, 6)


def test_resid_mid_and_logits_in_generation() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with model.generate(IDS, max_new_tokens=5) as t:
        model.logits[..., 7] = 1e9
    assert t.tokens == [7] * 5
    with model.generate(IDS, max_new_tokens=5) as plain:
        pass
    with model.generate(IDS, max_new_tokens=5) as t:
        model.layers[1].resid_mid *= 1.0
    assert t.tokens == plain.tokens
    with model.generate(IDS, max_new_tokens=5) as t:
        model.layers[1].resid_mid = 0.0
    assert t.tokens != plain.tokens


def test_a_batch_gives_one_text_per_prompt_as_if_alone() -> None:
    tokenizer = byte_level_bpe()
    model = tl.wrap(FAMILIES["qwen2"].build(vocab_size=len(tokenizer)), tokenizer)
    v = 3 * torch.randn(48, generator=torch.Generator().manual_seed(2))
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12]]
    with model.generate(prompts, max_new_tokens=6) as both:
        model.layers[1].resid_post += v
    alone = []
    for prompt in prompts:
        with model.generate(prompt, max_new_tokens=6) as t:
            model.layers[1].resid_post += v
        alone.append(t.tokens)
    assert both.tokens == alone
    assert both.text == [tokenizer.decode(row, skip_special_tokens=True) for row in alone]


def test_a_text_ends_at_its_end_token() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with model.generate(IDS, max_new_tokens=6) as t:
        pass
    end = t.tokens[2]
    with model.generate(IDS, max_new_tokens=6, eos_token_id=end) as t:
        pass
    assert isinstance(t.tokens, list)
    assert t.tokens[-1] == end
    assert len(t.tokens) <= 3


def test_what_generation_refuses() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with pytest.raises(tl.errors.SaveInGenerationError), model.generate(IDS, max_new_tokens=2):
        model.layers[0].pattern.save()
    with pytest.raises(tl.errors.PositionAxisError), model.generate(IDS, max_new_tokens=2):
        model.layers[0].resid_post[:, 0] = 0.0
    with pytest.raises(tl.errors.PositionAxisError), model.generate(IDS, max_new_tokens=2):
        model.layers[0].resid_post -= model.layers[0].resid_post.mean(1, keepdim=True)
    with pytest.raises(tl.errors.PositionAxisError), model.generate(IDS, max_new_tokens=2):
        tl.masked_mean(model.layers[0].resid_post)
    with pytest.raises(tl.errors.PositionAxisError), model.generate(IDS, max_new_tokens=2):
        model.layers[0].resid_post.tok[-2] = 0.0
    with pytest.raises(tl.errors.CausalityError), model.generate(IDS, max_new_tokens=2):
        model.layers[0].resid_post += model.layers[2].resid_post
    with pytest.raises(tl.errors.PromptTooLongError):
        model.generate(IDS, max_new_tokens=1000)
