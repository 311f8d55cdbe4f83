"""Compiled regions: the functions that are compiled, how they are called, and the models that they call.

``region`` compiles and times one function; only ``admitted_code`` reads private names of Dynamo. Functions here take
requests and states from ``state``, and know nothing of sessions.
"""
