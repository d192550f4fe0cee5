"""Compression to compare or combine with distillation: low rank, pruning and int8, each a function from a trained network
to a smaller one.

The smaller network's structure is stored with its weights, as plain values (`litdistill.compress.structure`).
"""
