"""``kvatlas demo``: a fleet of embedded engines, a router before it, and traffic, as processes on this machine."""
