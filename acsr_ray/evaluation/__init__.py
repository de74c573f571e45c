"""What purification buys: accuracies with intervals, and pictures."""
