"""What routers tell each other, so that each decides by the load and the history of all. No IO.

A router tells how much it has in flight, never what was added or taken away: a message that is lost makes others wrong until
the next one, and a router that says nothing for a while is taken to have nothing.
"""
