"""Networks: callables `build(num_classes, input_shape, **options)` from (N, C, H, W) to logits (N, num_classes).

A yaml in `conf/net/` names one; `num_classes` and `input_shape` come from the data at run time. To add one, write a
function or an `nn.Module` with those first two arguments, here or anywhere, and one yaml.
"""
