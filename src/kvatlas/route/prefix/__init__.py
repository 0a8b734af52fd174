"""What endpoints hold of a prompt: from the index, from routing history, or from whichever of them knows."""
