"""One file a method; `base.py` says what a method is."""
