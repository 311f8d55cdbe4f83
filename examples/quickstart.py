"""A plain decode loop, and the same loop compiled into Sequential Monte Carlo speculative decoding."""

import time

import torch
from smc_compile.pair import load_pair

target, draft, tokenizer, _ = load_pair()
prompt = 'def read_lines(path):\n    """Return the lines of a text file without their line ends."""\n'
ids = torch.tensor([tokenizer.encode(prompt).ids])


def decode(model, ids, max_new_tokens):
    for _ in range(max_new_tokens):
        probs = torch.softmax(model(ids)[:, -1] / 0.8, -1)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], -1)
    return ids


fast_decode = torch.compile(decode, backend="smc", options={"draft": draft, "n_particles": 8, "lookahead": 6})

for name, function in (("plain loop", decode), ("compiled with SMC", fast_decode)):
    with torch.no_grad():
        function(target, ids, 64)  # the first call compiles
        begin = time.perf_counter()
        sequence = function(target, ids, 64)
        seconds = time.perf_counter() - begin
    print(f"--- {name}: {64 / seconds:.0f} tokens/s\n{tokenizer.decode(sequence[0].tolist())}\n")
