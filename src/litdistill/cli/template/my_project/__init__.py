"""Methods and networks of this project. The yamls of `conf` name them by `_target_`."""
