"""What texts can be conditioned on.

``potentials`` has what a user writes: regular expressions, choices, and their products. ``byte_automata`` has them as
automata over bytes, ``token_bytes`` the bytes of a tokenizer's tokens, ``token_automata`` what the two make together:
the tables that the compiled cycle reads. ``conditions`` puts them into requests.
"""

from smc_compile.control.potentials import Choices, Potential, Regex

__all__ = ["Choices", "Potential", "Regex"]
