"""What users give, checked and brought into the forms that sessions run: requests, processors, stops, streams.

Nothing here compiles a model or knows a program. What users call imports from here, and so do ``program`` and ``auto``.
"""
