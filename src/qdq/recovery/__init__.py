"""Accuracy recovery: recipe after recipe until enough of the float model's accuracy is kept."""
