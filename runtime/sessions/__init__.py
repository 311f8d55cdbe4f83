"""One file a method (smc, autoregressive, speculative), and what they share: how a call begins, its run, recordings.

The rest of the package imports the sessions themselves, ``Run`` and ``Record``. A session keeps nothing of a request:
what belongs to one call is in its ``Run``, so calls may run side by side.
"""
