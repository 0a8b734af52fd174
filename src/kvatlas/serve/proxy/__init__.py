"""The OpenAI-compatible reverse proxy: requests in, routed, and answers passed on as they come."""
