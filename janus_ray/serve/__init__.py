"""Serving: an OpenAI-compatible gateway that turns values into system messages, in front of vLLM on Ray Serve."""
