"""Writes the outputs of a finished run's network by sample: a file that teaches in place of the network.

python scripts/outputs.py run=runs/digits/<stamp> to=teacher.safetensors
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("outputs")
