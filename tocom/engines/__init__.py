"""How a forward is run: eagerly by torch, which is the reference, or as a compiled graph.

`vit.outputs` is the eager one. A graph is for one rate and one number of images, so that all
shapes are known ahead; the weights that a delta can change are its inputs, so that it serves
every bank, source and task, and nothing is switched.
"""
