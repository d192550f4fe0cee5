"""`python -m litdistill <verb>`, which is also how a sweep and Lightning start processes where there is no other way."""

import os
import sys

if __spec__ is None:  # run as a file: its own folder would hide modules of Python's, such as types
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from litdistill.cli import main

if __name__ == "__main__":
    main()
