"""What texts can be conditioned on.

What a user writes: ``potentials`` (what they are, regular expressions, choices), ``grammars`` (JSON schemas, Lark),
``soft_potentials`` (powers, rewards, twists), ``spellings`` (canonical ones). ``conditions`` puts them into requests.
How they are read:

- ``byte_automata`` has languages as automata over bytes, ``token_bytes`` the bytes of a tokenizer's tokens,
  ``token_automata`` what the two make together: the tables that the compiled cycle reads. ``json_language`` makes
  automata of schemas that do not nest without end.
- ``guides`` say on the host what each next token weighs, ``critics`` what a text weighs that has been written.
  ``canonical`` tells which tokens may follow one another.
"""

from smc_compile.control.grammars import JsonSchema, Lark
from smc_compile.control.potentials import Choices, Potential, Regex
from smc_compile.control.soft_potentials import Critic, Power, Reward, Twist
from smc_compile.control.spellings import Canonical

__all__ = ["Canonical", "Choices", "Critic", "JsonSchema", "Lark", "Potential", "Power", "Regex", "Reward", "Twist"]
