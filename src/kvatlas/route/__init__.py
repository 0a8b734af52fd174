"""READ PATH decisions: which endpoint gets a request, and why. Pure: no IO, no settings, no logs."""
