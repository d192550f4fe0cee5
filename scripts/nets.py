"""Prints the size of every network in conf/net, for MNIST-like and for CIFAR-100-like images.

python scripts/nets.py
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("nets")
