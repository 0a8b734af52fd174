"""From a request to token ids, exactly as the engine sees them."""
