"""Files in and out: whole or absent, with manifests; stages meet only on disk."""
