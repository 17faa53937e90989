"""Use the installed wheel as a stranger would: look at what was shipped, then trace a tiny random model."""

from importlib.metadata import files, version

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tracelens as tl

LAYERS, HIDDEN = 3, 32


def main() -> None:
    check_contents()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    hf_model = LlamaForCausalLM(config).eval()
    prompt = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        plain = hf_model(prompt, output_hidden_states=True)

    model = tl.wrap(hf_model)
    with model.trace(prompt):
        untouched = model.layers[0].resid_post[:, -1].save("untouched")
    # hidden_states[1] is what leaves the first block.
    assert torch.equal(untouched.value, plain.hidden_states[1][:, -1]), (
        "a probe must equal the model's own value"
    )

    with model.trace(prompt) as t:
        model.layers[0].resid_post += 1.0
        h = model.layers[1].resid_post[:, -1].save("h")
    assert h.value.shape == (1, HIDDEN)
    assert torch.equal(t["h"], h.value)
    assert not torch.allclose(h.value, plain.hidden_states[2][:, -1]), "the write must reach the next layer"

    with torch.no_grad():
        assert torch.equal(hf_model(prompt).logits, plain.logits), "the model must be as it was"
    print(f"tracelens {version('tracelens')} from the wheel: a trace gave h of shape {tuple(h.value.shape)}")


def check_contents() -> None:
    shipped = {str(path) for path in files("tracelens") or []}
    assert "tracelens/py.typed" in shipped, "the wheel must ship its types"
    assert any(name.endswith("licenses/LICENSE") for name in shipped), "the wheel must ship its licence"
    assert {"tracelens/viz/lens_page.js", "tracelens/viz/lens_page.css"} <= shipped, (
        "the wheel must ship its pages"
    )
    assert not any(name.startswith("tests/") for name in shipped), "the wheel must not ship the tests"
    assert "site-packages" in tl.__file__, f"this is not the installed package: {tl.__file__}"


if __name__ == "__main__":
    main()
