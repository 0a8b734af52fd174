"""Several processes that route behind one port."""
