"""Serving: an OpenAI-compatible gateway on Ray Serve that knows values, in front of vLLM."""
