"""The page that shows the fleet, and its data: what is collected for it costs requests next to nothing, and is bounded."""
