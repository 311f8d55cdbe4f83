"""``model.generate`` of transformers with SMC: prompts of different lengths, the library's own options, a stream."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import smc_compile
from smc_compile.pairs.shipped import load_pair

# In your code: AutoModelForCausalLM.from_pretrained(...) twice, for a large and a small model of one tokenizer.
*_, tokenizer, _ = load_pair()
size = {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
torch.manual_seed(0)
wide = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, **size)
narrow = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, **size)
model, draft = LlamaForCausalLM(wide).eval(), LlamaForCausalLM(narrow).eval()

texts = [tokenizer.encode(text).ids for text in ("def add(a, b):\n    return a", "import os")]
width = max(len(text) for text in texts)
ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])  # padding in front
mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])

out = model.generate(
    ids,
    attention_mask=mask,
    max_new_tokens=32,
    do_sample=True,
    temperature=0.8,
    top_k=0,
    repetition_penalty=1.2,
    return_dict_in_generate=True,
    custom_generate=smc_compile.transformers.generate,
    draft_model=draft,
    n_particles=4,
    lookahead=4,
    seed=0,
    token_streamer=lambda p: print(f"request {p.request}: {p.settled} of {len(p.tokens)} tokens have settled"),
    stream="leader",
    max_lag=8,
)
for text, log_probs, evidence in zip(out.sequences[:, width:], out.log_probs, out.log_evidence, strict=True):
    print(f"--- log p {log_probs.mean():.2f} a token, log evidence {evidence:+.2f}\n{tokenizer.decode(text.tolist())}")
