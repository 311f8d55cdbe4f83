"""A plain decode loop, and the same loop compiled into Sequential Monte Carlo speculative decoding."""

import time

import torch

import smc_compile
from smc_compile.pairs.shipped import load_pair

target, draft, tokenizer, _ = load_pair()
prompt = 'def read_lines(path):\n    """Return the lines of a text file without their line ends."""\n'
ids = torch.tensor([tokenizer.encode(prompt).ids])


def decode(model, ids, n):  # ids: [B, P] -> [B, P + n]; plain PyTorch, no cache anywhere
    for _ in range(n):
        probs = torch.softmax(model(ids)[:, -1] / 0.8, -1)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], 1)
    return ids


fast = smc_compile.decode(decode, draft=draft, n_particles=4, lookahead=4, seed=0)

for name, function in (("plain loop", decode), ("compiled with SMC", fast)):
    with torch.no_grad():
        function(target, ids, 16)  # the first call compiles; n may change freely afterwards
        begin = time.perf_counter()
        sequence = function(target, ids, 96)
    print(f"--- {name}: {96 / (time.perf_counter() - begin):.0f} tokens/s\n{tokenizer.decode(sequence[0].tolist())}\n")
