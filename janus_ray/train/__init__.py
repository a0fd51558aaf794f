"""Training a policy on a collection: documents and plans, one FSDP2 loop under Ray Train."""
