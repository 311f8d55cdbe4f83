"""From Dynamo's graph of a whole decode loop to one iteration, ``step(ids [B, S], *inputs) -> token``.

`pipeline.recover_loop` calls the passes in order; the rest of the house sees `recover.DecodeLoop` and
`outputs.OutputLayout`. A loop that cannot be compiled raises a LoopError with the node, the user's line and a way out.
"""
