"""The Multifaceted Collection: from instructions to preference sets, system messages and responses."""
