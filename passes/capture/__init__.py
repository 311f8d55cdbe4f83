"""From one iteration of a decode loop to a CausalLM: export, decompositions, clean-up, and the sampler cut off.

``pipeline.capture`` runs these passes. They know nothing of caches; each works on the graph of ATen ops with values.
"""
