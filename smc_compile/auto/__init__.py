"""Choosing N and K for a program: counted costs of its passes, rates of the machine, and a short pilot run.

``choice.settled`` is the way in: a program under numbers for a program that leaves them open. It reads programs and
changes none.
"""
