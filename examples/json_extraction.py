"""Valid JSON records with their probabilities, from the shipped pair: ``python examples/json_extraction.py``.

A list of users is begun, and the next one is wanted, by a small model of Python code. The schema makes every record
valid, and weights make records follow the model's own law, given that they are: so probabilities say what the model
finds likely. Masks alone would let it go on for nothing where its tokens are forced, however odd it finds them.

With ``--canonical`` records are spelled in tokens as the tokenizer would: ``log evidence`` tells the mass of these.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

import smc_compile
from smc_compile.control import Canonical, JsonSchema
from smc_compile.pairs.shipped import load_pair

PROMPT = """# users, a record a line
{"name": "anna", "age": 31, "admin": true}
{"name": "bob", "age": 27, "admin": false}
{"name": "test", "age": 45, "admin": false}
"""
FIELDS = {
    "name": {"type": "string", "pattern": "^[a-z]{2,10}$"},
    "age": {"type": "integer", "minimum": 0, "maximum": 120},
    "admin": {"type": "boolean"},
}
SCHEMA = {"title": "user", "type": "object", "properties": FIELDS, "required": [*FIELDS], "additionalProperties": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-particles", type=int, default=64)
    parser.add_argument("--lookahead", type=int, default=4)
    parser.add_argument("--canonical", action="store_true", help="as the tokenizer spells")
    parser.add_argument("--show", type=int, default=8, help="how many records to show")
    arguments = parser.parse_args()
    target, draft, tokenizer, _ = load_pair()
    (newline,) = tokenizer.encode("\n").ids
    potential = JsonSchema(SCHEMA) * Canonical() if arguments.canonical else JsonSchema(SCHEMA)
    for seed in (0, 1):  # the first call compiles
        start = time.perf_counter()
        out = smc_compile.generate(
            target, draft, torch.tensor([tokenizer.encode(PROMPT).ids]), tokenizer=tokenizer, eos_token_id=newline,
            max_new_tokens=48, potential=potential, n_particles=arguments.n_particles, lookahead=arguments.lookahead,
            seed=seed,
        )  # fmt: skip
    print(out.stats.tables[0])
    print(f"log evidence {float(out.log_evidence):.1f}; {time.perf_counter() - start:.2f} s, {out.stats.cycles} cycles")
    for text, probability in list(out.decoded_posterior(tokenizer).items())[: arguments.show]:
        print(f"{probability:5.2f}  {json.loads(text)}")


if __name__ == "__main__":
    main()
