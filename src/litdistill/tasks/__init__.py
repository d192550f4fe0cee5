"""What a network is trained for: its loss, predictions and metrics."""
