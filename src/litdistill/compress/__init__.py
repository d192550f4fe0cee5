"""What distillation is compared with, and combined with: low rank, pruning and int8, each a function from a trained network
to a smaller one.

The smaller network's structure is plain values (`litdistill.compress.structure`), kept beside its weights.
"""
