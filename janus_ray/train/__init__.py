"""Training a policy on a collection: Ray Data packs, Ray Train runs one FSDP2 loop."""
