"""Downloads and verifies a data set ahead of time, for a machine without network say.

python scripts/fetch.py data=mnist data.root=data_files

Then copy `data_files/mnist` to `<data.root>/mnist` there. A data set that is already there is verified again.
"""

from litdistill.cli import run

if __name__ == "__main__":
    run("fetch")
